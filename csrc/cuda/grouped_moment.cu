// Cross-moments on tensor cores. A block owns 128 x 128 outputs of one head over one slice of the rows and works
// through the slice in stages: tokens are gathered (or mixed) into shared memory ahead of time, float32 is split there
// into three exact bfloat16 parts, warps multiply 64 x 32 outputs each, and every block takes the sums and energies of
// its share of the stages. A second, small kernel adds the slices in a fixed order.
#include "grouped_moment.h"

#include "grouped_tile.cuh"

namespace theseus::cuda {
namespace {

// What a block does.
struct Work {
  const Group& group;
  int head, slice, source_tile, target_tile;  // head: the first of the tile's
};

THESEUS_DEVICE Work find_work(const Plan& plan) {
  int g = 0;
  while (g + 1 < plan.count && block_index() >= plan.group[g + 1].first_block) ++g;
  const Group& group = plan.group[g];
  const int tiles = group.source_tiles * group.target_tiles, index = block_index() - group.first_block;
  const int tile = index % tiles, rest = index / tiles;
  // Bands of eight tiles of the source: the blocks that run at one time read few columns, which stay in L2.
  constexpr int kBand = 8;
  const int band = tile / (kBand * group.target_tiles) * kBand, inside = tile % (kBand * group.target_tiles);
  const int height = group.source_tiles - band < kBand ? group.source_tiles - band : kBand;
  const int together = group.heads_of_tile, groups_of_heads = (group.heads + together - 1) / together;
  return {group, rest % groups_of_heads * together, rest / groups_of_heads, band + inside % height, inside / height};
}

// A tile's columns of `heads` heads from `head` on.
THESEUS_DEVICE Panel panel_of(const Side& side, bool direct, int head, int heads, int tile, int end) {
  const int width = static_cast<int>(side.width), rest = heads * width - tile * kPanel;
  return {side, direct, head * width + tile * kPanel, end, rest < kPanel ? rest : kPanel};
}

template <class R>
THESEUS_KERNEL(kMomentThreads, 1)
moment_tiles_kernel(const THESEUS_GRID_CONSTANT Plan plan) {
  using S = Shape<R>;
  // What the block does: one tile of outputs over one slice of the rows, in stages of kDepth rows.
  static_assert(kMomentThreads == 2 * kPanel, "a thread takes the sum and energy of one column of one side");
  const Work work = find_work(plan);
  const Group& group = work.group;
  const int slice = work.slice, source_tile = work.source_tile, target_tile = work.target_tile;
  const int begin = slice * group.slice_rows;
  const int end = group.rows - begin > group.slice_rows ? begin + group.slice_rows : group.rows;
  const int stages = (end - begin + S::kDepth - 1) / S::kDepth;
  const int together = group.heads_of_tile, left = group.heads - work.head, heads = left < together ? left : together;
  const Panel source = panel_of(group.source, group.source_direct, work.head, heads, source_tile, end);
  const Panel target = panel_of(group.target, group.target_direct, work.head, heads, target_tile, end);

  // What the warp does: 64 x 32 of the outputs. Where a tile holds two heads, only the products of a head with itself.
  const int warp = thread_index() / kWarp;
  const int warp_source = warp / 4 * kWarpSource, warp_target = warp % 4 * kWarpTarget;
  static_assert(2 * kWarpSource == kPanel, "a warp has rows of one of two heads");
  const int own = together > 1 ? warp_source / kWarpSource : 0;  // which of the tile's heads is the warp's
  const bool active = warp_source < source.columns && warp_target < target.columns &&
                      (together == 1 || warp_target / kWarpSource == own);
  // What the thread does beside: one column's sum and energy. All blocks of one row (or column) of tiles read the same
  // columns, so each of these `sharers` takes every sharers-th stage, in float64.
  const int my_side = thread_index() / kPanel, my_column = thread_index() % kPanel;
  const int sharers = my_side ? group.source_tiles : group.target_tiles, my_share = my_side ? source_tile : target_tile;
  int until_mine = my_share;
  double column_sum = 0, column_energy = 0;
  Accumulator sum = {}, total = {};  // `sum` is flushed into `total` every kFlush rows: tensor cores round as they add

  // The tokens of a stage are looked up one stage before they are copied, so that no copy waits for an index.
  int source_token[S::kPasses], target_token[S::kPasses];
  const auto look = [&](int stage) {
    look_up<R>(source, begin + stage * S::kDepth, source_token);
    look_up<R>(target, begin + stage * S::kDepth, target_token);
  };
  const auto start = [&](int stage) {  // commits stages beyond the end too, since waits count commits
    if (stage < stages) {
      fill<R>(source, begin + stage * S::kDepth, source_token, raw<R>(stage, 0));
      fill<R>(target, begin + stage * S::kDepth, target_token, raw<R>(stage, 1));
    }
    copy_commit();
    look(stage + 1);
  };

  // All places but one are on their way before the first stage is multiplied.
  look(0);
  for (int stage = 0; stage < S::kStages - 1; ++stage) start(stage);
  if constexpr (S::kSplit) {
    copy_wait<S::kStages - 2>();
    sync_block();
    split_stage(0);
  }
  for (int stage = 0; stage < stages; ++stage) {
    // This stage has come; where stages are split one ahead, the next one too.
    copy_wait<S::kSplit ? S::kStages - 3 : S::kStages - 2>();
    sync_block();  // for all threads; and all are done with the stage before, whose place is filled now
    start(stage + S::kStages - 1);
    if constexpr (S::kSplit) {
      if (stage + 1 < stages) split_stage(stage + 1);
    }
    if (until_mine-- == 0) {
      until_mine = sharers - 1;
      const R* x = raw<R>(stage, my_side);
      for (int row = 0; row < S::kDepth; ++row) {
        const double value = to_float(
            x[turned(row, my_column / S::kPerVector, S::kVectors) * S::kPerVector + my_column % S::kPerVector]);
        column_sum += value;
        column_energy = multiply_add(value, value, column_energy);
      }
    }
    if (active) multiply<R>(stage, warp_source, warp_target, sum);
    if ((stage + 1) % (S::kFlush / S::kDepth) == 0 || stage + 1 == stages) move(sum, total);
  }

  // Outputs: with several slices every block has a place of its own, and reduce_slices_kernel adds them in a fixed
  // order; the only slice adds to the masters itself. Aligned whole tiles take wider stores.
  const int64_t width = group.target.width, outputs = group.source.width * width;
  const int row = source_tile * kPanel + warp_source - own * kWarpSource;  // of the head's outputs, the warp's first
  const int column = target_tile * kPanel + warp_target - own * kWarpSource;
  const int64_t corner = row * width + column, head = work.head + own;
  const int rows = static_cast<int>(group.source.width) - row, columns = static_cast<int>(width) - column;
  double* cross = group.cross + head * outputs;
  const bool whole =
      rows >= kWarpSource && columns >= kWarpTarget && width % 2 == 0 && reinterpret_cast<uintptr_t>(cross) % 16 == 0;
  float* partial = group.partial ? group.partial + (slice * group.heads + head) * outputs : nullptr;
  if (active && partial)
    put_into({partial + corner, width, rows, columns}, total);
  else if (active && whole)
    add_to<true>({cross + corner, width, rows, columns}, total);
  else if (active)
    add_to<false>({cross + corner, width, rows, columns}, total);
  // Sums and energies: every sharer has a place of its own too.
  if (my_column < (my_side ? target.columns : source.columns)) {
    double* moments = my_side ? group.target_moments : group.source_moments;
    const int64_t columns = group.heads * (my_side ? group.target.width : group.source.width);
    const int64_t at = (static_cast<int64_t>(slice) * sharers + my_share) * columns +
                       (my_side ? target.first : source.first) + my_column;
    moments[2 * at] = column_sum;
    moments[2 * at + 1] = column_energy;
  }
}

// masters += the blocks' partial results, slice by slice. A thread takes four outputs of cross, or a column.
THESEUS_KERNEL(kReduceThreads, 4) reduce_slices_kernel(const THESEUS_GRID_CONSTANT Plan plan) {
  int g = 0;
  while (g + 1 < plan.count && block_index() >= plan.group[g + 1].first_reduction) ++g;
  const Group& group = plan.group[g];
  const int64_t outputs = group.partial ? group.heads * group.source.width * group.target.width : 0;
  int64_t i = static_cast<int64_t>(block_index() - group.first_reduction) * kReduceThreads + thread_index();
  if (4 * i < outputs) {
    const int valid = outputs - 4 * i < 4 ? static_cast<int>(outputs - 4 * i) : 4;
    double sum[4] = {}, had[4];
    for (int slice = 0; slice < group.slices; ++slice) {
      const float* from = group.partial + slice * outputs + 4 * i;
      Vector four = {};
      if (outputs % 4 == 0) {
        four = load_vector(from);
      } else {
        THESEUS_UNROLL
        for (int e = 0; e < 4; ++e)
          if (e < valid) four.word[e] = bits_of(from[e]);
      }
      THESEUS_UNROLL
      for (int e = 0; e < 4; ++e) sum[e] += float_of(four.word[e]);
    }
    THESEUS_UNROLL
    for (int e = 0; e < 4; ++e) had[e] = e < valid ? group.cross[4 * i + e] : 0;
    THESEUS_UNROLL
    for (int e = 0; e < 4; ++e)
      if (e < valid) group.cross[4 * i + e] = had[e] + sum[e];
    return;
  }
  i -= (outputs + 3) / 4;
  const int64_t source_columns = group.heads * group.source.width, target_columns = group.heads * group.target.width;
  const bool of_target = i >= source_columns;
  if (of_target) i -= source_columns;
  const int64_t columns = of_target ? target_columns : source_columns;
  if (i >= columns) return;
  const double* moments = of_target ? group.target_moments : group.source_moments;
  const int parts = group.slices * (of_target ? group.source_tiles : group.target_tiles);
  double sum = 0, energy = 0;
  for (int part = 0; part < parts; ++part) {
    sum += moments[2 * (part * columns + i)];
    energy += moments[2 * (part * columns + i) + 1];
  }
  const Side& side = of_target ? group.target : group.source;
  side.sum[i] += sum;
  side.energy[i] += energy;
}

template <class R>
const char* launch_grouped(const Plan& plan, void* stream) {
  if (const char* error =
          launch(moment_tiles_kernel<R>, plan.blocks, kMomentThreads, Shape<R>::kSharedBytes, stream, plan))
    return error;
  return launch(reduce_slices_kernel, plan.reductions, kReduceThreads, 0, stream, plan);
}

// Calls visit(plan, format) for every launch the groups need, in order; returns the bytes of workspace that the largest
// wants. A launch takes `most_rows` of the rows: longer groups have several.
template <class Visit>
size_t for_each_launch(const MomentGroup* groups, int count, int processors, void* workspace, int64_t most_rows,
                       Visit visit) {
  size_t most = 0;
  for (const Format format : {Format::bfloat16, Format::float16, Format::float32}) {
    int64_t rows = 0;
    for (int g = 0; g < count; ++g)
      if (format_of(groups[g]) == format) rows = std::max(rows, groups[g].args.rows);
    for (int64_t begin = 0; begin < rows; begin += most_rows) {
      MomentGroup chosen[kMostGroups];
      int taken = 0;
      for (int g = 0; g <= count; ++g) {
        if (taken == kMostGroups || (g == count && taken)) {
          size_t bytes = 0;
          visit(make_plan(chosen, taken, format, processors, workspace, bytes), format);
          most = std::max(most, bytes);
          taken = 0;
        }
        if (g < count && groups[g].args.rows > begin && format_of(groups[g]) == format)
          chosen[taken++] = rows_of(groups[g], begin, std::min(groups[g].args.rows - begin, most_rows));
      }
    }
  }
  return most;
}

}  // namespace

bool takes_tensor_cores(const MomentGroup& group, const Device& device) {
  if (group.args.source.dtype == Dtype::float64 || group.args.target.dtype == Dtype::float64) return false;
  const bool data_centre = device.major == 10 || ((device.major == 8 || device.major == 9) && device.minor == 0);
  return data_centre || format_of(group) != Format::float32;
}

size_t grouped_moment_workspace(const MomentGroup* groups, int count, int processors, int64_t most_rows) {
  return for_each_launch(groups, count, processors, nullptr, most_rows, [](const Plan&, Format) {});
}

const char* grouped_moment(const MomentGroup* groups, int count, int processors, void* workspace, void* stream,
                           int64_t most_rows) {
  for (int g = 0; g < count; ++g)
    if (groups[g].args.source.dtype == Dtype::float64 || groups[g].args.target.dtype == Dtype::float64)
      return "float64 tokens run on the plain kernels, not on tensor cores";
    else if (groups[g].args.source.less || groups[g].args.target.less)
      return "differences are made ahead of the launch";
    else if (!fits_int(groups[g]))
      return "a launch takes fewer than 2^30 rows, tokens and columns of a side";
  const char* error = nullptr;
  for_each_launch(groups, count, processors, workspace, most_rows, [&](const Plan& plan, Format format) {
    if (error) return;
    error = format == Format::bfloat16  ? launch_grouped<bfloat16>(plan, stream)
            : format == Format::float16 ? launch_grouped<float16>(plan, stream)
                                        : launch_grouped<float>(plan, stream);
  });
  return error;
}

}  // namespace theseus::cuda
