// What the kernels of the small SVD share: how a matrix lies in memory, a rotation, and who rotates whom.
#pragma once

#include "primitives.cuh"
#include "small_svd.h"

namespace theseus::cuda {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kMostPerLane = kLargestSvd / kWarp;

template <class T>
struct Limits;
template <>
struct Limits<float> {
  static constexpr float kEpsilon = 0x1p-23f;
  static constexpr float kNull = 0x1p-100f;  // squared norm, in a matrix of largest entry 1 to 2, that counts as zero
  static constexpr float kSteep = 0x1p14f;   // sqrt(1 + x^2) = x
};
template <>
struct Limits<double> {
  static constexpr double kEpsilon = 0x1p-52;
  static constexpr double kNull = 0x1p-900;
  static constexpr double kSteep = 0x1p28;
};

// The matrix as Jacobi wants it, rows >= columns: column j is `rows` elements of A, then, where vectors are wanted,
// `columns` of V.
struct Layout {
  bool transposed, vectors;
  int rows, columns, stride;  // of A as it is worked on; an odd stride puts neighbours of a row into different banks

  THESEUS_BOTH explicit Layout(const SmallSvdArgs& args)
      : transposed(args.rows < args.columns),
        vectors(args.u || args.vh || args.polar),
        rows(transposed ? args.columns : args.rows),
        columns(transposed ? args.rows : args.columns),
        stride((rows + (vectors ? columns : 0)) | 1) {}
  THESEUS_BOTH int elements() const { return columns * stride; }
};

constexpr int kFixedBytes = kLargestSvd * 8 + kLargestSvd * 4 + kWarps * 8;  // values, order, one number per warp

template <class T>
THESEUS_DEVICE T absolute(T x) {
  return x < 0 ? -x : x;
}

template <class T>
THESEUS_DEVICE T warp_sum(T value) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) value += shuffle(value, mask);
  return value;
}

// The largest of the block's values, NaN if one is; in all threads. `slots`: one number per warp; the caller meets a
// barrier before the next call.
template <class T>
THESEUS_DEVICE T block_max(T value, T* slots) {
  const auto larger = [](T x, T y) { return x >= y || x != x ? x : y; };
  for (int mask = kWarp / 2; mask > 0; mask /= 2) value = larger(value, shuffle(value, mask));
  if (thread_index() % kWarp == 0) slots[thread_index() / kWarp] = value;
  sync_block();
  T most = slots[0];
  for (int warp = 1; warp < kWarps; ++warp) most = larger(most, slots[warp]);
  return most;
}

// Makes columns p and q of A orthogonal and turns those of V, `turned` numbers, with them. Returns whether there was
// something to do.
template <class T>
THESEUS_DEVICE bool rotate(T* p, T* q, int rows, int turned, T tolerance) {
  const int lane = thread_index() % kWarp;
  T x[kMostPerLane] = {}, y[kMostPerLane] = {};
  T pp = 0, qq = 0, pq = 0;
  THESEUS_UNROLL
  for (int i = 0; i < kMostPerLane; ++i) {
    if (lane + i * kWarp < rows) x[i] = p[lane + i * kWarp], y[i] = q[lane + i * kWarp];
    pp = multiply_add(x[i], x[i], pp), qq = multiply_add(y[i], y[i], qq), pq = multiply_add(x[i], y[i], pq);
  }
  pp = warp_sum(pp), qq = warp_sum(qq), pq = warp_sum(pq);
  if (!(pp >= Limits<T>::kNull && qq >= Limits<T>::kNull)) return false;
  if (!(absolute(pq) > tolerance * square_root(pp) * square_root(qq))) return false;
  // t = tan of the angle that zeroes pq: t^2 + 2 z t - 1 = 0, the smaller root.
  const T z = (qq - pp) / (2 * pq), size = absolute(z);
  const T steep = size > Limits<T>::kSteep ? 2 * size : size + square_root(multiply_add(size, size, T(1)));
  const T t = (z < 0 ? T(-1) : T(1)) / steep;
  const T cosine = 1 / square_root(multiply_add(t, t, T(1))), sine = cosine * t;
  THESEUS_UNROLL
  for (int i = 0; i < kMostPerLane; ++i) {
    if (lane + i * kWarp >= rows) continue;
    p[lane + i * kWarp] = cosine * x[i] - sine * y[i];
    q[lane + i * kWarp] = sine * x[i] + cosine * y[i];
  }
  for (int i = rows + lane; i < rows + turned; i += kWarp) {
    const T v = p[i], w = q[i];
    p[i] = cosine * v - sine * w;
    q[i] = sine * v + cosine * w;
  }
  return true;
}

// Pair `pair` of round `round` of a tournament of `players`, an even number: each meets each once in players - 1
// rounds.
THESEUS_DEVICE void find_pair(int round, int pair, int players, int& p, int& q) {
  const int circle = players - 1;
  p = pair == 0 ? circle : (round + pair) % circle;
  q = (round - pair + circle) % circle;
}

}  // namespace theseus::cuda
