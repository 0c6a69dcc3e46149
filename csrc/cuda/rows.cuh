// Rows of X = P x as kernels read them: any dtype, any mixing.
#pragma once

#include "../cross_moment.h"
#include "primitives.cuh"

namespace theseus::cuda {

THESEUS_DEVICE double load(const void* tokens, Dtype dtype, int64_t i) {
  switch (dtype) {
    case Dtype::float64: return static_cast<const double*>(tokens)[i];
    case Dtype::bfloat16: return to_float(static_cast<const bfloat16*>(tokens)[i]);
    case Dtype::float16: return to_float(static_cast<const float16*>(tokens)[i]);
    default: return static_cast<const float*>(tokens)[i];
  }
}

constexpr int64_t kNoToken = -1, kInvalidToken = -2;

// The token a row is, where every row is one token; kNoToken beyond the last row, kInvalidToken for an entry out of
// range.
THESEUS_DEVICE int64_t token_of(const Side& side, int64_t row, int64_t rows) {
  if (row >= rows) return kNoToken;
  if (!side.column) return row;
  const int64_t token = side.column[row];
  return token < 0 || token >= side.token_count ? kInvalidToken : token;
}

// mixed[j] = X[row, column + j] = sum over the row's entries of weight * x[token, column + j], j < valid <= count; zero
// behind; with `subtracting` of x - less where the side has a less. An entry out of range makes the row NaN: the host
// cannot look at it without waiting.
template <bool subtracting, int count>
THESEUS_DEVICE void mix(const Side& side, int64_t row, int64_t column, int valid, double (&mixed)[count]) {
  THESEUS_UNROLL
  for (int j = 0; j < count; ++j) mixed[j] = 0;
  const int64_t from = side.row_ptr ? side.row_ptr[row] : row, to = side.row_ptr ? side.row_ptr[row + 1] : row + 1;
  bool usable = !side.column || (from >= 0 && to >= from && to <= side.entries);
  for (int64_t entry = from; usable && entry < to; ++entry) {
    const int64_t token = side.column ? side.column[entry] : row;
    usable = token >= 0 && token < side.token_count;
    if (!usable) break;
    const double weight = side.weight ? side.weight[entry] : 1;
    THESEUS_UNROLL
    for (int j = 0; j < count; ++j)
      if (j < valid) {
        const int64_t at = token * side.stride + column + j;
        double value = load(side.tokens, side.dtype, at);
        if (subtracting && side.less) value -= load(side.less, side.dtype, at);
        mixed[j] = multiply_add(weight, value, mixed[j]);
      }
  }
  THESEUS_UNROLL
  for (int j = 0; j < count; ++j)
    if (!usable) mixed[j] = not_a_number();
}

}  // namespace theseus::cuda
