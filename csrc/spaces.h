// What the tensors of cross_moment_ and cross_moments_ say, checked, as the kernels take it.
#pragma once

#include <optional>
#include <vector>

#include <torch/csrc/stable/tensor.h>

#include "alignment.h"
#include "cross_moment.h"

namespace theseus {

using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using Optional = std::optional<Tensor>;

struct Mixing {
  const Optional &row_ptr, &column, &weight;
};

// Space i is source[i] and target[i] with the masters of that index; a mixing is every space's.
struct Spaces {
  const char* op;  // for messages
  const Tensors &source, &target;
  Mixing source_mixing, target_mixing;
  const Tensors &cross, &source_sum, &target_sum, &source_energy, &target_energy;
};

// One group per space: shapes, dtypes, strides and devices are checked, entries of the mixings are not.
std::vector<MomentGroup> describe(const Spaces& spaces);

// The tokens are the rows, in the compute type, where BLAS may read them.
inline bool usable_in_place(const Side& side, Dtype compute) {
  return !side.column && side.dtype == compute && side.stride == side.width && is_aligned(side.tokens);
}

}  // namespace theseus
