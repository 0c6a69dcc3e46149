// svd and svdvals on the host: the matrices of a batch are shared out over torch's threads, each through torch's own LAPACK.
#include <algorithm>
#include <array>
#include <cmath>
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace theseus {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T>
void check_finite(const Tensor& matrices) {
  const T* values = matrices.const_data_ptr<T>();
  const int64_t size = matrices.size(1) * matrices.size(2);
  for (int64_t i = 0; i < matrices.numel(); ++i)
    STD_TORCH_CHECK(std::isfinite(values[i]), "matrix ", i / size, " of ", matrices.size(0), " holds NaN or Inf");
}

// The matrices [batch, m, n] for the calls below, which start at torch's top: without a graph to record into
Tensor checked(const Tensor& input) {
  std::array<StableIValue, 1> stack{torch::stable::detail::from(input)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::detach", "", stack.data(), TORCH_ABI_VERSION));
  const Tensor matrices = torch::stable::detail::to<Tensor>(stack[0]);
  STD_TORCH_CHECK(matrices.dim() == 3 && matrices.is_contiguous(), "svd: matrices must be contiguous [batch, m, n]");
  const bool in_float64 = matrices.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(in_float64 || matrices.scalar_type() == ScalarType::Float, "svd: matrices must be float32 or float64");
  in_float64 ? check_finite<double>(matrices) : check_finite<float>(matrices);
  return matrices;
}

template <size_t dims>
Tensor empty(const std::array<int64_t, dims>& size, const Tensor& like) {
  return torch::stable::empty({size.data(), dims}, like.scalar_type(), std::nullopt, like.device());
}

// op(matrices[i], options...) -> out[...][i] for every i; inside the parallel region LAPACK stays on the calling thread
template <size_t inputs, size_t outputs>
void share_out(const char* op, const Tensor& matrices, const std::array<StableIValue, inputs>& options,
               const std::array<Tensor, outputs>& out) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  if (matrices.numel() == 0) return;
  torch::stable::parallel_for(0, matrices.size(0), 1, [&](int64_t begin, int64_t end) {
    const auto part = [&](Tensor tensor) { return torch::stable::narrow(tensor, 0, begin, end - begin); };
    std::array<StableIValue, std::max(inputs + 1, outputs)> stack{from(part(matrices))};
    std::copy(options.begin(), options.end(), stack.begin() + 1);
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, "", stack.data(), TORCH_ABI_VERSION));
    for (size_t i = 0; i < outputs; ++i) {
      Tensor into = part(out[i]);
      torch::stable::copy_(into, to<Tensor>(stack[i]));
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> svd_cpu(const Tensor& input) {
  using torch::stable::detail::from;
  const Tensor matrices = checked(input);
  const int64_t batch = matrices.size(0), m = matrices.size(1), n = matrices.size(2), k = std::min(m, n);
  const std::array<Tensor, 3> out{empty<3>({batch, m, k}, matrices), empty<2>({batch, k}, matrices),
                                  empty<3>({batch, k, n}, matrices)};
  share_out<2, 3>("aten::linalg_svd", matrices, {from(false), from(std::nullopt)}, out);
  return {out[0], out[1], out[2]};
}

Tensor svdvals_cpu(const Tensor& input) {
  const Tensor matrices = checked(input);
  const std::array<int64_t, 2> size{matrices.size(0), std::min(matrices.size(1), matrices.size(2))};
  const Tensor out = empty<2>(size, matrices);
  share_out<1, 1>("aten::linalg_svdvals", matrices, {torch::stable::detail::from(std::nullopt)}, {out});
  return out;
}

}  // namespace
}  // namespace theseus

STABLE_TORCH_LIBRARY_IMPL(theseus_ext, CPU, m) {
  m.impl("svd", TORCH_BOX(&theseus::svd_cpu));
  m.impl("svdvals", TORCH_BOX(&theseus::svdvals_cpu));
}
