"""Whether the kernels that were compiled run on a CUDA device."""

from __future__ import annotations

import re
from functools import lru_cache

import torch

from theseus_ext._C import build_info


@lru_cache
def covers(archs: str, capability: tuple[int, int]) -> bool:
    """Whether code for ``archs``, as in "8.0;9.0+PTX", runs on a device of compute ``capability``, as in (8, 6).

    Machine code runs on the same major version from its minor version on (9.0a: on 9.0 alone); PTX on everything newer.
    """
    for major, minor, suffix, ptx in re.findall(r"(\d+)\.(\d)([af]?)(\+PTX)?", archs):
        compiled = int(major), int(minor)
        if suffix == "a":
            runs = capability == compiled
        else:
            runs = capability >= compiled and (capability[0] == compiled[0] or (ptx and not suffix))
        if runs:
            return True
    return False


def cuda_problem(device: torch.device) -> str | None:
    """Why this build cannot run on a CUDA device, with the cure, or None."""
    info = build_info()
    if not info["cuda_kernels"]:
        return "theseus_ext was built without CUDA kernels; rebuild with nvcc on PATH and THESEUS_CUDA=1"
    capability = torch.cuda.get_device_capability(device)
    if covers(info["cuda_arch_list"], capability):
        return None
    name, needed = torch.cuda.get_device_name(device), "{}.{}".format(*capability)
    return (
        f"{name} has compute capability {needed}, but theseus_ext was compiled for {info['cuda_arch_list']}; "
        f"rebuild with TORCH_CUDA_ARCH_LIST={needed}"
    )
