"""What this machine has: devices; memory, in bytes; the rate of its products, in flops per second."""

from __future__ import annotations

import ctypes
import re
import resource
import time
from contextlib import suppress
from pathlib import Path

import torch

import theseus_ext

from .errors import InputRefused

M_MMAP_THRESHOLD = -3  # malloc.h


def named_device(name: str | torch.device) -> torch.device:
    """The device of that name, which may be ``meta``, of shapes alone; a requested one is never replaced by another.

    Raises:
        InputRefused: there is no such device here.
    """
    name = str(name)
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputRefused(f"device is {name!r}; give cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda", "meta") or (device.type == "cpu" and device.index):
        raise InputRefused(f"device is {name!r}; only cpu, cuda and cuda:N are supported")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputRefused(f"device is {name}, but this torch sees no GPU; give cpu, or leave it out")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputRefused(f"device is {name}, but this torch sees {torch.cuda.device_count()} GPUs; give cuda:0")
    return device


def find_device(name: str | torch.device) -> torch.device:
    """:func:`named_device`, on which models can run."""
    device = named_device(name)
    if device.type == "meta":
        raise InputRefused(f"device is {str(name)!r}; only cpu, cuda and cuda:N are supported")
    if device.type == "cuda" and (problem := theseus_ext.cuda_problem(device)):
        raise InputRefused(f"device is {name}: {problem}, or use --device cpu")
    return device


def return_freed_memory() -> None:
    """Have freed blocks of 4 MiB and more go back to the system at once, so that the peak is that of what is in use."""
    with suppress(OSError, AttributeError):  # another C library than glibc has no such choice
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 4 << 20)


def free_device_memory(device: torch.device) -> int | None:
    """Free bytes of a GPU's memory; None for the CPU."""
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else None


def resident_memory() -> int:
    """Bytes of memory this process has now, where the system says; else 0."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return 0


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory did not suffice: torch raises RuntimeError for the host's."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error)


def available_memory() -> int | None:
    """Available host memory in bytes, where the system says."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)


def peak_memory() -> int:
    """The most bytes of memory this process has had, without what started it where the system tells them apart."""
    with suppress(OSError):
        if found := re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text()):
            return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


TRIAL = 768  # edge of the square matrices whose product measures the rate


def rate(dtype: torch.dtype, device: torch.device | str = "cpu") -> float:
    """Flops per second of a matrix product here and now, the best of three."""
    a = torch.ones(TRIAL, TRIAL, dtype=dtype, device=device)
    a @ a  # first calls set up threads and handles
    best = float("inf")
    for _ in range(3):
        _wait(a.device)
        start = time.perf_counter()
        a @ a
        _wait(a.device)
        best = min(best, time.perf_counter() - start)
    return 2 * TRIAL**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
