// One small kernel per primitive. Compiled for the twin here and by nvcc, so that a GPU can be compared with the twin
// one day.
#pragma once

#include "primitives.cuh"

namespace theseus::cuda {

// out[block * threads + i] = block * threads + threads - 1 - i, through shared memory; then rotated by one, in the same
// memory.
inline constexpr int kRotateThreads = 96;
THESEUS_KERNEL(kRotateThreads) rotate_kernel(int* out) {
  int* values = shared<int>(16, kRotateThreads);
  const int i = thread_index(), n = thread_count();
  values[n - 1 - i] = block_index() * n + i;
  sync_block();
  const int reversed = values[i];
  sync_block();
  values[(i + 1) % n] = reversed;
  sync_block();
  out[block_index() * n + i] = values[i];
}

// Sums within warps by shuffles: out[i] = sum over the warp of in; far[i] = in of lane ^ 5.
template <class T>
THESEUS_KERNEL(64)
shuffle_kernel(const T* in, T* out, T* far) {
  T sum = in[thread_index()];
  far[thread_index()] = shuffle(sum, 5);
  for (int mask = 16; mask > 0; mask /= 2) sum += shuffle(sum, mask);
  out[thread_index()] = sum;
}

// out[i] = in[i ^ 1], through shared memory of the warp.
THESEUS_KERNEL(64) sync_warp_kernel(const int* in, int* out) {
  int* values = shared<int>(0, 64);
  for (int round = 0; round < 3; ++round) {
    values[thread_index()] = in[thread_index()] + round;
    sync_warp();
    out[thread_index()] = values[thread_index() ^ 1] - round;
    sync_warp();
  }
}

// in: 32 rows of 8 elements of 16 bits; out: four words per lane.
THESEUS_KERNEL(32) load_matrices_kernel(const uint16_t* in, uint32_t* out) {
  uint16_t* rows = shared<uint16_t>(0, 32 * 8);
  const int lane = thread_index();
  store_vector(rows + 8 * lane, load_vector(in + 8 * lane));
  sync_block();
  uint32_t four[4];
  load_matrices(rows + 8 * lane, four);
  for (int i = 0; i < 4; ++i) out[4 * lane + i] = four[i];
}

// c [16, 8] += a [16, 16] b [16, 8], fragments filled element by element from the layout that the primitive states.
template <class T>
THESEUS_KERNEL(32)
mma_kernel(const T* a, const T* b, float* c) {
  const int g = thread_index() / 4, t = thread_index() % 4 * 2;
  const auto pair = [](T low, T high) { return low.bits | static_cast<uint32_t>(high.bits) << 16; };
  uint32_t fragment_a[4], fragment_b[2];
  for (int i = 0; i < 4; ++i) {
    const T* at = a + (g + i % 2 * 8) * 16 + t + i / 2 * 8;
    fragment_a[i] = pair(at[0], at[1]);
  }
  for (int i = 0; i < 2; ++i) fragment_b[i] = pair(b[(t + 8 * i) * 8 + g], b[(t + 8 * i + 1) * 8 + g]);
  float sum[4];
  for (int i = 0; i < 4; ++i) sum[i] = c[(g + i / 2 * 8) * 8 + t + i % 2];
  mma<T>(sum, fragment_a, fragment_b);
  for (int i = 0; i < 4; ++i) c[(g + i / 2 * 8) * 8 + t + i % 2] = sum[i];
}

// out = in, pairs swapped, by 16-byte accesses; both of vectors and of two numbers. 32 vectors, 32 pairs.
THESEUS_KERNEL(32)
wide_access_kernel(const uint32_t* words, uint32_t* words_out, const double* pairs, double* pairs_out) {
  const int lane = thread_index();
  const Vector vector = load_vector(words + 4 * lane);
  store_vector(words_out + 4 * lane, {{vector.word[1], vector.word[0], vector.word[3], vector.word[2]}});
  double pair[2];
  load_pair(pairs + 2 * lane, pair);
  const double swapped[2] = {pair[1], pair[0]};
  store_pair(pairs_out + 2 * lane, swapped);
}

// Thread i moves vectors i, i + 32, ... of in through three places in shared memory, two copies ahead; the last vector
// has `last` bytes.
inline constexpr int kCopyStages = 3;
inline constexpr int kCopyShared = kCopyStages * 32 * 16;
THESEUS_KERNEL(32) copy_kernel(const unsigned char* in, int stages, int last, Vector* out) {
  Vector* place = shared<Vector>(0, kCopyStages * 32);
  const int lane = thread_index();
  const auto start = [&](int stage) {
    if (stage < stages) {
      const int bytes = stage == stages - 1 && lane == 31 ? last : 16;
      copy_async(place + stage % kCopyStages * 32 + lane, in + (stage * 32 + lane) * 16, bytes);
    }
    copy_commit();
  };
  for (int stage = 0; stage < kCopyStages - 1; ++stage) start(stage);
  for (int stage = 0; stage < stages; ++stage) {
    copy_wait<kCopyStages - 2>();
    sync_block();
    start(stage + kCopyStages - 1);
    store_vector(out + stage * 32 + lane, load_vector(place + stage % kCopyStages * 32 + (lane ^ 7)));
  }
  copy_wait<0>();
}

// out[i] = the 16-bit pattern i as float32; 4 blocks of 256 threads.
template <class T>
THESEUS_KERNEL(256)
widen_kernel(float* out) {
  for (int i = block_index() * thread_count() + thread_index(); i < 65536; i += 4 * thread_count())
    out[i] = to_float(T{static_cast<uint16_t>(i)});
}

// values = in as float32; out = values as bits.
THESEUS_KERNEL(32) bits_kernel(const uint32_t* in, float* values, uint32_t* out) {
  const int i = thread_index();
  values[i] = float_of(in[i]);
  out[i] = bits_of(float_of(in[i]));
}

// out[0..3] = sqrt(x), x y + z with one rounding, the exponent of x, x 2^3.
template <class T>
THESEUS_KERNEL(32)
arithmetic_kernel(const T* x, const T* y, const T* z, T* out) {
  const int i = thread_index();
  out[4 * i] = square_root(x[i]);
  out[4 * i + 1] = multiply_add(x[i], y[i], z[i]);
  out[4 * i + 2] = static_cast<T>(exponent_of(x[i]));
  out[4 * i + 3] = scale_by(x[i], 3);
}

}  // namespace theseus::cuda
