// A warp's share of a tile of outputs: multiplied, accumulated, added to the masters.
#pragma once

#include "grouped_stage.cuh"

namespace theseus::cuda {

constexpr int kWarpSource = 64, kWarpTarget = 32;                               // outputs of a warp; 2 x 4 warps
constexpr int kTilesSource = kWarpSource / 16, kTilesTarget = kWarpTarget / 8;  // mma tiles of a warp

using Accumulator = float[kTilesSource][kTilesTarget][4];

// to += from, from = 0; of a row of mma tiles
THESEUS_DEVICE void move(float (&from)[kTilesTarget][4], float (&to)[kTilesTarget][4]) {
  THESEUS_UNROLL
  for (int j = 0; j < kTilesTarget; ++j) {
    THESEUS_UNROLL
    for (int e = 0; e < 4; ++e) to[j][e] += from[j][e], from[j][e] = 0;
  }
}
THESEUS_DEVICE void move(Accumulator& from, Accumulator& to) {
  THESEUS_UNROLL
  for (int i = 0; i < kTilesSource; ++i) move(from[i], to[i]);
}

// sum += x^T y over a stage, for the warp's outputs from (source, target) on. Of the nine products of parts the three
// smallest are left out: together at most 2^-26 of x y, below the rounding of float32. High times high comes last,
// and of float32 the 16 rows are summed from zero: what tensor cores cut is cut of that, never of the long sum.
template <class R>
THESEUS_DEVICE void multiply(int stage, int source, int target, Accumulator& sum) {
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
      float step[kTilesTarget][4] = {};
      float (&into)[kTilesTarget][4] = S::kSplit ? step : sum[i];
      THESEUS_UNROLL
      for (int p = S::kParts - 1; p >= 0; --p) {
        uint32_t a[4];
        load_matrices(at(x + p * S::kDepth * kPanel, k + row + 8 * second, source + 16 * i + 8 * first), a);
        THESEUS_UNROLL
        for (int q = S::kParts - 1 - p; q >= 0; --q) {
          THESEUS_UNROLL
          for (int j = 0; j < kTilesTarget; ++j) mma<M>(into[j], a, b[q][j]);
        }
      }
      if constexpr (S::kSplit) move(step, sum[i]);
    }
  }
}

// The share in global memory: its first output, elements from row to row, and how many rows and columns of it exist.
template <class T>
struct Share {
  T* first;
  int64_t stride;
  int rows, columns;
};

// Calls visit(row, column, j, upper) for the pairs of outputs that this thread holds in row i of the warp's mma tiles:
// elements 2 upper and 2 upper + 1 of tile j are (row, column) and (row, column + 1) of the share.
template <class Visit>
THESEUS_DEVICE void for_each_pair(int i, Visit visit) {
  const int lane = thread_index() % kWarp;
  THESEUS_UNROLL
  for (int upper = 0; upper < 2; ++upper) {
    THESEUS_UNROLL
    for (int j = 0; j < kTilesTarget; ++j) visit(16 * i + 8 * upper + lane / 4, 8 * j + lane % 4 * 2, j, upper);
  }
}

// share += total. All loads of 16 outputs before their first store, so that they wait for memory together. kWhole: the
// share is whole and its pairs of columns are aligned.
template <bool kWhole>
THESEUS_DEVICE void add_to(const Share<double>& share, const Accumulator& total) {
  THESEUS_UNROLL
  for (int i = 0; i < kTilesSource; ++i) {
    double sum[kTilesTarget][2][2];
    for_each_pair(i, [&](int row, int column, int j, int upper) {
      const double* from = share.first + row * share.stride + column;
      if constexpr (kWhole) {
        load_pair(from, sum[j][upper]);
      } else {
        THESEUS_UNROLL
        for (int e = 0; e < 2; ++e) sum[j][upper][e] = row < share.rows && column + e < share.columns ? from[e] : 0;
      }
    });
    for_each_pair(i, [&](int row, int column, int j, int upper) {
      double* to = share.first + row * share.stride + column;
      THESEUS_UNROLL
      for (int e = 0; e < 2; ++e) {
        sum[j][upper][e] += total[i][j][2 * upper + e];
        if (!kWhole && row < share.rows && column + e < share.columns) to[e] = sum[j][upper][e];
      }
      if constexpr (kWhole) store_pair(to, sum[j][upper]);
    });
  }
}

// share = total
THESEUS_DEVICE void put_into(const Share<float>& share, const Accumulator& total) {
  THESEUS_UNROLL
  for (int i = 0; i < kTilesSource; ++i)
    for_each_pair(i, [&](int row, int column, int j, int upper) {
      THESEUS_UNROLL
      for (int e = 0; e < 2; ++e)
        if (row < share.rows && column + e < share.columns)
          share.first[row * share.stride + column + e] = total[i][j][2 * upper + e];
    });
}

}  // namespace theseus::cuda
