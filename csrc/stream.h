// The only place that asks torch for its current CUDA stream.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

// Lives in libtorch_cuda, which a CPU torch lacks: weak, so the module loads there and the address is null.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace theseus {

inline bool has_cuda_stream() { return &aoti_torch_get_current_cuda_stream != nullptr; }

inline void* current_cuda_stream(int32_t device) {
  STD_TORCH_CHECK(has_cuda_stream(), "theseus_ext: this torch has no CUDA stream; install a CUDA build of torch");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return stream;
}

}  // namespace theseus
