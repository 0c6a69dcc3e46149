"""Facts about the built extension."""

import subprocess
import sys

import torch

import theseus_ext


def test_build_info_states_what_was_built():
    info = theseus_ext.build_info()
    assert info["torch_target_version"] == "2.10"
    assert info["torch_built_with"].split(".")[0] == "2"
    assert info["cuda_kernels"] == (info["cuda_compiler"] != "") == (info["cuda_arch_list"] != "")


def test_stream_symbol_is_there_exactly_under_a_cuda_torch():
    assert theseus_ext.build_info()["cuda_stream_symbol"] == (torch.version.cuda is not None)


def test_kernels_are_registered_for_what_was_built():
    def has(key: str) -> bool:
        return torch._C._dispatch_has_kernel_for_dispatch_key("theseus_ext::cross_moment_", key)

    assert has("CPU") and has("Meta") and has("Autograd")
    assert has("CUDA") == theseus_ext.build_info()["cuda_kernels"]


def test_a_missing_build_says_how_to_make_one():
    hide = "import sys; sys.modules['theseus_ext._C'] = None; import theseus_ext"
    done = subprocess.run([sys.executable, "-c", hide], capture_output=True, text=True)
    assert done.returncode != 0
    assert "pip install --no-build-isolation -e ." in done.stderr and torch.__version__ in done.stderr
