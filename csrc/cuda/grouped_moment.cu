// Cross-moments on tensor cores. A block owns 128 x 128 outputs of one head over one slice of the rows and works
// through the slice in stages: tokens are gathered (or mixed) into shared memory ahead of time, float32 is split there
// into three exact bfloat16 parts, warps multiply 64 x 32 outputs each, and every block takes the sums and energies of
// its share of the stages. A second, small kernel adds the slices in a fixed order. Simulated and compiled, not yet run
// on a GPU.
#include "grouped_moment.h"

#include "grouped_stage.cuh"

namespace theseus::cuda {
namespace {

constexpr int kWarpSource = 64, kWarpTarget = 32;                               // outputs of a warp; 2 x 4 warps
constexpr int kTilesSource = kWarpSource / 16, kTilesTarget = kWarpTarget / 8;  // mma tiles of a warp

// sum += x^T y over a stage, for the warp's outputs from (source, target) on. Of the nine products of parts the three
// smallest are left out: together at most 2^-26 of x y, below the rounding of float32. Small ones first.
template <class R>
THESEUS_DEVICE void multiply(int stage, int source, int target, float (&sum)[kTilesSource][kTilesTarget][4]) {
  using S = Shape<R>;
  using M = typename Multiplied<R>::type;
  const M *x = operand<R>(stage, 0), *y = operand<R>(stage, 1);
  const int lane = thread_index() % kWarp, row = lane % 8, first = lane / 8 % 2, second = lane / 16;
  // Lane 8 i + r names row r of matrix i. x: matrices along columns first, then rows; y: rows first, then columns.
  const auto at = [](const M* part, int k, int column) { return part + turned(k, column / 8, kPanel / 8) * 8; };
  THESEUS_UNROLL
  for (int k = 0; k < S::kDepth; k += 16) {
    uint32_t b[S::kParts][kTilesTarget][2];
    THESEUS_UNROLL
    for (int p = 0; p < S::kParts; ++p) {
      THESEUS_UNROLL
      for (int j = 0; j < kTilesTarget; j += 2) {
        uint32_t four[4];
        load_matrices(at(y + p * S::kDepth * kPanel, k + row + 8 * first, target + 8 * (j + second)), four);
        b[p][j][0] = four[0], b[p][j][1] = four[1], b[p][j + 1][0] = four[2], b[p][j + 1][1] = four[3];
      }
    }
    THESEUS_UNROLL
    for (int i = 0; i < kTilesSource; ++i) {
      uint32_t a[S::kParts][4];
      THESEUS_UNROLL
      for (int p = 0; p < S::kParts; ++p) {
        load_matrices(at(x + p * S::kDepth * kPanel, k + row + 8 * second, source + 16 * i + 8 * first), a[p]);
      }
      THESEUS_UNROLL
      for (int order = S::kParts - 1; order >= 0; --order) {
        THESEUS_UNROLL
        for (int p = 0; p <= order; ++p) {
          THESEUS_UNROLL
          for (int j = 0; j < kTilesTarget; ++j) mma<M>(sum[i][j], a[p], b[order - p][j]);
        }
      }
    }
  }
}

// total += sum, sum = 0
THESEUS_DEVICE void flush(float (&sum)[kTilesSource][kTilesTarget][4], float (&total)[kTilesSource][kTilesTarget][4]) {
  THESEUS_UNROLL
  for (int i = 0; i < kTilesSource; ++i) {
    THESEUS_UNROLL
    for (int j = 0; j < kTilesTarget; ++j) {
      THESEUS_UNROLL
      for (int e = 0; e < 4; ++e) total[i][j][e] += sum[i][j][e], sum[i][j][e] = 0;
    }
  }
}

// Calls deliver(row, column, value) for the outputs of the warp that this thread holds.
template <class Deliver>
THESEUS_DEVICE void for_each_output(const float (&total)[kTilesSource][kTilesTarget][4], Deliver deliver) {
  const int lane = thread_index() % kWarp;
  THESEUS_UNROLL
  for (int i = 0; i < kTilesSource; ++i) {
    THESEUS_UNROLL
    for (int j = 0; j < kTilesTarget; ++j) {
      THESEUS_UNROLL
      for (int e = 0; e < 4; ++e)
        deliver(16 * i + lane / 4 + 8 * (e / 2), 8 * j + lane % 4 * 2 + e % 2, total[i][j][e]);
    }
  }
}

// What a block does.
struct Work {
  const Group& group;
  int64_t head;
  int slice, source_tile, target_tile;
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
  return {group, rest % group.heads, static_cast<int>(rest / group.heads), band + inside % height, inside / height};
}

THESEUS_DEVICE Panel panel_of(const Side& side, bool direct, int64_t head, int tile, int64_t end) {
  const int64_t rest = side.width - static_cast<int64_t>(tile) * kPanel;
  return {side, direct, head * side.width + static_cast<int64_t>(tile) * kPanel, end,
          static_cast<int>(rest < kPanel ? rest : kPanel)};
}

template <class R>
THESEUS_KERNEL(kMomentThreads)
moment_tiles(const THESEUS_GRID_CONSTANT Plan plan) {
  using S = Shape<R>;
  static_assert(kMomentThreads == 2 * kPanel, "a thread takes the sum and energy of one column of one side");
  const Work work = find_work(plan);
  const Group& group = work.group;
  const int slice = work.slice, source_tile = work.source_tile, target_tile = work.target_tile;
  const int64_t begin = slice * group.slice_rows;
  const int64_t end = begin + group.slice_rows < group.rows ? begin + group.slice_rows : group.rows;
  const int stages = static_cast<int>((end - begin + S::kDepth - 1) / S::kDepth);
  const Panel source = panel_of(group.source, group.source_direct, work.head, source_tile, end);
  const Panel target = panel_of(group.target, group.target_direct, work.head, target_tile, end);

  const int warp = thread_index() / kWarp;
  const int warp_source = warp / 4 * kWarpSource, warp_target = warp % 4 * kWarpTarget;
  const bool active = warp_source < source.columns && warp_target < target.columns;
  const int my_side = thread_index() / kPanel, my_column = thread_index() % kPanel;
  const int sharers = my_side ? group.source_tiles : group.target_tiles, my_share = my_side ? source_tile : target_tile;
  double column_sum = 0, column_energy = 0;
  float sum[kTilesSource][kTilesTarget][4] = {}, total[kTilesSource][kTilesTarget][4] = {};

  int64_t source_token[S::kPasses], target_token[S::kPasses];
  const auto look = [&](int stage) {
    look_up<R>(source, begin + static_cast<int64_t>(stage) * S::kDepth, source_token);
    look_up<R>(target, begin + static_cast<int64_t>(stage) * S::kDepth, target_token);
  };
  const auto start = [&](int stage) {
    if (stage < stages) {
      fill<R>(source, begin + static_cast<int64_t>(stage) * S::kDepth, source_token, raw<R>(stage, 0));
      fill<R>(target, begin + static_cast<int64_t>(stage) * S::kDepth, target_token, raw<R>(stage, 1));
    }
    copy_commit();
    look(stage + 1);
  };

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
    if (stage % sharers == my_share) {
      const R* x = raw<R>(stage, my_side);
      for (int row = 0; row < S::kDepth; ++row) {
        const double value = to_float(
            x[turned(row, my_column / S::kPerVector, S::kVectors) * S::kPerVector + my_column % S::kPerVector]);
        column_sum += value;
        column_energy = multiply_add(value, value, column_energy);
      }
    }
    if (active) multiply<R>(stage, warp_source, warp_target, sum);
    if ((stage + 1) % (S::kFlush / S::kDepth) == 0 || stage + 1 == stages) flush(sum, total);
  }

  const int64_t outputs = group.source.width * group.target.width;
  double* cross = group.cross + work.head * outputs;
  float* partial = group.partial ? group.partial + (slice * group.heads + work.head) * outputs : nullptr;
  for_each_output(total, [&](int i, int j, float value) {
    i += warp_source, j += warp_target;
    if (i >= source.columns || j >= target.columns) return;
    const int64_t at = (static_cast<int64_t>(source_tile) * kPanel + i) * group.target.width +
                       static_cast<int64_t>(target_tile) * kPanel + j;
    if (partial)
      partial[at] = value;
    else
      cross[at] += value;
  });
  if (my_column < (my_side ? target.columns : source.columns)) {
    double* moments = my_side ? group.target_moments : group.source_moments;
    const int64_t columns = group.heads * (my_side ? group.target.width : group.source.width);
    const int64_t at = (static_cast<int64_t>(slice) * sharers + my_share) * columns +
                       (my_side ? target.first : source.first) + my_column;
    moments[2 * at] = column_sum;
    moments[2 * at + 1] = column_energy;
  }
}

// masters += the blocks' partial results, slice by slice. One thread per output.
THESEUS_KERNEL(kReduceThreads) reduce_slices(const THESEUS_GRID_CONSTANT Plan plan) {
  int g = 0;
  while (g + 1 < plan.count && block_index() >= plan.group[g + 1].first_reduction) ++g;
  const Group& group = plan.group[g];
  const int64_t outputs = group.partial ? group.heads * group.source.width * group.target.width : 0;
  int64_t i = static_cast<int64_t>(block_index() - group.first_reduction) * kReduceThreads + thread_index();
  if (i < outputs) {
    double sum = 0;
    for (int slice = 0; slice < group.slices; ++slice) sum += group.partial[slice * outputs + i];
    group.cross[i] += sum;
    return;
  }
  i -= outputs;
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
const char* run(const Plan& plan, void* stream) {
  if (const char* error = launch(moment_tiles<R>, plan.blocks, kMomentThreads, Shape<R>::kSharedBytes, stream, plan))
    return error;
  return launch(reduce_slices, plan.reductions, kReduceThreads, 0, stream, plan);
}

// Calls visit(plan, format) for every launch the groups need; returns the bytes of workspace the largest wants.
template <class Visit>
size_t for_each_launch(const MomentGroup* groups, int count, int processors, void* workspace, Visit visit) {
  size_t most = 0;
  for (const Format format : {Format::bfloat16, Format::float16, Format::float32}) {
    const MomentGroup* chosen[kMostGroups];
    int taken = 0;
    for (int g = 0; g <= count; ++g) {
      if (taken == kMostGroups || (g == count && taken)) {
        size_t bytes = 0;
        visit(make_plan(chosen, taken, format, processors, workspace, bytes), format);
        most = std::max(most, bytes);
        taken = 0;
      }
      if (g < count && groups[g].args.rows > 0 && format_of(groups[g]) == format) chosen[taken++] = &groups[g];
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

size_t grouped_moment_workspace(const MomentGroup* groups, int count, int processors) {
  return for_each_launch(groups, count, processors, nullptr, [](const Plan&, Format) {});
}

const char* grouped_moment(const MomentGroup* groups, int count, int processors, void* workspace, void* stream) {
  for (int g = 0; g < count; ++g)
    if (groups[g].args.source.dtype == Dtype::float64 || groups[g].args.target.dtype == Dtype::float64)
      return "float64 tokens run on the plain kernels, not on tensor cores";
  const char* error = nullptr;
  for_each_launch(groups, count, processors, workspace, [&](const Plan& plan, Format format) {
    if (error) return;
    error = format == Format::bfloat16  ? run<bfloat16>(plan, stream)
            : format == Format::float16 ? run<float16>(plan, stream)
                                        : run<float>(plan, stream);
  });
  return error;
}

}  // namespace theseus::cuda
