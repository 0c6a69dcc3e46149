// Every touch of the machine. Kernels use these and nothing else of CUDA. Under nvcc they are PTX and intrinsics,
// written here; under a host compiler they are their twins in tests/emulated/twin.h, where every CUDA thread is a
// fiber.
//
// Blocks are one-dimensional, a multiple of 32 threads. shuffle, load_matrices, mma and sync_warp take part with all 32
// lanes from one place in the code; all threads of a block meet at the same sync_block. Only sync_block and sync_warp
// order memory.
#pragma once

#include <cstddef>
#include <cstdint>

namespace theseus::cuda {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};
struct alignas(16) Vector {
  uint32_t word[4];
};  // 16 bytes: the widest load, and what one copy_async moves

constexpr int kWarp = 32;

enum class Fact { processors, shared_limit, major, minor };  // of a device: see device.h

}  // namespace theseus::cuda

#ifndef __CUDACC__
#include "twin.h"
#else

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstring>

#define THESEUS_DEVICE __device__ __forceinline__
#define THESEUS_BOTH __host__ __device__
#define THESEUS_KERNEL(...) __global__ void __launch_bounds__(__VA_ARGS__)  // threads; blocks that registers allow for
#define THESEUS_GRID_CONSTANT __grid_constant__  // a parameter read where it lies, however it is indexed
#define THESEUS_UNROLL _Pragma("unroll")

namespace theseus::cuda {

THESEUS_DEVICE int thread_index() { return threadIdx.x; }
THESEUS_DEVICE int thread_count() { return blockDim.x; }
THESEUS_DEVICE int block_index() { return blockIdx.x; }

THESEUS_DEVICE void sync_block() { __syncthreads(); }
THESEUS_DEVICE void sync_warp() { __syncwarp(); }

// `count` elements at byte `offset` of the block's shared memory.
template <class T>
THESEUS_DEVICE T* shared(int offset, int count) {
  extern __shared__ Vector theseus_shared[];
  static_cast<void>(count);
  return reinterpret_cast<T*>(reinterpret_cast<char*>(theseus_shared) + offset);
}

// The value of lane `lane ^ mask`.
template <class T>
THESEUS_DEVICE T shuffle(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// One 16-byte access.
THESEUS_DEVICE Vector load_vector(const void* from) { return *static_cast<const Vector*>(from); }
THESEUS_DEVICE void store_vector(void* to, const Vector& value) { *static_cast<Vector*>(to) = value; }
// Two numbers, by one 16-byte access.
THESEUS_DEVICE void load_pair(const double* from, double (&pair)[2]) {
  const double2 both = *reinterpret_cast<const double2*>(from);
  pair[0] = both.x, pair[1] = both.y;
}
THESEUS_DEVICE void store_pair(double* to, const double (&pair)[2]) {
  *reinterpret_cast<double2*>(to) = make_double2(pair[0], pair[1]);
}

// Starts copying `bytes` (0 to 16) from global memory to 16 bytes of shared memory, zeros after them; both aligned
// to 16.
THESEUS_DEVICE void copy_async(void* to, const void* from, int bytes) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
}
THESEUS_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `pending` of this thread's groups are under way. Others see the bytes after the next sync_block.
template <int pending>
THESEUS_DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// Four transposed 8x8 matrices of 16-bit elements. Lane 8 i + r names row r of matrix i (16 bytes, shared); out[i] of
// lane l holds rows 2 (l % 4) and 2 (l % 4) + 1 of column l / 4 of matrix i, the first in the low half.
THESEUS_DEVICE void load_matrices(const void* row, uint32_t (&out)[4]) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(address)
               : "memory");
}

// c += a b in float32: a 16x16, b 16x8, c 16x8. With g = lane / 4 and t = 2 (lane % 4), a pair of 16-bit elements per
// word: a[0], a[1]: rows g, g + 8, columns t, t + 1; a[2], a[3]: the same rows, columns t + 8, t + 9; b[0], b[1]: rows
// t, t + 1 and t + 8, t + 9 of column g; c[0], c[1]: row g, columns t, t + 1; c[2], c[3]: row g + 8. The sum is cut
// toward zero, not rounded (Fasi, Higham, Mikaitis and Pranesh 2021).
#define THESEUS_MMA(type)                                          \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type       \
      ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" \
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])             \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
template <class T>
THESEUS_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
THESEUS_DEVICE void mma<bfloat16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  THESEUS_MMA("bf16");
}
template <>
THESEUS_DEVICE void mma<float16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  THESEUS_MMA("f16");
}
#undef THESEUS_MMA

// These also on the host: the tests of the kernels run there, wherever the kernels do.
THESEUS_BOTH inline float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}
THESEUS_BOTH inline uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}
THESEUS_BOTH inline float to_float(float value) { return value; }
THESEUS_BOTH inline float to_float(bfloat16 value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }
THESEUS_BOTH inline float to_float(float16 value) {
  __half_raw raw;
  raw.x = value.bits;
  return __half2float(__half(raw));
}
THESEUS_DEVICE float square_root(float x) { return __fsqrt_rn(x); }
THESEUS_DEVICE double square_root(double x) { return __dsqrt_rn(x); }
THESEUS_DEVICE float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
THESEUS_DEVICE double multiply_add(double a, double b, double c) { return __fma_rn(a, b, c); }
THESEUS_DEVICE int exponent_of(float x) {
  return ilogbf(x);
}  // of a finite x != 0: 2^exponent <= |x| < 2^(exponent + 1)
THESEUS_DEVICE int exponent_of(double x) { return ilogb(x); }
THESEUS_DEVICE float scale_by(float x, int exponent) { return ldexpf(x, exponent); }  // x 2^exponent
THESEUS_DEVICE double scale_by(double x, int exponent) { return ldexp(x, exponent); }
THESEUS_DEVICE double not_a_number() { return __longlong_as_double(0x7ff8000000000000ll); }

// value = a fact of GPU `device`. Returns null or CUDA's message.
inline const char* ask(Fact fact, int device, int& value) {
  constexpr cudaDeviceAttr attributes[] = {cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                                           cudaDevAttrComputeCapabilityMajor, cudaDevAttrComputeCapabilityMinor};
  const cudaError_t error = cudaDeviceGetAttribute(&value, attributes[static_cast<int>(fact)], device);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Enqueues kernel(arguments...). Returns null or CUDA's message.
template <class... P, class... A>
const char* launch(void (*kernel)(P...), int64_t blocks, int threads, int shared_bytes, void* stream,
                   const A&... arguments) {
  if (blocks == 0) return nullptr;
  cudaError_t error = cudaSuccess;
  if (shared_bytes > 48 * 1024)  // more than that a kernel has to ask for
    error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 shared_bytes);
  if (error == cudaSuccess) {
    // clang-format off
    kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
    // clang-format on
    error = cudaGetLastError();
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace theseus::cuda

#endif
