"""What a job refuses before anything heavy runs: inputs that cannot be what their names say."""

from __future__ import annotations

import ctypes
import logging
import resource
from collections.abc import Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path

import torch

import theseus_ext

from .checkpoint import Checkpoint, check_finite
from .errors import InputRefused
from .family import unwrapped
from .fates import Row
from .models import Base, canonical_shapes, check_shapes, row_tiles, rows_of
from .spaces import Layout
from .trained_on import UNRELATED, cosine, doubt_of_base

log = logging.getLogger(__name__)
M_MMAP_THRESHOLD = -3  # malloc.h


def named_device(name: str | torch.device) -> torch.device:
    """The device of that name, which may be ``meta``, of shapes alone; a requested one is never replaced by another."""
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


def read_layout(name: str, checkpoint: Checkpoint) -> Layout:
    """The geometry a base model's config promises and its tensors have."""
    if not checkpoint.config:
        raise InputRefused(f"{name} {checkpoint.folder} has no config.json; give a model's folder")
    if Checkpoint.open(checkpoint.folder, allow_pickle=True).files != checkpoint.files:
        raise InputRefused(f"{name} {checkpoint.files[0]} is not what its folder loads as; give it a folder of its own")
    if name != "SOURCE" and (wrapped := next((n for n in checkpoint if unwrapped(n) != n), None)):
        raise InputRefused(
            f"{name} {checkpoint.folder} has names as torch.compile or data parallelism wraps them ({wrapped}), "
            f"which transformers does not load; save them under their own names ({unwrapped(wrapped)})"
        )
    try:
        layout = Layout.of(checkpoint.config)
        check_shapes(layout, canonical_shapes(layout, checkpoint))
    except InputRefused as error:
        raise InputRefused(f"{name} {checkpoint.folder}: {error}") from error
    return layout


def check_dtypes(*checkpoints: Checkpoint) -> None:
    """Refuse weights of integers, which only a quantised model has."""
    for checkpoint in checkpoints:
        for name, dtype in checkpoint.dtypes.items():
            if name.endswith("weight") and not dtype.is_floating_point:
                raise InputRefused(f"{name} of {checkpoint.folder} is {dtype}, not floating point; dequantise it first")


def check_values(*checkpoints: Checkpoint) -> None:
    """Refuse NaN and Inf; reads everything."""
    for checkpoint in checkpoints:
        for name in checkpoint:
            for rows in row_tiles(checkpoint.shapes[name]) or (None,):
                check_finite(f"{name} of {checkpoint.folder}", rows_of(checkpoint, name, rows))


def check_tune(source: Checkpoint, tuned: Checkpoint, layout: Layout) -> None:
    """Refuse a TUNED of another base than SOURCE: other sizes, uncorrelated weights, or what an adapter records."""
    if tuned.kind == "adapter":
        doubt_of_base(tuned, source, layout)
        return
    trained = f"was {tuned.folder.name} trained from {source.folder.name}?"
    if tuned.config:
        other = Layout.of(tuned.config)
        sizes = ("depth", "width", "heads", "kv_heads", "head_dim", "middle")
        for what, ours, theirs in ((k, getattr(layout, k), getattr(other, k)) for k in sizes):
            if ours != theirs:
                raise InputRefused(f"{what} is {theirs} in TUNED and {ours} in SOURCE; {trained}")
    agreement = cosine(Base.of(source, layout), Base.of(tuned, layout))
    if agreement is not None and agreement < UNRELATED:  # where no shape agrees, the plan says which
        raise InputRefused(
            f"the weights of TUNED and SOURCE have cosine {agreement:.3f}, but a tune stays near 1: {trained}"
        )


def check_left(patterns: Sequence[str], coverage: Sequence[Row], source: Checkpoint, tuned: Checkpoint) -> None:
    """Refuse a pattern of --leave that matches no tensor (for an adapter: no layer) at all."""
    names = {row.tensor for row in coverage}
    if tuned.kind == "adapter":
        family = Layout.of(source.config).family
        for name in map(family.canonical, source):
            names |= {name, name.removesuffix(".weight")}
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise InputRefused(f"--leave {pattern!r} matches nothing; names read like {coverage[0].tensor!r}")


def return_freed_memory() -> None:
    """Have freed blocks from 4 MiB on go back to the system at once, so that the peak is that of what is in use."""
    with suppress(OSError, AttributeError):  # another C library than glibc has no such choice
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 4 << 20)


def trim_memory() -> None:
    """Give back what was freed in small blocks: large vocabularies leave ten times their file's size behind."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


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
