// Cross-moments of many spaces in one launch on tensor cores; no torch.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../cross_moment.h"

namespace theseus::cuda {

// One space, or `heads` spaces of equal width side by side: head h reads columns [h width, (h + 1) width) of both
// sides' tokens.
struct MomentGroup {
  CrossMomentArgs args;  // widths are of one head; cross [heads, source.width, target.width], sum and energy [heads *
                         // width]
  int64_t heads = 1;
};

// Adds every group's moments into its masters. bfloat16 with bfloat16 and float16 with float16 are multiplied as they
// are, anything else (float32, unequal dtypes, weights, CSR) in float32 as six products of exact bfloat16 parts. An Inf
// in a float32 row becomes NaN in cross; an entry out of range makes its row NaN. Groups may not share masters.
// `processors`: multiprocessors of the device; it decides how the rows are split, so the bytes are the same on the same
// device. Returns null or what is wrong.
const char* grouped_moment(const MomentGroup* groups, int count, int processors, void* workspace, void* stream);

// Bytes of device memory `workspace` must have, aligned to 16.
size_t grouped_moment_workspace(const MomentGroup* groups, int count, int processors);

}  // namespace theseus::cuda
