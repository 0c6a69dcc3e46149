// Cross-moments of many spaces in one launch on tensor cores; no torch.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../cross_moment.h"
#include "device.h"

namespace theseus::cuda {

// Of a launch; more take several. What a block adds up in float32, 128 rows (of float32 1024) at a time, goes into the
// float64 masters after them: few enough additions, and enough products for the masters' traffic not to show.
constexpr int64_t kMostRows = 32768;

// Whether tensor cores serve this group on this device; the plain kernels serve the rest. Never float64. Of what is
// multiplied in float32 only on data-centre GPUs (8.0, 9.0, 10.x): it costs six bfloat16 products, of which their
// data sheets have 15 to 30 in the time of one FMA product in float32; others (8.6, 8.9, 12.x) have 2 to 4.
bool takes_tensor_cores(const MomentGroup& group, const Device& device);

// Adds every group's moments into its masters. bfloat16 with bfloat16 and float16 with float16 are multiplied as they
// are, anything else (float32, unequal dtypes, weights, CSR) in float32 as six products of exact bfloat16 parts. An Inf
// in a float32 row becomes NaN in cross, not in sum and energy; an entry out of range makes its row NaN. Groups may not
// share masters. `processors`: multiprocessors of the device; it decides how the rows are split, so the bytes are the
// same on the same device. Returns null or what is wrong.
const char* grouped_moment(const MomentGroup* groups, int count, int processors, void* workspace, void* stream,
                           int64_t most_rows = kMostRows);

// Bytes of device memory `workspace` must have, aligned to 16.
size_t grouped_moment_workspace(const MomentGroup* groups, int count, int processors, int64_t most_rows = kMostRows);

}  // namespace theseus::cuda
