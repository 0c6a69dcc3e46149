// Host side of cross_moment_: check, describe, and run chunk by chunk on the CPU or launch on the GPU.
#include "cross_moment.h"

#include <algorithm>
#include <array>
#include <optional>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "stream.h"

namespace theseus {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

constexpr int64_t kChunk = 4096;      // most rows multiplied in float32 before they are added into the float64 master
constexpr uintptr_t kAlignment = 64;  // bytes; BLAS gives the same bytes for the same alignment

Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Dtype::float32;
    case ScalarType::Double: return Dtype::float64;
    case ScalarType::BFloat16: return Dtype::bfloat16;
    case ScalarType::Half: return Dtype::float16;
    default: STD_TORCH_CHECK(false, "cross_moment_: tokens must be float64, float32, bfloat16 or float16");
  }
}

double* master(const Tensor& tensor, int64_t numel, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Double && tensor.is_contiguous() && tensor.numel() == numel,
                  "cross_moment_: ", name, " must be contiguous float64 with ", numel, " elements");
  return tensor.mutable_data_ptr<double>();
}

template <class T>
const T* entries(const Optional& tensor, ScalarType dtype, const char* name) {
  if (!tensor) return nullptr;
  STD_TORCH_CHECK(tensor->dim() == 1 && tensor->scalar_type() == dtype && tensor->is_contiguous(),
                  "cross_moment_: ", name, " must be a contiguous vector of int64 (weight: float64)");
  return tensor->const_data_ptr<T>();
}

const int64_t kNoEntries = 0;  // stands for the storage of an empty column, whose pointer is null: still a mixing

Side describe(const Tensor& tokens, const Optional& row_ptr, const Optional& column, const Optional& weight,
              const Tensor& sum, const Tensor& energy) {
  STD_TORCH_CHECK(tokens.dim() == 2 && (tokens.stride(1) == 1 || tokens.size(1) <= 1),
                  "cross_moment_: tokens must be [tokens, width] with unit column stride");
  STD_TORCH_CHECK(column || (!row_ptr && !weight), "cross_moment_: a row mixing needs column");
  const int64_t width = tokens.size(1), count = column ? column->numel() : 0;
  STD_TORCH_CHECK(!row_ptr || row_ptr->numel() > 0, "cross_moment_: row_ptr needs at least one element");
  STD_TORCH_CHECK(!weight || weight->numel() == count, "cross_moment_: weight needs ", count, " elements");
  return {tokens.const_data_ptr(), dtype_of(tokens), tokens.size(0), width, tokens.stride(0),
          entries<int64_t>(row_ptr, ScalarType::Long, "row_ptr"),
          column && count == 0 ? &kNoEntries : entries<int64_t>(column, ScalarType::Long, "column"),
          entries<double>(weight, ScalarType::Double, "weight"), count,
          master(sum, width, "sum"), master(energy, width, "energy")};
}

int64_t row_count(const Side& side, const Optional& row_ptr) {
  return row_ptr ? row_ptr->numel() - 1 : side.column ? side.entries : side.token_count;
}

void check_entries(const Side& side, int64_t rows, const char* name) {
  if (side.row_ptr) {
    STD_TORCH_CHECK(side.row_ptr[0] == 0 && side.row_ptr[rows] == side.entries, "cross_moment_: ", name,
                    " row_ptr runs from ", side.row_ptr[0], " to ", side.row_ptr[rows], ", expected 0 to ",
                    side.entries, " (the length of column)");
    for (int64_t row = 0; row < rows; ++row)
      STD_TORCH_CHECK(side.row_ptr[row] <= side.row_ptr[row + 1], "cross_moment_: ", name, " row_ptr falls from ",
                      side.row_ptr[row], " to ", side.row_ptr[row + 1], " at row ", row);
  }
  for (int64_t entry = 0; entry < side.entries; ++entry)
    STD_TORCH_CHECK(side.column[entry] >= 0 && side.column[entry] < side.token_count, "cross_moment_: ", name,
                    " column[", entry, "] is ", side.column[entry], " but there are ", side.token_count, " tokens");
}

// The tokens are the rows, in the compute type, where BLAS may read them.
bool usable_in_place(const Side& side, Dtype compute) {
  return !side.column && side.dtype == compute && side.stride == side.width &&
         reinterpret_cast<uintptr_t>(side.tokens) % kAlignment == 0;
}

Tensor scratch(int64_t rows, int64_t columns, ScalarType dtype, const Tensor& like) {
  const std::array<int64_t, 2> size{rows, columns};
  return torch::stable::empty({size.data(), size.size()}, dtype, std::nullopt, like.device());
}

Tensor view(const void* data, std::array<int64_t, 2> size, std::array<int64_t, 2> stride, const Tensor& like) {
  return torch::stable::from_blob(const_cast<void*>(data), {size.data(), 2}, {stride.data(), 2}, like.device(),
                                  like.scalar_type());
}

// out = x^T y through torch's own BLAS
void multiply(const Tensor& out, const Tensor& x_transposed, const Tensor& y) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(x_transposed), from(y), from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // takes over the returned handle
}

template <class T>
void run_cpu(const CrossMomentArgs& args, const Tensor& like, Dtype compute, ScalarType dtype) {
  const Side* sides[2] = {&args.source, &args.target};
  const int64_t widths[2] = {args.source.width, args.target.width}, chunks = (args.rows + kChunk - 1) / kChunk;
  const int64_t chunk = ((args.rows + chunks - 1) / chunks + 15) / 16 * 16;  // equal, and each as aligned as the first
  Tensor buffers[2];
  T* prepared[2] = {nullptr, nullptr};
  for (int s = 0; s < 2; ++s) {
    if (usable_in_place(*sides[s], compute)) continue;
    buffers[s] = scratch(chunk, widths[s], dtype, like);
    prepared[s] = buffers[s].mutable_data_ptr<T>();
  }
  const Tensor product = scratch(widths[0], widths[1], dtype, like);
  const int64_t blocks[2] = {(widths[0] + cpu::kColumns - 1) / cpu::kColumns, (widths[1] + cpu::kColumns - 1) / cpu::kColumns};

  for (int64_t begin = 0; begin < args.rows; begin += chunk) {
    const int64_t end = std::min(begin + chunk, args.rows), rows = end - begin;
    torch::stable::parallel_for(0, blocks[0] + blocks[1], 1, [&](int64_t from, int64_t to) {
      for (int64_t block = from; block < to; ++block) {
        const int s = block >= blocks[0];
        const int64_t first = (s ? block - blocks[0] : block) * cpu::kColumns;
        cpu::prepare(*sides[s], begin, end, first, std::min(first + cpu::kColumns, widths[s]), prepared[s]);
      }
    });
    if (product.numel() == 0) continue;
    const T* data[2];
    for (int s = 0; s < 2; ++s)
      data[s] = prepared[s] ? prepared[s] : static_cast<const T*>(sides[s]->tokens) + begin * widths[s];
    multiply(product, view(data[0], {widths[0], rows}, {1, widths[0]}, product),
             view(data[1], {rows, widths[1]}, {widths[1], 1}, product));
    const T* addend = product.const_data_ptr<T>();
    torch::stable::parallel_for(0, product.numel(), 1 << 15, [&](int64_t from, int64_t to) {
      cpu::add(addend + from, args.cross + from, to - from);
    });
  }
}

CrossMomentArgs describe_all(const Tensor& source, const Tensor& target, const Optional& source_row_ptr,
                             const Optional& source_column, const Optional& source_weight,
                             const Optional& target_row_ptr, const Optional& target_column,
                             const Optional& target_weight, const Tensor& cross, const Tensor& source_sum,
                             const Tensor& target_sum, const Tensor& source_energy, const Tensor& target_energy) {
  CrossMomentArgs args;
  args.source = describe(source, source_row_ptr, source_column, source_weight, source_sum, source_energy);
  args.target = describe(target, target_row_ptr, target_column, target_weight, target_sum, target_energy);
  args.rows = row_count(args.source, source_row_ptr);
  STD_TORCH_CHECK(args.rows == row_count(args.target, target_row_ptr), "cross_moment_: source has ", args.rows,
                  " rows but target has ", row_count(args.target, target_row_ptr));
  args.cross = master(cross, args.source.width * args.target.width, "cross");
  return args;
}

#define THESEUS_PARAMETERS                                                                                      \
  const Tensor &source, const Tensor &target, const Optional &source_row_ptr, const Optional &source_column,    \
      const Optional &source_weight, const Optional &target_row_ptr, const Optional &target_column,             \
      const Optional &target_weight, const Tensor &cross, const Tensor &source_sum, const Tensor &target_sum,   \
      const Tensor &source_energy, const Tensor &target_energy
#define THESEUS_ARGUMENTS                                                                                       \
  source, target, source_row_ptr, source_column, source_weight, target_row_ptr, target_column, target_weight,   \
      cross, source_sum, target_sum, source_energy, target_energy

void cross_moment_cpu(THESEUS_PARAMETERS) {
  const CrossMomentArgs args = describe_all(THESEUS_ARGUMENTS);
  check_entries(args.source, args.rows, "source");
  check_entries(args.target, args.rows, "target");
  if (args.rows == 0) return;
  if (args.source.dtype == Dtype::float64 || args.target.dtype == Dtype::float64)
    run_cpu<double>(args, source, Dtype::float64, ScalarType::Double);
  else
    run_cpu<float>(args, source, Dtype::float32, ScalarType::Float);
}

#ifdef THESEUS_CUDA
void cross_moment_cuda(THESEUS_PARAMETERS) {
  const CrossMomentArgs args = describe_all(THESEUS_ARGUMENTS);
  if (args.rows == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(source.get_device_index());
  const bool in_float64 = args.source.dtype == Dtype::float64 || args.target.dtype == Dtype::float64;
  const Dtype compute = in_float64 ? Dtype::float64 : Dtype::float32;
  const int64_t chunk = std::min(args.rows, cuda::kChunk);
  Tensor buffers[2];
  void* chunks[2] = {nullptr, nullptr};
  for (int s = 0; s < 2; ++s) {
    const Side& side = s ? args.target : args.source;
    if (usable_in_place(side, compute)) continue;
    buffers[s] = scratch(chunk, side.width, in_float64 ? ScalarType::Double : ScalarType::Float, source);
    chunks[s] = buffers[s].mutable_data_ptr();
  }
  const char* error =
      cuda::cross_moment(args, in_float64, chunks[0], chunks[1], current_cuda_stream(source.get_device_index()));
  STD_TORCH_CHECK(!error, "cross_moment_: ", error);
}
#endif

}  // namespace
}  // namespace theseus

STABLE_TORCH_LIBRARY_IMPL(theseus_ext, CPU, m) { m.impl("cross_moment_", TORCH_BOX(&theseus::cross_moment_cpu)); }
#ifdef THESEUS_CUDA
STABLE_TORCH_LIBRARY_IMPL(theseus_ext, CUDA, m) { m.impl("cross_moment_", TORCH_BOX(&theseus::cross_moment_cuda)); }
#endif
