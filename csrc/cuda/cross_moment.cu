// The plain twin of the CPU path: every output has one owning block and a fixed order, no atomics.
#include "../cross_moment.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <type_traits>

namespace theseus::cuda {
namespace {

constexpr int kLanes = 32;      // prepare: a block owns 32 columns, its 32 warps share the rows
constexpr int kTile = 64;       // product: a block owns 64 x 64 outputs, a thread 4 x 4
constexpr int kThreads = 256;
constexpr int kEach = 4;
constexpr int kDepth = 16;      // rows staged in shared memory at a time
constexpr int64_t kFlush = 1024;  // rows a register accumulates before it is added into the float64 master

__device__ double load(const Side& side, int64_t token, int64_t column) {
  const int64_t i = token * side.stride + column;
  switch (side.dtype) {
    case Dtype::float64: return static_cast<const double*>(side.tokens)[i];
    case Dtype::bfloat16: return __bfloat162float(static_cast<const __nv_bfloat16*>(side.tokens)[i]);
    case Dtype::float16: return __half2float(static_cast<const __half*>(side.tokens)[i]);
    default: return static_cast<const float*>(side.tokens)[i];
  }
}

// X[row, column] = sum over the row's entries of weight * x[token, column]
__device__ double mix(const Side& side, int64_t row, int64_t column) {
  if (!side.column) return load(side, row, column);
  const int64_t from = side.row_ptr ? side.row_ptr[row] : row, to = side.row_ptr ? side.row_ptr[row + 1] : row + 1;
  const double invalid = __longlong_as_double(0x7ff8000000000000ll);
  if (from < 0 || to < from || to > side.entries) return invalid;
  double mixed = 0;
  for (int64_t entry = from; entry < to; ++entry) {
    const int64_t token = side.column[entry];
    if (token < 0 || token >= side.token_count) return invalid;
    const double value = load(side, token, column);
    mixed += side.weight ? side.weight[entry] * value : value;
  }
  return mixed;
}

template <class T>
__global__ void __launch_bounds__(kLanes * kLanes) prepare(Side side, int64_t begin, int64_t rows, T* out) {
  __shared__ double sums[kLanes][kLanes], energies[kLanes][kLanes];
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kLanes + lane;
  double sum = 0, energy = 0;
  if (column < side.width) {
    for (int64_t row = warp; row < rows; row += kLanes) {
      const double value = mix(side, begin + row, column);
      if (out) out[row * side.width + column] = static_cast<T>(value);
      sum += value;
      energy += value * value;
    }
  }
  sums[warp][lane] = sum;
  energies[warp][lane] = energy;
  __syncthreads();
  if (warp == 0 && column < side.width) {
    for (int other = 1; other < kLanes; ++other) {
      sum += sums[other][lane];
      energy += energies[other][lane];
    }
    side.sum[column] += sum;
    side.energy[column] += energy;
  }
}

// Copies rows [begin, begin + kDepth) of the tile's columns; zero beyond either edge.
template <class T>
__device__ void stage(const T* x, int64_t begin, int64_t rows, int64_t first, int64_t width, T (*tile)[kTile]) {
  for (int i = threadIdx.x; i < kDepth * kTile; i += kThreads) {
    const int64_t row = begin + i / kTile, column = first + i % kTile;
    tile[i / kTile][i % kTile] = row < rows && column < width ? x[row * width + column] : T(0);
  }
}

// cross [width_x, width_y] += x^T y, x [rows, width_x], y [rows, width_y]
template <class T>
__global__ void __launch_bounds__(kThreads)
    product(const T* x, int64_t width_x, const T* y, int64_t width_y, int64_t rows, double* cross) {
  __shared__ T tile_x[kDepth][kTile], tile_y[kDepth][kTile];
  const int64_t tiles_y = (width_y + kTile - 1) / kTile;
  const int64_t first_x = blockIdx.x / tiles_y * kTile, first_y = blockIdx.x % tiles_y * kTile;
  constexpr int kAcross = kTile / kEach;  // threads along one side of the tile; thread t owns columns t, t + 16, ...
  const int thread_x = threadIdx.x / kAcross, thread_y = threadIdx.x % kAcross;
  for (int64_t flush = 0; flush < rows; flush += kFlush) {
    T sum[kEach][kEach] = {};
    const int64_t end = flush + kFlush < rows ? flush + kFlush : rows;
    for (int64_t begin = flush; begin < end; begin += kDepth) {
      stage(x, begin, end, first_x, width_x, tile_x);
      stage(y, begin, end, first_y, width_y, tile_y);
      __syncthreads();
      for (int k = 0; k < kDepth; ++k)
        for (int i = 0; i < kEach; ++i)
          for (int j = 0; j < kEach; ++j)
            sum[i][j] += tile_x[k][thread_x + i * kAcross] * tile_y[k][thread_y + j * kAcross];
      __syncthreads();
    }
    for (int i = 0; i < kEach; ++i)
      for (int j = 0; j < kEach; ++j) {
        const int64_t row = first_x + thread_x + i * kAcross, column = first_y + thread_y + j * kAcross;
        if (row < width_x && column < width_y) cross[row * width_y + column] += sum[i][j];
      }
  }
}

template <class T>
void launch(const CrossMomentArgs& args, T* source_chunk, T* target_chunk, cudaStream_t stream) {
  const Side &source = args.source, &target = args.target;
  const auto blocks = [](int64_t width, int64_t per_block) { return static_cast<unsigned>((width + per_block - 1) / per_block); };
  for (int64_t begin = 0; begin < args.rows; begin += kChunk) {
    const int64_t rows = std::min(kChunk, args.rows - begin);
    const T* x = source_chunk ? source_chunk : static_cast<const T*>(source.tokens) + begin * source.width;
    const T* y = target_chunk ? target_chunk : static_cast<const T*>(target.tokens) + begin * target.width;
    if (source.width) prepare<<<blocks(source.width, kLanes), kLanes * kLanes, 0, stream>>>(source, begin, rows, source_chunk);
    if (target.width) prepare<<<blocks(target.width, kLanes), kLanes * kLanes, 0, stream>>>(target, begin, rows, target_chunk);
    if (source.width && target.width)
      product<<<blocks(source.width, kTile) * blocks(target.width, kTile), kThreads, 0, stream>>>(
          x, source.width, y, target.width, rows, args.cross);
  }
}

}  // namespace

const char* cross_moment(const CrossMomentArgs& args, bool in_float64, void* source_chunk, void* target_chunk, void* stream) {
  if (in_float64)
    launch(args, static_cast<double*>(source_chunk), static_cast<double*>(target_chunk), static_cast<cudaStream_t>(stream));
  else
    launch(args, static_cast<float*>(source_chunk), static_cast<float*>(target_chunk), static_cast<cudaStream_t>(stream));
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace theseus::cuda
