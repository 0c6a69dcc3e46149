// The Python module: facts about this build. No tensor passes through here.
#include <pybind11/pybind11.h>

#include "stream.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.def("build_info", [] {
    py::dict info;
    info["torch_target_version"] = "2.10";
    info["torch_built_with"] = THESEUS_TORCH;
    info["compiler"] = __VERSION__;
    info["debug"] = static_cast<bool>(THESEUS_DEBUG);
#ifdef THESEUS_CUDA
    info["cuda_kernels"] = true;
#else
    info["cuda_kernels"] = false;
#endif
    info["cuda_compiler"] = THESEUS_NVCC;
    info["cuda_arch_list"] = THESEUS_ARCHS;
    info["cuda_stream_symbol"] = theseus::has_cuda_stream();
    return info;
  });
}
