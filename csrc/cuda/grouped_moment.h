// Cross-moments of many spaces in one launch on tensor cores; no torch.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../cross_moment.h"
#include "device.h"

namespace theseus::cuda {

// Whether tensor cores serve this group on this device; the plain kernels serve the rest. Never float64. Of what is
// multiplied in float32 only on data-centre GPUs (8.0, 9.0, 10.x): it costs six bfloat16 products, of which their
// data sheets have 15 to 30 in the time of one FMA product in float32; others (8.6, 8.9, 12.x) have 2 to 4.
bool takes_tensor_cores(const MomentGroup& group, const Device& device);

// Adds every group's moments into its masters. bfloat16 with bfloat16 and float16 with float16 are multiplied as they
// are, anything else (float32, unequal dtypes, weights, CSR) in float32 as six products of exact bfloat16 parts. An Inf
// in a float32 row becomes NaN in cross, not in sum and energy; an entry out of range makes its row NaN. Groups may not share masters.
// `processors`: multiprocessors of the device; it decides how the rows are split, so the bytes are the same on the same
// device. Returns null or what is wrong.
const char* grouped_moment(const MomentGroup* groups, int count, int processors, void* workspace, void* stream);

// Bytes of device memory `workspace` must have, aligned to 16.
size_t grouped_moment_workspace(const MomentGroup* groups, int count, int processors);

}  // namespace theseus::cuda
