// Who does what in a grouped launch: split of the rows, blocks, workspace. Host arithmetic, no CUDA.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "grouped_moment.h"

namespace theseus::cuda {

constexpr int kPanel = 128;  // a block owns kPanel x kPanel outputs of one head
constexpr int kReduceThreads = 256;
constexpr int kMostGroups = 15;      // what fits the 4 KiB a kernel's parameters may have
constexpr int64_t kBlockCost = 128;  // rows' worth of time that starting, filling and storing a block takes (a guess)
// Rows' worth of time that a block's 64 KiB of partial sums, written and read again, take of the whole GPU's bandwidth:
// on an H200 3.7 and, where a row is six products, 0.5 (docs/performance.md; model).
constexpr int64_t kPartialCost = 4, kPartialCostFloat32 = 1;

enum class Format : int32_t { bfloat16, float16, float32 };  // how tokens lie in shared memory

struct Group {
  Side source, target;                // of one head
  bool source_direct, target_direct;  // copied asynchronously, 16 bytes at a time
  int rows, slice_rows;               // slice s has rows [s slice_rows, (s + 1) slice_rows)
  int heads, heads_of_tile, slices, source_tiles, target_tiles;
  int first_block, first_reduction;  // this group's blocks of the two kernels begin here
  double* cross;
  float* partial;          // [slices, heads, source.width, target.width], or null: one slice adds into cross itself
  double* source_moments;  // [slices * target_tiles, heads * source.width, 2]: sum and energy over each block's share
                           // of the rows
  double* target_moments;  // [slices * source_tiles, heads * target.width, 2]
};

struct Plan {
  int count = 0, blocks = 0, reductions = 0;
  Group group[kMostGroups];
};
static_assert(sizeof(Plan) <= 4096, "the parameters of a kernel");

inline int64_t tiles(int64_t width) { return std::max<int64_t>(1, (width + kPanel - 1) / kPanel); }

// Heads of half a tile's width lie in pairs along a tile's diagonal: half of its warps have work, not a quarter.
inline int heads_of_tile(const MomentGroup& group) {
  return group.args.source.width == kPanel / 2 && group.args.target.width == kPanel / 2 ? 2 : 1;
}

inline int64_t blocks_of(const MomentGroup& group, int64_t slice_rows) {
  const int64_t together = heads_of_tile(group);
  return tiles(group.args.source.width) * tiles(group.args.target.width) * ((group.heads + together - 1) / together) *
         ((group.args.rows + slice_rows - 1) / slice_rows);
}

// Kernels count rows, tokens and columns in int, with room for a stage or a tile beyond the end.
inline bool fits_int(const MomentGroup& group) {
  const Side &source = group.args.source, &target = group.args.target;
  return std::max({group.args.rows, source.token_count, target.token_count, group.heads * source.width,
                   group.heads * target.width}) < int64_t{1} << 30;
}

inline bool is_selection(const Side& side) { return !side.row_ptr && !side.weight; }

inline Format format_of(const MomentGroup& group) {
  const Side &source = group.args.source, &target = group.args.target;
  if (source.dtype != target.dtype || !is_selection(source) || !is_selection(target) || source.less || target.less)
    return Format::float32;
  return source.dtype == Dtype::bfloat16  ? Format::bfloat16
         : source.dtype == Dtype::float16 ? Format::float16
                                          : Format::float32;
}

// Rows [begin, begin + rows) of a group.
inline MomentGroup rows_of(MomentGroup group, int64_t begin, int64_t rows) {
  group.args.rows = rows;
  for (Side* side : {&group.args.source, &group.args.target}) {
    if (side->row_ptr) {
      side->row_ptr += begin;  // whose entries are counted from the first row on
    } else if (side->column) {
      side->column += begin, side->entries -= begin;
      if (side->weight) side->weight += begin;
    } else {
      skip_elements(*side, begin * side->stride);
      side->token_count -= begin;
    }
  }
  return group;
}

inline bool is_direct(const Side& side, Format format, int64_t heads) {
  const int64_t bytes = format == Format::float32 ? 4 : 2;
  return is_selection(side) && !side.less && (format != Format::float32 || side.dtype == Dtype::float32) &&
         reinterpret_cast<uintptr_t>(side.tokens) % 16 == 0 && side.stride * bytes % 16 == 0 &&
         (heads == 1 || side.width * bytes % 16 == 0);
}

// The number of rows per slice with which the fullest multiprocessor is done first.
inline int64_t choose_slice_rows(const MomentGroup* groups, int count, Format format, int processors) {
  const int64_t partial = format == Format::float32 ? kPartialCostFloat32 : kPartialCost;
  int64_t most = 1, best = 0, best_cost = 0;
  for (int g = 0; g < count; ++g) most = std::max(most, groups[g].args.rows);
  for (int64_t slices = 1; slices <= 64; ++slices) {
    const int64_t rows = ((most + slices - 1) / slices + 31) / 32 * 32;  // whole stages of every format
    int64_t blocks = 0;
    for (int g = 0; g < count; ++g) blocks += blocks_of(groups[g], rows);
    const int64_t cost =
        (blocks + processors - 1) / processors * (rows + kBlockCost) + (rows < most ? blocks * partial : 0);
    if (best == 0 || cost < best_cost) best = rows, best_cost = cost;
  }
  return best;
}

// Plans one launch of `count` <= kMostGroups groups of one format; adds to `bytes` what it needs of `workspace`, which
// may be null.
inline Plan make_plan(const MomentGroup* groups, int count, Format format, int processors, void* workspace,
                      size_t& bytes) {
  Plan plan;
  const int64_t slice_rows = choose_slice_rows(groups, count, format, processors);
  const auto take = [&](int64_t elements, auto* pointer) {
    pointer = workspace ? reinterpret_cast<decltype(pointer)>(static_cast<char*>(workspace) + bytes) : nullptr;
    bytes += (elements * sizeof(*pointer) + 15) / 16 * 16;
    return pointer;
  };
  for (int g = 0; g < count; ++g) {
    const CrossMomentArgs& args = groups[g].args;
    Group& group = plan.group[plan.count++];
    group = {};
    group.source = args.source, group.target = args.target, group.cross = args.cross;
    group.rows = static_cast<int>(args.rows), group.heads = static_cast<int>(groups[g].heads);
    group.heads_of_tile = heads_of_tile(groups[g]);
    group.source_direct = is_direct(args.source, format, group.heads);
    group.target_direct = is_direct(args.target, format, group.heads);
    group.slice_rows = static_cast<int>(slice_rows);
    group.slices = static_cast<int>((args.rows + slice_rows - 1) / slice_rows);
    group.source_tiles = static_cast<int>(tiles(args.source.width));
    group.target_tiles = static_cast<int>(tiles(args.target.width));
    const int64_t outputs = groups[g].heads * args.source.width * args.target.width;
    const int64_t columns = groups[g].heads * (args.source.width + args.target.width);
    if (group.slices > 1) group.partial = take(group.slices * outputs, group.partial);
    group.source_moments =
        take(2 * groups[g].heads * group.slices * group.target_tiles * args.source.width, group.source_moments);
    group.target_moments =
        take(2 * groups[g].heads * group.slices * group.source_tiles * args.target.width, group.target_moments);
    group.first_block = plan.blocks;
    group.first_reduction = plan.reductions;
    plan.blocks += static_cast<int>(blocks_of(groups[g], slice_rows));
    plan.reductions +=
        static_cast<int>(((group.slices > 1 ? (outputs + 3) / 4 : 0) + columns + kReduceThreads - 1) / kReduceThreads);
  }
  return plan;
}

}  // namespace theseus::cuda
