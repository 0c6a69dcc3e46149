"""Facts about the built extension."""

import subprocess
import sys

import pytest
import torch
from torch._subclasses import FakeTensorMode

import theseus_ext
from theseus_ext.devices import covers


def test_build_info_states_what_was_built():
    info = theseus_ext.build_info()
    assert info["torch_target_version"] == "2.10"
    assert info["torch_built_with"].split(".")[0] == "2"
    assert info["cuda_kernels"] == (info["cuda_compiler"] != "") == (info["cuda_arch_list"] != "")


def test_stream_symbol_is_there_exactly_under_a_cuda_torch():
    assert theseus_ext.build_info()["cuda_stream_symbol"] == (torch.version.cuda is not None)


def test_kernels_are_registered_for_what_was_built():
    for op in ("cross_moment_", "cross_moments_", "svd", "svdvals", "polar"):

        def has(key: str, op: str = op) -> bool:
            return torch._C._dispatch_has_kernel_for_dispatch_key(f"theseus_ext::{op}", key)

        assert has("CPU") and has("Meta") and has("Autograd"), op
        assert has("CUDA") == theseus_ext.build_info()["cuda_kernels"], op


def test_on_a_gpu_tests_over_devices_run_on_cuda_too(gpu):
    assert torch.cuda.device_count() > 0 and theseus_ext.build_info()["cuda_kernels"]


def test_a_missing_build_says_how_to_make_one():
    hide = "import sys; sys.modules['theseus_ext._C'] = None; import theseus_ext"
    done = subprocess.run([sys.executable, "-c", hide], capture_output=True, text=True)
    assert done.returncode != 0
    assert "pip install --no-build-isolation -e ." in done.stderr and torch.__version__ in done.stderr


# CUDA C++ Programming Guide, "Compute Capabilities" and "Application Compatibility"
@pytest.mark.parametrize("archs, capability, runs", [
    ("8.0", (8, 0), True),
    ("8.0", (8, 9), True),
    ("8.6", (8, 0), False),
    ("8.0", (9, 0), False),
    ("8.0+PTX", (9, 0), True),
    ("9.0+PTX", (8, 0), False),
    ("8.0;9.0;10.0;12.0+PTX", (7, 5), False),
    ("8.0;9.0;10.0;12.0+PTX", (11, 0), False),
    ("8.0;9.0;10.0;12.0+PTX", (12, 1), True),
    ("8.0;9.0;10.0;12.0+PTX", (13, 0), True),
    ("9.0a", (9, 0), True),
    ("10.0a", (10, 3), False),
    ("10.0f", (10, 3), True),
    ("9.0a+PTX", (10, 0), False),
    ("", (9, 0), False),
])  # fmt: skip
def test_which_devices_compiled_code_runs_on(archs: str, capability: tuple[int, int], runs: bool) -> None:
    assert covers(archs, capability) == runs


@pytest.mark.parametrize("kernels, archs, problem", [
    (False, "", "theseus_ext was built without CUDA kernels; rebuild with nvcc on PATH and THESEUS_CUDA=1"),
    (True, "9.0;10.0", "Old GPU has compute capability 8.6, but theseus_ext was compiled for 9.0;10.0; "
                       "rebuild with TORCH_CUDA_ARCH_LIST=8.6"),
])  # fmt: skip
def test_a_device_without_kernels_is_refused(monkeypatch, kernels: bool, archs: str, problem: str) -> None:
    facts = {"cuda_kernels": kernels, "cuda_arch_list": archs}
    monkeypatch.setattr("theseus_ext.devices.build_info", lambda: facts)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "Old GPU")
    assert theseus_ext.cuda_problem(torch.device("cuda:0")) == problem
    with FakeTensorMode():
        tokens = torch.empty(4, 3, device="cuda:0")
        vectors = {name: torch.empty(3, dtype=torch.float64, device="cuda:0") for name in (
            "source_sum", "target_sum", "source_energy", "target_energy")}  # fmt: skip
        cross = torch.empty(3, 3, dtype=torch.float64, device="cuda:0")
        with pytest.raises(NotImplementedError) as refusal:
            theseus_ext.cross_moment_(tokens, tokens, cross=cross, **vectors)
    assert str(refusal.value) == f"source is on cuda:0: {problem}, or move the tensors to the CPU"
    facts["cuda_kernels"], facts["cuda_arch_list"] = True, "8.0;9.0"
    assert theseus_ext.cuda_problem(torch.device("cuda:0")) is None
