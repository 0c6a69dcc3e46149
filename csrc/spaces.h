// What the tensors of the moment ops say, checked, as the kernels take it.
#pragma once

#include <optional>
#include <vector>

#include <torch/csrc/stable/tensor.h>

#include "alignment.h"
#include "cross_moment.h"

namespace theseus {

using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

struct Mixing {
  const Optional &row_ptr, &column, &weight;
};

// X = P tokens, or P (tokens - less).
struct Rows {
  const char* name;  // for messages: whose tokens
  const Tensor& tokens;
  Mixing mixing;
  const Tensor* less = nullptr;
};

// Two sides and the masters their moments are added into.
struct Space {
  Rows source, target;
  const Tensor &cross, &source_sum, &target_sum, &source_energy, &target_energy;
};
using Spaces = std::vector<Space>;

// One group per space: shapes, dtypes, strides and devices are checked, entries of the mixings are not. `op`: for
// messages.
std::vector<MomentGroup> describe(const char* op, const Spaces& spaces);

// The tokens are the rows, in the compute type, where BLAS may read them.
inline bool usable_in_place(const Side& side, Dtype compute) {
  return !side.column && !side.less && side.dtype == compute && side.stride == side.width && is_aligned(side.tokens);
}

}  // namespace theseus
