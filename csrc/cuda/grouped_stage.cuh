// The stages of the tensor-core cross-moments: shared memory, and how tokens get there.
#pragma once

#include "grouped_plan.h"
#include "primitives.cuh"
#include "rows.cuh"

namespace theseus::cuda {

constexpr int kMomentThreads = 256;

// R: the type of the tokens in shared memory.
template <class R>
struct Shape {
  static constexpr bool kSplit = sizeof(R) == 4;
  static constexpr int kParts = kSplit ? 3 : 1;    // bfloat16 parts a value is the exact sum of
  static constexpr int kDepth = kSplit ? 16 : 32;  // rows per stage
  static constexpr int kStages = kSplit ? 3 : 4;   // stages in flight
  // Rows accumulated before they are added to the second accumulator. Tensor cores cut every sum toward zero (Fasi,
  // Higham, Mikaitis and Pranesh 2021): up to a last place of float32 every eight rows, and all in one direction. So
  // bfloat16 and float16 stay there for 128 rows; of float32 every 16 start from zero and are added outside, rounded.
  static constexpr int kFlush = kSplit ? 1024 : 128;
  static constexpr int kPerVector = 16 / sizeof(R);                   // elements of 16 bytes
  static constexpr int kVectors = kPanel / kPerVector;                // 16-byte vectors of a row
  static constexpr int kPasses = kDepth * kVectors / kMomentThreads;  // vectors of a side that a thread moves per stage
  static constexpr int kStageBytes = kDepth * kPanel * static_cast<int>(sizeof(R));
  static constexpr int kPartBytes = kDepth * kPanel * 2;
  static constexpr int kRawBytes = kStages * 2 * kStageBytes;
  static constexpr int kSharedBytes = kRawBytes + (kSplit ? 2 * 2 * kParts * kPartBytes : 0);
};

template <class R>
struct Multiplied {
  using type = R;
};
template <>
struct Multiplied<float> {
  using type = bfloat16;
};

// Index of 16-byte vector v of a row: turned within groups of eight, so that eight rows of one column lie in different
// banks.
THESEUS_DEVICE int turned(int row, int v, int vectors) { return row * vectors + (v ^ (row & 7)); }

template <class R>
THESEUS_DEVICE R* raw(int stage, int side) {
  using S = Shape<R>;
  return shared<R>((stage % S::kStages * 2 + side) * S::kStageBytes, S::kDepth * kPanel);
}

// What the tensor cores read of a stage: the tokens themselves, or their parts, one after the other.
template <class R>
THESEUS_DEVICE typename Multiplied<R>::type* operand(int stage, int side) {
  using S = Shape<R>;
  using M = typename Multiplied<R>::type;
  constexpr int kEach = S::kParts * S::kPartBytes;
  return S::kSplit ? shared<M>(S::kRawBytes + (stage % 2 * 2 + side) * kEach, kEach / 2)
                   : shared<M>((stage % S::kStages * 2 + side) * S::kStageBytes, S::kDepth * kPanel);
}

// One side of a block's outputs: `columns` <= kPanel columns from `first` of the tokens, rows [.., end). Counted in
// int: 64 bits would take registers that the accumulators need.
struct Panel {
  const Side& side;
  bool direct;
  int first, end, columns;
};

template <class R>
THESEUS_DEVICE Vector mixed(const Panel& panel, int row, int column, int valid) {
  Vector out = {};
  if (row >= panel.end) return out;
  if constexpr (Shape<R>::kSplit) {
    double value[4];
    mix<false>(panel.side, row, column, valid, value);
    THESEUS_UNROLL
    for (int i = 0; i < 4; ++i) out.word[i] = bits_of(static_cast<float>(value[i]));
  } else {
    const int64_t token = token_of(panel.side, row, panel.end);
    const R* from = static_cast<const R*>(panel.side.tokens) + token * panel.side.stride + column;
    THESEUS_UNROLL
    for (int i = 0; i < 8; ++i) {
      const uint32_t bits = i >= valid ? 0 : token < 0 ? 0xffff : from[i].bits;
      out.word[i / 2] |= bits << 16 * (i % 2);
    }
  }
  return out;
}

// The tokens of the rows this thread moves in the stage that begins at `row`. Asked for a stage early: a gather waits
// for memory twice.
template <class R>
THESEUS_DEVICE void look_up(const Panel& panel, int row, int (&token)[Shape<R>::kPasses]) {
  using S = Shape<R>;
  THESEUS_UNROLL
  for (int pass = 0; pass < S::kPasses; ++pass)
    if (panel.direct)
      token[pass] = static_cast<int>(
          token_of(panel.side, row + (thread_index() + pass * kMomentThreads) / S::kVectors, panel.end));
}

// Starts moving the stage that begins at `row` to `to` [kDepth, kPanel].
template <class R>
THESEUS_DEVICE void fill(const Panel& panel, int row, const int (&token)[Shape<R>::kPasses], R* to) {
  using S = Shape<R>;
  THESEUS_UNROLL
  for (int pass = 0; pass < S::kPasses; ++pass) {
    const int index = thread_index() + pass * kMomentThreads, r = index / S::kVectors, v = index % S::kVectors;
    R* vector = to + turned(r, v, S::kVectors) * S::kPerVector;
    const int rest = panel.columns - v * S::kPerVector;
    const int valid = rest < 0 ? 0 : rest < S::kPerVector ? rest : S::kPerVector;
    const int column = panel.first + v * S::kPerVector;
    if (!panel.direct) {
      store_vector(vector, mixed<R>(panel, row + r, column, valid));
    } else if (token[pass] < 0) {
      const uint32_t word = token[pass] == kInvalidToken ? ~0u : 0;  // NaN
      store_vector(vector, {{word, word, word, word}});
    } else {
      const R* from = static_cast<const R*>(panel.side.tokens) + (valid ? token[pass] * panel.side.stride + column : 0);
      copy_async(vector, from, valid * static_cast<int>(sizeof(R)));
    }
  }
}

// x = high + middle + low exactly: a float32 has 24 bits, a bfloat16 8. Rounded, so that middle <= 2^-9 x and low <=
// 2^-18 x; cut where x would round to Inf (above 3.38e38). NaN stays NaN in the last part, and Inf becomes NaN there.
THESEUS_DEVICE void split(float x, uint32_t (&part)[3]) {
  const uint32_t rounded = bits_of(x) + 0x8000;
  part[0] = ((rounded & 0x7f800000) == 0x7f800000 ? bits_of(x) : rounded) >> 16;
  const float rest = x - float_of(part[0] << 16);
  part[1] = (bits_of(rest) + 0x8000) >> 16;
  part[2] = bits_of(rest - float_of(part[1] << 16)) >> 16;
}

// Writes the parts of a stage where the tensor cores read them.
THESEUS_DEVICE void split_stage(int stage) {
  using S = Shape<float>;
  constexpr int kVectors = kPanel / 8;  // of bfloat16
  static_assert(kMomentThreads == S::kDepth * kVectors, "a thread splits eight values of a side");
  const int row = thread_index() / kVectors, v = thread_index() % kVectors;
  THESEUS_UNROLL
  for (int side = 0; side < 2; ++side) {
    const float* from = raw<float>(stage, side);
    bfloat16* to = operand<float>(stage, side);
    // Of eight neighbours four read their second vector first: together they then touch every bank once.
    const int late = v / 4 % 2;
    const Vector one = load_vector(from + turned(row, 2 * v + late, S::kVectors) * 4),
                 other = load_vector(from + turned(row, 2 * v + 1 - late, S::kVectors) * 4);
    Vector out[3] = {};
    THESEUS_UNROLL
    for (int j = 0; j < 8; ++j) {
      uint32_t part[3];
      split(float_of(late == j / 4 ? one.word[j % 4] : other.word[j % 4]), part);
      THESEUS_UNROLL
      for (int p = 0; p < 3; ++p) out[p].word[j / 2] |= part[p] << 16 * (j % 2);
    }
    THESEUS_UNROLL
    for (int p = 0; p < 3; ++p) store_vector(to + p * S::kDepth * kPanel + turned(row, v, kVectors) * 8, out[p]);
  }
}

}  // namespace theseus::cuda
