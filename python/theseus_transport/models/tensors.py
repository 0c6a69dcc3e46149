"""Tensors by name, of a module or of files alike: read without reading more, by rows, in tiles, in float64."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import InputRefused
from .family import Slot

Tensors = Mapping[str, Tensor]
CPU = torch.device("cpu")
TILE = 64 << 20  # bytes in float64: a larger matrix whose rows are independent is read, moved and written by row tiles
PIECE = 1 << 20  # elements an elementwise step works on at once, so that its temporaries stay small


def tensors_of(model: nn.Module | Tensors) -> Tensors:
    """The parameters and buffers of a module, or the mapping itself (a state dict, a lazy checkpoint)."""
    if hasattr(model, "peft_config"):
        raise InputRefused("this is a PEFT model: give its base, and the adapter's folder to Delta.from_adapter")
    if isinstance(model, nn.Module):
        return model.state_dict()
    if not isinstance(model, Mapping):
        shown = f" ({model!r})" if isinstance(model, (str, Path)) else ""
        told = f"a {type(model).__name__}{shown}"
        raise InputRefused(f"a model is given as {told}; give a torch module, a state dict, or Checkpoint.open(folder)")
    return model


def shape_of(tensors: Tensors, name: str) -> tuple[int, ...]:
    """Shape of a tensor, without reading it where the mapping knows shapes."""
    shapes = getattr(tensors, "shapes", None)
    return tuple(shapes[name] if shapes is not None else tensors[name].shape)


def dtype_of(tensors: Tensors, name: str) -> torch.dtype:
    """Dtype of a tensor, without reading it where the mapping knows dtypes."""
    dtypes = getattr(tensors, "dtypes", None)
    return dtypes[name] if dtypes is not None else tensors[name].dtype


def device_of(tensors: Tensors) -> torch.device:
    """The GPU of the first tensor that lies on one; else, and for what is read from files, the CPU."""
    known = [] if hasattr(tensors, "shapes") else tensors.values()
    return next((tensor.device for tensor in known if tensor.is_cuda), CPU)


def double(tensor: Tensor, device: torch.device = CPU) -> Tensor:
    """Detached, in float64 on ``device``, which it crosses to as it is stored: torch would convert on the CPU."""
    return tensor.detach().to(device).to(torch.float64)


def fresh(tensor: Tensor, device: torch.device = CPU) -> Tensor:
    """A copy of a tensor in float64 on ``device``, never the tensor itself: to be changed in place."""
    return tensor.detach().to(device).to(torch.float64, copy=True)


def rows_of(tensors: Tensors, name: str, rows: slice | None) -> Tensor:
    """A tensor, or these of its rows; no others are read where the mapping can read rows."""
    if rows is None:
        return tensors[name]
    read = getattr(tensors, "rows", None)
    found: Tensor = tensors[name][rows] if read is None else read(name, rows)
    return found


def part_of(tensors: Tensors, slot: Slot, rows: slice | None) -> Tensor:
    """A canonical tensor from the ``slot`` of the stored one where it is kept, or these of its rows."""
    if rows is None or slot.transposed:
        whole = slot.view(tensors[slot.stored].detach())
        return whole if rows is None else whole[rows]
    first = slot.part * slot.shape(shape_of(tensors, slot.stored))[0]
    return rows_of(tensors, slot.stored, slice(first + rows.start, first + rows.stop)).detach()


def row_tiles(shape: Sequence[int]) -> tuple[slice, ...]:
    """Row tiles, each of at most ``TILE`` bytes in float64 (or one row), of a matrix that is larger; else none."""
    if len(shape) != 2 or 8 * prod(shape) <= TILE:
        return ()
    step = max(1, TILE // (8 * shape[1]))
    return tuple(slice(first, min(first + step, shape[0])) for first in range(0, shape[0], step))


def chunks_of_rows(tensor: Tensor) -> tuple[Tensor, ...]:
    """Views of consecutive rows, each of at most ``PIECE`` elements (or one row)."""
    if not tensor.ndim:
        return (tensor,)
    parts: tuple[Tensor, ...] = tensor.split(max(1, PIECE * len(tensor) // max(1, tensor.numel())))
    return parts


def growing(shape: Sequence[int]) -> Iterator[slice | None]:
    """All rows of a tensor, a few at first, then twice as many each time up to ``PIECE`` elements; None: no rows."""
    if not shape:
        yield None
        return
    start, step, most = 0, 1, max(1, PIECE * shape[0] // max(1, prod(shape)))
    while start < shape[0]:
        yield slice(start, min(start + step, shape[0]))
        start, step = start + step, min(2 * step, most)


@dataclass(frozen=True)
class Seen:
    """How a tensor is seen: its first ``kept`` rows, then zeros; ``kept`` is 0 where there is no such tensor."""

    kept: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class SeenTensors(Mapping[str, Tensor]):
    """Tensors of which some are seen with other rows, or are all zero; read through, by rows too."""

    def __init__(self, tensors: Tensors, seen: Mapping[str, Seen], prefix: str = "") -> None:
        """
        Args:
            prefix: what to put in front of every name of ``tensors``; names in ``seen`` have it.
        """
        self._tensors, self._seen, self._prefix = tensors, seen, prefix
        names = {f"{prefix}{name}": name for name in tensors}
        own = {name: s.shape for name, s in seen.items()}
        self.shapes = {name: shape_of(tensors, stored) for name, stored in names.items()} | own
        kinds = {name: s.dtype for name, s in seen.items()}
        self.dtypes = {name: dtype_of(tensors, stored) for name, stored in names.items()} | kinds

    def origin(self, name: str) -> str:
        """The name, in what is read through, of what is seen as ``name``."""
        return name.removeprefix(self._prefix)

    def stored(self, name: str) -> str:
        """The name in what was read from in the first place, through all that it is seen through."""
        inner = self.origin(name)
        return str(getattr(self._tensors, "stored", str)(inner))

    def rows(self, name: str, rows: slice) -> Tensor:
        """Consecutive rows of a tensor."""
        seen = self._seen.get(name)
        if seen is None:
            return rows_of(self._tensors, self.origin(name), rows)
        zeros = torch.zeros(rows.stop - rows.start, *seen.shape[1:], dtype=seen.dtype)
        if (kept := min(rows.stop, seen.kept) - rows.start) <= 0:
            return zeros
        part = rows_of(self._tensors, self.origin(name), slice(rows.start, rows.start + kept)).detach()
        return torch.cat([part, zeros[kept:].to(part)])

    def __getitem__(self, name: str) -> Tensor:
        if name in self._seen:
            return self.rows(name, slice(0, self.shapes[name][0]))
        return self._tensors[self.origin(name)]

    def __contains__(self, name: object) -> bool:
        return name in self.shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def squares(tensor: Tensor) -> float:
    """Sum of squares, in float64."""
    return sum(float(double(piece, tensor.device).square().sum()) for piece in chunks_of_rows(tensor))
