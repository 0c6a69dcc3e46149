// Checks of the tensors that describe spaces. What a user can trip is checked in ops.py, with values and the cure.
#include "spaces.h"

#include <algorithm>
#include <utility>

#include <torch/csrc/stable/library.h>

namespace theseus {
namespace {

using torch::headeronly::ScalarType;

const int64_t kNoEntries = 0;  // stands for the storage of an empty column, whose pointer is null: still a mixing

Dtype dtype_of(const char* op, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Dtype::float32;
    case ScalarType::Double: return Dtype::float64;
    case ScalarType::BFloat16: return Dtype::bfloat16;
    case ScalarType::Half: return Dtype::float16;
    default: STD_TORCH_CHECK(false, op, ": tokens must be float64, float32, bfloat16 or float16");
  }
}

void check_device(const char* op, const Tensor& tensor, const Tensor& source, const char* name) {
  STD_TORCH_CHECK(tensor.is_cuda() == source.is_cuda() && tensor.get_device_index() == source.get_device_index(), op,
                  ": ", name, " is on another device than source");
}

double* master(const char* op, const Tensor& tensor, int64_t numel, const Tensor& source, const char* name) {
  check_device(op, tensor, source, name);
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Double && tensor.is_contiguous() && tensor.numel() == numel, op,
                  ": ", name, " must be contiguous float64 with ", numel, " elements");
  return tensor.mutable_data_ptr<double>();
}

template <class T>
const T* entries(const char* op, const Optional& tensor, ScalarType dtype, const Tensor& source, const char* name) {
  if (!tensor) return nullptr;
  check_device(op, *tensor, source, name);
  STD_TORCH_CHECK(tensor->dim() == 1 && tensor->scalar_type() == dtype && tensor->is_contiguous(), op, ": ", name,
                  " must be a contiguous vector of int64 (weight: float64)");
  return tensor->const_data_ptr<T>();
}

// Without masters and with the width of all heads. `first`: the tensor on whose device all must be.
Side side_of(const char* op, const Rows& rows, const Tensor& first) {
  const auto& [row_ptr, column, weight] = rows.mixing;
  const Tensor& tokens = rows.tokens;
  check_device(op, tokens, first, rows.name);
  STD_TORCH_CHECK(tokens.dim() == 2 && (tokens.stride(1) == 1 || tokens.size(1) <= 1), op,
                  ": tokens must be [tokens, width] with unit column stride");
  if (const Tensor* less = rows.less) {
    check_device(op, *less, first, "what is subtracted");
    STD_TORCH_CHECK(less->dim() == 2 && less->size(0) == tokens.size(0) && less->size(1) == tokens.size(1) &&
                        less->stride(0) == tokens.stride(0) && (less->stride(1) == 1 || less->size(1) <= 1) &&
                        less->scalar_type() == tokens.scalar_type(),
                    op, ": what is subtracted must have the tokens' shape, strides and dtype");
  }
  STD_TORCH_CHECK(column || (!row_ptr && !weight), op, ": a row mixing needs column");
  const int64_t count = column ? column->numel() : 0;
  STD_TORCH_CHECK(!row_ptr || row_ptr->numel() > 0, op, ": row_ptr needs at least one element");
  STD_TORCH_CHECK(!weight || weight->numel() == count, op, ": weight needs ", count, " elements");
  Side side{};
  side.tokens = tokens.const_data_ptr();
  side.less = rows.less ? rows.less->const_data_ptr() : nullptr;
  side.dtype = dtype_of(op, tokens);
  side.token_count = tokens.size(0), side.width = tokens.size(1), side.stride = tokens.stride(0);
  side.row_ptr = entries<int64_t>(op, row_ptr, ScalarType::Long, first, "row_ptr");
  side.column = entries<int64_t>(op, column, ScalarType::Long, first, "column");
  if (column && count == 0) side.column = &kNoEntries;
  side.weight = entries<double>(op, weight, ScalarType::Double, first, "weight");
  side.entries = count;
  return side;
}

int64_t row_count(const Side& side, const Optional& row_ptr) {
  return row_ptr ? row_ptr->numel() - 1 : side.column ? side.entries : side.token_count;
}

// Two spaces that add into one master would race on a GPU.
void check_apart(const char* op, std::vector<std::pair<const double*, int64_t>> masters) {
  std::sort(masters.begin(), masters.end());
  for (size_t i = 1; i < masters.size(); ++i)
    STD_TORCH_CHECK(masters[i - 1].first + masters[i - 1].second <= masters[i].first, op,
                    ": two masters share memory; give every space its own");
}

}  // namespace

std::vector<MomentGroup> describe(const char* op, const Spaces& spaces) {
  std::vector<std::pair<const double*, int64_t>> masters;
  std::vector<MomentGroup> groups;
  for (const Space& space : spaces) {
    const Tensor& first = spaces[0].source.tokens;
    MomentGroup& group = groups.emplace_back();
    CrossMomentArgs& args = group.args;
    args.source = side_of(op, space.source, first);
    args.target = side_of(op, space.target, first);
    args.rows = row_count(args.source, space.source.mixing.row_ptr);
    const int64_t target_rows = row_count(args.target, space.target.mixing.row_ptr);
    STD_TORCH_CHECK(args.rows == target_rows, op, ": one side has ", args.rows, " rows but the other has ",
                    target_rows);

    const int64_t heads = group.heads = space.cross.dim() == 3 ? space.cross.size(0) : 1;
    const int64_t widths[2] = {args.source.width, args.target.width};
    const auto take = [&](const Tensor& tensor, int64_t numel, const char* name) {
      double* data = master(op, tensor, numel, first, name);
      if (numel) masters.emplace_back(data, numel);
      return data;
    };
    STD_TORCH_CHECK(heads > 0 && widths[0] % heads == 0 && widths[1] % heads == 0, op, ": ", heads,
                    " heads do not divide the widths ", widths[0], " and ", widths[1]);
    args.source.width /= heads, args.target.width /= heads;
    args.cross = take(space.cross, heads * args.source.width * args.target.width, "cross");
    args.source.sum = take(space.source_sum, widths[0], "source_sum");
    args.target.sum = take(space.target_sum, widths[1], "target_sum");
    args.source.energy = take(space.source_energy, widths[0], "source_energy");
    args.target.energy = take(space.target_energy, widths[1], "target_energy");
  }
  check_apart(op, std::move(masters));
  return groups;
}

}  // namespace theseus
