// The plain kernels: FMA in float32 or float64, any dtype. Oracle of the tensor-core kernels and what float64 tokens
// run on. Every output has one owning block and a fixed order, no atomics.
#include "primitives.cuh"
#include "rows.cuh"

namespace theseus::cuda {
namespace {

constexpr int kLanes = 32;  // prepare: a block owns 32 columns, its 16 warps share the rows
constexpr int kWarps = 16;
constexpr int kTile = 64;  // product: a block owns 64 x 64 outputs, a thread 4 x 4
constexpr int kThreads = 256;
constexpr int kEach = 4;
constexpr int kDepth = 16;        // rows staged in shared memory at a time
constexpr int64_t kFlush = 1024;  // rows a register accumulates before it is added into the float64 master

constexpr int kPrepareShared = 2 * kWarps * kLanes * static_cast<int>(sizeof(double));

// out [rows, width] = rows [begin, begin + rows) of X, unless null; sum and energy += theirs.
template <class T>
THESEUS_KERNEL(kWarps* kLanes, 2)
prepare_kernel(const THESEUS_GRID_CONSTANT Side side, int64_t begin, int64_t rows, T* out) {
  double* sums = shared<double>(0, kWarps * kLanes);  // [warp][lane]
  double* energies = shared<double>(kPrepareShared / 2, kWarps * kLanes);
  const int lane = thread_index() % kLanes, warp = thread_index() / kLanes;
  const int64_t column = static_cast<int64_t>(block_index()) * kLanes + lane;
  double sum = 0, energy = 0;
  if (column < side.width) {
    for (int64_t row = warp; row < rows; row += kWarps) {
      double value[1];
      mix<true>(side, begin + row, column, 1, value);
      if (out) out[row * side.width + column] = static_cast<T>(value[0]);
      sum += value[0];
      energy = multiply_add(value[0], value[0], energy);
    }
  }
  sums[warp * kLanes + lane] = sum;
  energies[warp * kLanes + lane] = energy;
  sync_block();
  if (warp == 0 && column < side.width) {
    for (int other = 1; other < kWarps; ++other) {
      sum += sums[other * kLanes + lane];
      energy += energies[other * kLanes + lane];
    }
    side.sum[column] += sum;
    side.energy[column] += energy;
  }
}

// Copies rows [begin, begin + kDepth) of the tile's columns; zero beyond either edge.
template <class T>
THESEUS_DEVICE void stage(const T* x, int64_t begin, int64_t rows, int64_t first, int64_t width, T* tile) {
  for (int i = thread_index(); i < kDepth * kTile; i += kThreads) {
    const int64_t row = begin + i / kTile, column = first + i % kTile;
    tile[i] = row < rows && column < width ? x[row * width + column] : T(0);
  }
}

template <class T>
constexpr int kProductShared = 2 * kDepth * kTile * static_cast<int>(sizeof(T));

// cross [width_x, width_y] += x^T y, x [rows, width_x], y [rows, width_y]
template <class T>
THESEUS_KERNEL(kThreads, 2)
product_kernel(const T* x, int64_t width_x, const T* y, int64_t width_y, int64_t rows, double* cross) {
  T* tile_x = shared<T>(0, kDepth * kTile);
  T* tile_y = shared<T>(kProductShared<T> / 2, kDepth * kTile);
  const int64_t tiles_y = (width_y + kTile - 1) / kTile;
  const int64_t first_x = block_index() / tiles_y * kTile, first_y = block_index() % tiles_y * kTile;
  constexpr int kAcross = kTile / kEach;  // threads along one side of the tile; thread t owns columns t, t + 16, ...
  const int thread_x = thread_index() / kAcross, thread_y = thread_index() % kAcross;
  for (int64_t flush = 0; flush < rows; flush += kFlush) {
    T sum[kEach][kEach] = {};
    const int64_t end = flush + kFlush < rows ? flush + kFlush : rows;
    for (int64_t begin = flush; begin < end; begin += kDepth) {
      stage(x, begin, end, first_x, width_x, tile_x);
      stage(y, begin, end, first_y, width_y, tile_y);
      sync_block();
      for (int k = 0; k < kDepth; ++k)
        for (int i = 0; i < kEach; ++i)
          for (int j = 0; j < kEach; ++j)
            sum[i][j] += tile_x[k * kTile + thread_x + i * kAcross] * tile_y[k * kTile + thread_y + j * kAcross];
      sync_block();
    }
    for (int i = 0; i < kEach; ++i)
      for (int j = 0; j < kEach; ++j) {
        const int64_t row = first_x + thread_x + i * kAcross, column = first_y + thread_y + j * kAcross;
        if (row < width_x && column < width_y) cross[row * width_y + column] += sum[i][j];
      }
  }
}

// master[i] += product[i]; a thread takes every kThreads-th of its block's kThreads * kAdds.
constexpr int kAdds = 4;
THESEUS_KERNEL(kThreads, 4) add_kernel(const float* product, double* master, int64_t count) {
  const int64_t first = static_cast<int64_t>(block_index()) * kThreads * kAdds + thread_index();
  THESEUS_UNROLL
  for (int j = 0; j < kAdds; ++j) {
    const int64_t i = first + j * kThreads;
    if (i < count) master[i] += product[i];
  }
}

template <class T>
const char* launch_plain(const CrossMomentArgs& args, T* source_chunk, T* target_chunk, void* stream) {
  const Side &source = args.source, &target = args.target;
  const auto blocks = [](int64_t width, int64_t per_block) { return (width + per_block - 1) / per_block; };
  for (int64_t begin = 0; begin < args.rows; begin += kChunk) {
    const int64_t rows = kChunk < args.rows - begin ? kChunk : args.rows - begin;
    const T* x = source_chunk ? source_chunk : static_cast<const T*>(source.tokens) + begin * source.width;
    const T* y = target_chunk ? target_chunk : static_cast<const T*>(target.tokens) + begin * target.width;
    const auto prepare_side = [&](const Side& side, T* chunk) {
      return launch(prepare_kernel<T>, blocks(side.width, kLanes), kWarps * kLanes, kPrepareShared, stream, side, begin,
                    rows, chunk);
    };
    if (const char* error = prepare_side(source, source_chunk)) return error;
    if (const char* error = prepare_side(target, target_chunk)) return error;
    if (const char* error =
            launch(product_kernel<T>, blocks(source.width, kTile) * blocks(target.width, kTile), kThreads,
                   kProductShared<T>, stream, x, source.width, y, target.width, rows, args.cross))
      return error;
  }
  return nullptr;
}

}  // namespace

const char* make_rows(const Side& side, int64_t begin, int64_t rows, float* out, void* stream) {
  return launch(prepare_kernel<float>, (side.width + kLanes - 1) / kLanes, kWarps * kLanes, kPrepareShared, stream,
                side, begin, rows, out);
}

const char* add(const float* product, double* master, int64_t count, void* stream) {
  constexpr int kBlock = kThreads * kAdds;
  return launch(add_kernel, (count + kBlock - 1) / kBlock, kThreads, 0, stream, product, master, count);
}

const char* cross_moment(const CrossMomentArgs& args, bool in_float64, void* source_chunk, void* target_chunk,
                         void* stream) {
  return in_float64 ? launch_plain(args, static_cast<double*>(source_chunk), static_cast<double*>(target_chunk), stream)
                    : launch_plain(args, static_cast<float*>(source_chunk), static_cast<float*>(target_chunk), stream);
}

}  // namespace theseus::cuda
