// Host side of cross_moment_, cross_moments_ and effect_moment_: check, describe, and run chunk by chunk on the CPU or
// launch on the GPU.
#include <algorithm>
#include <array>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "dispatch.h"
#include "spaces.h"
#include "stream.h"

namespace theseus {
namespace {

using torch::headeronly::ScalarType;

constexpr int64_t kFlushRows = 4096;  // most rows multiplied in float32 before they are added into the float64 master

void check_entries(const char* op, const Side& side, int64_t rows, const char* name) {
  if (side.row_ptr) {
    STD_TORCH_CHECK(side.row_ptr[0] == 0 && side.row_ptr[rows] == side.entries, op, ": ", name, " row_ptr runs from ",
                    side.row_ptr[0], " to ", side.row_ptr[rows], ", expected 0 to ", side.entries,
                    " (the length of column)");
    for (int64_t row = 0; row < rows; ++row)
      STD_TORCH_CHECK(side.row_ptr[row] <= side.row_ptr[row + 1], op, ": ", name, " row_ptr falls from ",
                      side.row_ptr[row], " to ", side.row_ptr[row + 1], " at row ", row);
  }
  for (int64_t entry = 0; entry < side.entries; ++entry)
    STD_TORCH_CHECK(side.column[entry] >= 0 && side.column[entry] < side.token_count, op, ": ", name, " column[", entry,
                    "] is ", side.column[entry], " but there are ", side.token_count, " tokens");
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
  const int64_t widths[2] = {args.source.width, args.target.width}, chunks = (args.rows + kFlushRows - 1) / kFlushRows;
  const int64_t chunk = ((args.rows + chunks - 1) / chunks + 15) / 16 * 16;  // equal, and each as aligned as the first
  Tensor buffers[2];
  T* prepared[2] = {nullptr, nullptr};
  for (int s = 0; s < 2; ++s) {
    if (usable_in_place(*sides[s], compute)) continue;
    buffers[s] = scratch(chunk, widths[s], dtype, like);
    prepared[s] = buffers[s].mutable_data_ptr<T>();
  }
  const Tensor product = scratch(widths[0], widths[1], dtype, like);
  const int64_t blocks[2] = {(widths[0] + cpu::kColumns - 1) / cpu::kColumns,
                             (widths[1] + cpu::kColumns - 1) / cpu::kColumns};

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

bool in_float64(const CrossMomentArgs& args) {
  return args.source.dtype == Dtype::float64 || args.target.dtype == Dtype::float64;
}

void add_on_cpu(const char* op, const Spaces& spaces) {
  const std::vector<MomentGroup> groups = describe(op, spaces);
  for (size_t i = 0; i < groups.size(); ++i) {
    check_entries(op, groups[i].args.source, groups[i].args.rows, spaces[i].source.name);
    check_entries(op, groups[i].args.target, groups[i].args.rows, spaces[i].target.name);
  }
  for (const MomentGroup& group : groups)
    for (int64_t head = 0; head < group.heads && group.args.rows > 0; ++head) {
      const CrossMomentArgs args = head_of(group, head);
      if (in_float64(args))
        run_cpu<double>(args, spaces[0].cross, Dtype::float64, ScalarType::Double);
      else
        run_cpu<float>(args, spaces[0].cross, Dtype::float32, ScalarType::Float);
    }
}

#ifdef THESEUS_CUDA
const char* run_plain(const CrossMomentArgs& args, const Tensor& like, void* stream) {
  const bool wide = in_float64(args);
  const int64_t chunk = std::min(args.rows, cuda::kChunk);
  Tensor buffers[2];
  void* chunks[2] = {nullptr, nullptr};
  for (int s = 0; s < 2; ++s) {
    const Side& side = s ? args.target : args.source;
    if (usable_in_place(side, wide ? Dtype::float64 : Dtype::float32)) continue;
    buffers[s] = scratch(chunk, side.width, wide ? ScalarType::Double : ScalarType::Float, like);
    chunks[s] = buffers[s].mutable_data_ptr();
  }
  return cuda::cross_moment(args, wide, chunks[0], chunks[1], stream);
}

// What launches of one call share. Scratch goes back to torch while the kernels wait in its stream, as torch's own
// operations do.
struct Launches {
  const char* op;
  const Tensor& like;
  cuda::Device device;
  void* stream;

  void check(const char* error) const { STD_TORCH_CHECK(!error, op, ": ", error); }

  void run_grouped(const std::vector<MomentGroup>& groups) const {
    const int count = static_cast<int>(groups.size());
    const auto bytes = static_cast<int64_t>(cuda::grouped_moment_workspace(groups.data(), count, device.processors));
    const Tensor workspace = scratch(1, bytes, ScalarType::Byte, like);
    check(cuda::grouped_moment(groups.data(), count, device.processors, workspace.mutable_data_ptr(), stream));
  }

  // Groups of which rows are made ahead of the launch, a chunk at a time.
  void run_ahead(const std::vector<MomentGroup>& groups) const {
    struct Made {
      Tensor rows, unused;
    };
    std::vector<std::array<std::optional<Made>, 2>> made(groups.size());
    int64_t most = 0;
    for (size_t g = 0; g < groups.size(); ++g) {
      most = std::max(most, groups[g].args.rows);
      for (int s = 0; s < 2; ++s) {
        if (!cuda::made_ahead(groups[g], s)) continue;
        const int64_t columns = cuda::all_heads(groups[g], s).width;
        made[g][s] = Made{scratch(std::min(groups[g].args.rows, cuda::kChunk), columns, ScalarType::Float, like),
                          scratch(2, columns, ScalarType::Double, like)};
      }
    }
    for (int64_t begin = 0; begin < most; begin += cuda::kChunk) {
      std::vector<MomentGroup> parts;
      for (size_t g = 0; g < groups.size(); ++g) {
        const int64_t rows = std::min(groups[g].args.rows - begin, cuda::kChunk);
        if (rows <= 0) continue;
        MomentGroup part = cuda::rows_of(groups[g], begin, rows);
        for (int s = 0; s < 2; ++s) {
          if (!made[g][s]) continue;
          float* out = made[g][s]->rows.mutable_data_ptr<float>();
          check(cuda::make_rows(cuda::all_heads(groups[g], s), begin, rows, out, stream));
          part = cuda::reading(part, s, out, made[g][s]->unused.mutable_data_ptr<double>());
        }
        parts.push_back(part);
      }
      run_grouped(parts);
    }
  }

  // A space through the library's GEMM: 16-bit products added up in float32, at most kLibraryRows of them.
  void run_library(const CrossMomentArgs& args, const Tensor& tokens) const {
    using torch::stable::detail::from;
    const Side &x = args.source, &y = args.target;
    const Tensor product = scratch(x.width, y.width, ScalarType::Float, like);
    std::array<StableIValue, 4> stack{from(view(x.tokens, {x.width, args.rows}, {1, x.stride}, tokens)),
                                      from(view(y.tokens, {args.rows, y.width}, {y.stride, 1}, tokens)),
                                      from(ScalarType::Float), from(product)};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "dtype_out", stack.data(), TORCH_ABI_VERSION));
    torch::stable::detail::to<Tensor>(stack[0]);  // takes over the returned handle
    check(cuda::add(product.const_data_ptr<float>(), args.cross, product.numel(), stream));
    for (const Side* side : {&x, &y}) check(cuda::make_rows(*side, 0, args.rows, nullptr, stream));
  }
};

void add_on_cuda(const char* op, const Spaces& spaces) {
  const std::vector<MomentGroup> groups = describe(op, spaces);
  const Tensor& like = spaces[0].cross;
  const int32_t index = like.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(index);
  Launches launches{op, like, {}, current_cuda_stream(index)};
  launches.check(cuda::find_device(index, launches.device));
  std::vector<MomentGroup> grouped, ahead;
  for (size_t i = 0; i < groups.size(); ++i) {
    const MomentGroup& group = groups[i];
    if (group.args.rows == 0) continue;
    if (cuda::dispatches(group)) {
      launches.run_library(group.args, spaces[i].source.tokens);
    } else if (cuda::takes_tensor_cores(group, launches.device)) {
      (cuda::made_ahead(group, 0) || cuda::made_ahead(group, 1) ? ahead : grouped).push_back(group);
    } else {
      for (int64_t head = 0; head < group.heads; ++head)
        launches.check(run_plain(head_of(group, head), like, launches.stream));
    }
  }
  launches.run_grouped(grouped);
  launches.run_ahead(ahead);
}
#endif

using Add = void (*)(const char* op, const Spaces&);

template <Add add>
void cross_moment(const Tensor& source, const Tensor& target, const Optional& source_row_ptr,
                  const Optional& source_column, const Optional& source_weight, const Optional& target_row_ptr,
                  const Optional& target_column, const Optional& target_weight, const Tensor& cross,
                  const Tensor& source_sum, const Tensor& target_sum, const Tensor& source_energy,
                  const Tensor& target_energy) {
  const Rows x{"source", source, {source_row_ptr, source_column, source_weight}};
  const Rows y{"target", target, {target_row_ptr, target_column, target_weight}};
  add("cross_moment_", {{x, y, cross, source_sum, target_sum, source_energy, target_energy}});
}

using Tensors = std::vector<Tensor>;

template <Add add>
void cross_moments(const Tensors& source, const Tensors& target, const Optional& source_row_ptr,
                   const Optional& source_column, const Optional& source_weight, const Optional& target_row_ptr,
                   const Optional& target_column, const Optional& target_weight, const Tensors& cross,
                   const Tensors& source_sum, const Tensors& target_sum, const Tensors& source_energy,
                   const Tensors& target_energy) {
  const char* op = "cross_moments_";
  for (const Tensors* list : {&target, &cross, &source_sum, &target_sum, &source_energy, &target_energy})
    STD_TORCH_CHECK(list->size() == source.size(), op, ": ", list->size(), " tensors in one list and ", source.size(),
                    " in another");
  Spaces spaces;
  for (size_t i = 0; i < source.size(); ++i)
    spaces.push_back({{"source", source[i], {source_row_ptr, source_column, source_weight}},
                      {"target", target[i], {target_row_ptr, target_column, target_weight}},
                      cross[i],
                      source_sum[i],
                      target_sum[i],
                      source_energy[i],
                      target_energy[i]});
  if (!spaces.empty()) add(op, spaces);
}

// X against itself, against E = P_S (source_after - source_before) and against C = P_T (target_after - target_before).
template <Add add>
void effect_moment(const Tensor& inputs, const Tensor& source_after, const Tensor& source_before,
                   const Tensor& target_after, const Tensor& target_before, const Optional& source_row_ptr,
                   const Optional& source_column, const Optional& source_weight, const Optional& target_row_ptr,
                   const Optional& target_column, const Optional& target_weight, const Tensor& gram,
                   const Tensor& source_cross, const Tensor& target_cross, const Tensor& input_sum,
                   const Tensor& source_sum, const Tensor& target_sum, const Tensor& input_energy,
                   const Tensor& source_energy, const Tensor& target_energy) {
  const Mixing source{source_row_ptr, source_column, source_weight};
  const Mixing target{target_row_ptr, target_column, target_weight};
  const Rows x{"inputs", inputs, target};
  const Rows effect{"source", source_after, source, &source_before};
  const Rows carried{"target", target_after, target, &target_before};
  std::vector<Tensor> again;  // sums and energies of X that are taken already
  for (int i = 0; i < 6; ++i) again.push_back(scratch(1, inputs.size(1), ScalarType::Double, gram));
  add("effect_moment_", {{x, x, gram, input_sum, again[0], input_energy, again[1]},
                         {x, effect, source_cross, again[2], source_sum, again[3], source_energy},
                         {x, carried, target_cross, again[4], target_sum, again[5], target_energy}});
}

}  // namespace
}  // namespace theseus

STABLE_TORCH_LIBRARY_IMPL(theseus_ext, CPU, m) {
  m.impl("cross_moment_", TORCH_BOX(&theseus::cross_moment<theseus::add_on_cpu>));
  m.impl("cross_moments_", TORCH_BOX(&theseus::cross_moments<theseus::add_on_cpu>));
  m.impl("effect_moment_", TORCH_BOX(&theseus::effect_moment<theseus::add_on_cpu>));
}
#ifdef THESEUS_CUDA
STABLE_TORCH_LIBRARY_IMPL(theseus_ext, CUDA, m) {
  m.impl("cross_moment_", TORCH_BOX(&theseus::cross_moment<theseus::add_on_cuda>));
  m.impl("cross_moments_", TORCH_BOX(&theseus::cross_moments<theseus::add_on_cuda>));
  m.impl("effect_moment_", TORCH_BOX(&theseus::effect_moment<theseus::add_on_cuda>));
}
#endif
