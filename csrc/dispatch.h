// Which way a space goes on a GPU: what the kernels cannot decide alone. Host arithmetic, no CUDA, no torch.
#pragma once

#include "cuda/grouped_plan.h"

namespace theseus::cuda {

// A plain product of this many columns a side, and at most so many rows, goes to the library's GEMM. The model of
// docs/performance.md has it ahead there by 2 %, level below, behind above. Not yet measured on a GPU.
constexpr int64_t kLibraryFrom = 8192, kLibraryRows = 4096;
// Rows that are not copied as they lie are made once for all where more tiles of the other side read them: each would
// make them again. Not yet measured on a GPU.
constexpr int64_t kFewTiles = 2;

inline Side& side_of(MomentGroup& group, int side) { return side ? group.args.target : group.args.source; }
inline const Side& side_of(const MomentGroup& group, int side) { return side ? group.args.target : group.args.source; }

// Whether the library multiplies this space: 16-bit tokens, one after the other.
inline bool dispatches(const MomentGroup& group) {
  const Side &source = group.args.source, &target = group.args.target;
  const Format format = format_of(group);
  return format != Format::float32 && group.heads == 1 && !source.column && !target.column &&
         is_direct(source, format, 1) && is_direct(target, format, 1) && group.args.rows <= kLibraryRows &&
         std::min(source.width, target.width) >= kLibraryFrom;
}

// Whether rows of that side (0: source) are mixed, subtracted and converted ahead of the launch, into float32.
inline bool made_ahead(const MomentGroup& group, int side) {
  const Format format = format_of(group);
  return format == Format::float32 && !is_direct(side_of(group, side), format, group.heads) &&
         (side_of(group, side).less || tiles(side_of(group, 1 - side).width) > kFewTiles);
}

// That side of all heads at once.
inline Side all_heads(const MomentGroup& group, int side) {
  Side all = side_of(group, side);
  all.width *= group.heads;
  return all;
}

// The group with that side's rows read from `made` [rows, all columns]; they are in its sum and energy already, and
// what the launch takes of them goes to `unused` [2, all columns].
inline MomentGroup reading(MomentGroup group, int side, const float* made, double* unused) {
  const int64_t columns = group.heads * side_of(group, side).width;
  side_of(group, side) = {made,    Dtype::float32, group.args.rows, columns / group.heads,
                          columns, nullptr,        nullptr,         nullptr,
                          0,       unused,         unused + columns};
  return group;
}

}  // namespace theseus::cuda
