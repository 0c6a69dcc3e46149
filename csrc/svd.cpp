// svd, svdvals and polar. On the CPU the matrices of a batch are shared out over torch's threads, each by itself
// through torch's own LAPACK; on a GPU small ones go to the Jacobi kernel.
#include <algorithm>
#include <array>
#include <cmath>
#include <tuple>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "alignment.h"
#include "cuda/small_svd.h"
#include "stream.h"

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
  STD_TORCH_CHECK(matrices.scalar_type() == ScalarType::Double || matrices.scalar_type() == ScalarType::Float,
                  "svd: matrices must be float32 or float64");
  return matrices;
}

Tensor checked_on_cpu(const Tensor& input) {
  const Tensor matrices = checked(input);
  matrices.scalar_type() == ScalarType::Double ? check_finite<double>(matrices) : check_finite<float>(matrices);
  return matrices;
}

template <size_t dims>
Tensor empty(const std::array<int64_t, dims>& size, const Tensor& like) {
  return torch::stable::empty({size.data(), dims}, like.scalar_type(), std::nullopt, like.device());
}

// op(batches[...][i], options...) -> out[...][i] for every i; inside the parallel region BLAS and LAPACK stay on the
// calling thread. Each i goes by itself and starts aligned: bytes depend neither on where the batch lies nor, on one
// thread, on what else is in it.
template <size_t inputs, size_t others, size_t outputs>
void share_out(const char* op, const std::array<Tensor, inputs>& batches,
               const std::array<StableIValue, others>& options, const std::array<Tensor, outputs>& out) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  if (out[0].numel() == 0) return;
  torch::stable::parallel_for(0, out[0].size(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const auto at = [i](Tensor batch) { return torch::stable::narrow(batch, 0, i, 1); };
      std::array<StableIValue, std::max(inputs + others, outputs)> stack;
      for (size_t j = 0; j < inputs; ++j) {
        const Tensor one = at(batches[j]);
        stack[j] = from(is_aligned(one.const_data_ptr()) ? one : torch::stable::clone(one));
      }
      std::copy(options.begin(), options.end(), stack.begin() + inputs);
      TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, "", stack.data(), TORCH_ABI_VERSION));
      for (size_t j = 0; j < outputs; ++j) {
        Tensor into = at(out[j]);
        torch::stable::copy_(into, to<Tensor>(stack[j]));
      }
    }
  });
}

std::array<Tensor, 3> results(const Tensor& matrices) {
  const int64_t batch = matrices.size(0), m = matrices.size(1), n = matrices.size(2), k = std::min(m, n);
  return {empty<3>({batch, m, k}, matrices), empty<2>({batch, k}, matrices), empty<3>({batch, k, n}, matrices)};
}

std::tuple<Tensor, Tensor, Tensor> svd_cpu(const Tensor& input) {
  using torch::stable::detail::from;
  const Tensor matrices = checked_on_cpu(input);
  const std::array<Tensor, 3> out = results(matrices);
  share_out<1, 2, 3>("aten::linalg_svd", {matrices}, {from(false), from(std::nullopt)}, out);
  return {out[0], out[1], out[2]};
}

Tensor svdvals_cpu(const Tensor& input) {
  const Tensor matrices = checked_on_cpu(input);
  const Tensor out = empty<2>({matrices.size(0), std::min(matrices.size(1), matrices.size(2))}, matrices);
  share_out<1, 1, 1>("aten::linalg_svdvals", {matrices}, {torch::stable::detail::from(std::nullopt)}, {out});
  return out;
}

// Columns of U become zero whose singular value is at most floor times the largest.
template <class T>
void leave_out(const std::array<Tensor, 3>& found, double floor) {
  T* u = found[0].mutable_data_ptr<T>();
  const T* s = found[1].const_data_ptr<T>();
  const int64_t m = found[0].size(1), k = found[0].size(2);
  for (int64_t i = 0; i < found[0].numel(); ++i) {
    const T* values = s + i / (m * k) * k;
    if (values[i % k] <= static_cast<T>(floor) * values[0]) u[i] = 0;
  }
}

std::tuple<Tensor, Tensor> polar_cpu(const Tensor& input, double floor) {
  const auto [u, s, vh] = svd_cpu(input);
  s.scalar_type() == ScalarType::Double ? leave_out<double>({u, s, vh}, floor) : leave_out<float>({u, s, vh}, floor);
  const Tensor out = empty<3>({u.size(0), u.size(1), vh.size(2)}, u);
  share_out<2, 0, 1>("aten::bmm", {u, vh}, {}, {out});
  return {out, s};
}

#ifdef THESEUS_CUDA
// Values of a matrix that holds NaN or Inf, or did not converge, are NaN: the host cannot look at it without waiting.
void decompose_on_cuda(const Tensor& matrices, const Tensor& s, const Tensor* u, const Tensor* vh, const Tensor* polar,
                       double floor) {
  if (matrices.numel() == 0) return;
  const int64_t m = matrices.size(1), n = matrices.size(2);
  STD_TORCH_CHECK(m <= cuda::kLargestSvd && n <= cuda::kLargestSvd, "svd: matrices on a GPU have at most ",
                  cuda::kLargestSvd, " rows and columns, these are ", m, " x ", n);
  const int32_t index = matrices.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(index);
  const auto check = [](const char* error) { STD_TORCH_CHECK(!error, "svd: ", error); };
  cuda::Device device;
  check(cuda::find_device(index, device));
  const cuda::SmallSvdArgs args{matrices.const_data_ptr(),
                                matrices.scalar_type() == ScalarType::Double ? Dtype::float64 : Dtype::float32,
                                matrices.size(0),
                                static_cast<int>(m),
                                static_cast<int>(n),
                                m * n,
                                n,
                                floor,
                                s.mutable_data_ptr(),
                                u ? u->mutable_data_ptr() : nullptr,
                                vh ? vh->mutable_data_ptr() : nullptr,
                                polar ? polar->mutable_data_ptr() : nullptr,
                                nullptr};
  const std::array<int64_t, 1> bytes{static_cast<int64_t>(cuda::small_svd_workspace(args, device.shared_limit))};
  const Tensor workspace = torch::stable::empty({bytes.data(), 1}, ScalarType::Byte, std::nullopt, matrices.device());
  check(cuda::small_svd(args, device.shared_limit, workspace.mutable_data_ptr(), current_cuda_stream(index)));
}

std::tuple<Tensor, Tensor, Tensor> svd_cuda(const Tensor& input) {
  const Tensor matrices = checked(input);
  const std::array<Tensor, 3> out = results(matrices);
  decompose_on_cuda(matrices, out[1], &out[0], &out[2], nullptr, 0);
  return {out[0], out[1], out[2]};
}

Tensor svdvals_cuda(const Tensor& input) {
  const Tensor matrices = checked(input);
  const Tensor out = empty<2>({matrices.size(0), std::min(matrices.size(1), matrices.size(2))}, matrices);
  decompose_on_cuda(matrices, out, nullptr, nullptr, nullptr, 0);
  return out;
}

std::tuple<Tensor, Tensor> polar_cuda(const Tensor& input, double floor) {
  const Tensor matrices = checked(input);
  const int64_t batch = matrices.size(0), m = matrices.size(1), n = matrices.size(2);
  const Tensor out = empty<3>({batch, m, n}, matrices), s = empty<2>({batch, std::min(m, n)}, matrices);
  decompose_on_cuda(matrices, s, nullptr, nullptr, &out, floor);
  return {out, s};
}
#endif

}  // namespace
}  // namespace theseus

STABLE_TORCH_LIBRARY_IMPL(theseus_ext, CPU, m) {
  m.impl("svd", TORCH_BOX(&theseus::svd_cpu));
  m.impl("svdvals", TORCH_BOX(&theseus::svdvals_cpu));
  m.impl("polar", TORCH_BOX(&theseus::polar_cpu));
}
#ifdef THESEUS_CUDA
STABLE_TORCH_LIBRARY_IMPL(theseus_ext, CUDA, m) {
  m.impl("svd", TORCH_BOX(&theseus::svd_cuda));
  m.impl("svdvals", TORCH_BOX(&theseus::svdvals_cuda));
  m.impl("polar", TORCH_BOX(&theseus::polar_cuda));
}
#endif
