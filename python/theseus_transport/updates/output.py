"""Writing a moved update: an adapter PEFT loads, a checkpoint ``from_pretrained`` loads, or the task vector alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import InputRefused
from ..files.checkpoint import Checkpoint
from ..files.writer import Files, Output, Planned, write_checkpoints
from ..models.precision import Rounding
from ..models.tensors import dtype_of, rows_of, shape_of
from .adapted import adapter_config, saved_whole
from .adapter import PREFIX, Factors
from .computed import ComputedUpdate

Kind = Literal["adapter", "checkpoint", "delta"]


@dataclass
class Written:
    """One folder to write: where, how strong, what belongs beside the tensors; what rounding lost, once written."""

    folder: str | Path
    alpha: float
    files: Files | None = None
    rounding: Rounding = field(default_factory=Rounding)


def write_update(
    update: ComputedUpdate, folder: str | Path, kind: Kind, *, base_name: str | None = None, overwrite: bool = False
) -> dict[str, Any]:
    """Write the update as one folder, nothing beside it; returns the manifest. See :func:`write_updates`."""
    output = Written(folder, update.alpha)
    return write_updates(update, [output], kind, base_name=base_name, overwrite=overwrite)[0]


def write_updates(
    update: ComputedUpdate,
    outputs: Sequence[Written],
    kind: Kind,
    *,
    dtype: torch.dtype | None = None,
    base_name: str | None = None,
    overwrite: bool = False,
) -> list[dict[str, Any]]:
    """Write the update, each folder whole or not at all; values are computed one layer at a time while writing.

    Args:
        outputs: the folders; each tensor is moved once for all of them.
        kind: ``adapter`` (of what has factors), ``checkpoint`` (target base plus update) or ``delta``.
        dtype: of what is written; None keeps the base's (checkpoint), the adapter's own, or float32 (delta).
        base_name: what an adapter's configuration should name as its base.

    Returns:
        The manifests.
    """
    stem, made = described_outputs(update, outputs, kind, dtype=dtype, base_name=base_name)
    return write_checkpoints(made, stem=stem, overwrite=overwrite)


def described_outputs(
    update: ComputedUpdate,
    outputs: Sequence[Written],
    kind: Kind,
    *,
    dtype: torch.dtype | None = None,
    base_name: str | None = None,
) -> tuple[str, list[Output]]:
    """The stem of the files, and what is planned for each folder; arguments as for :func:`write_updates`."""
    if kind == "adapter" and not update.factors:
        told = (
            "a full fine-tune has no factors" if update.fits.rank is None else "nothing that factors hold has changed"
        )
        raise InputRefused(f"{told}; transport(..., rank=16) makes some, or write it as a checkpoint or a delta")
    if kind != "adapter":
        update.as_tensors()
    elif not update.family.adapters:
        raise InputRefused(f"PEFT cannot wrap the layers of {update.family.model_type}; write a checkpoint or a delta")
    made = []
    for view, out in zip(at_alphas(update, [o.alpha for o in outputs]), outputs, strict=True):
        files: dict[str, Any] = dict(out.files or {})
        if kind == "adapter":
            files["adapter_config.json"] = adapter_config(view, base_name)
        made.append(Output(out.folder, planned(view, kind, dtype, out.rounding), files))
    return {"adapter": "adapter_model", "checkpoint": "model", "delta": "delta"}[kind], made


def highest_rank(update: ComputedUpdate, kind: Kind) -> int | None:
    """Of the factors that are written, if any are."""
    return max((moved.rank for moved in update.factors.values()), default=None) if kind == "adapter" else None


class LastFactors:
    """The factors computed last, kept since A and B of a layer, and its several strengths, come one after another."""

    def __init__(self) -> None:
        self._kept: tuple[Callable[[], Factors], Factors] | None = None

    def of(self, compute: Callable[[], Factors]) -> Factors:
        """What ``compute`` gives; computed anew only where another came between."""
        if self._kept is None or self._kept[0] != compute:
            self._kept = compute, compute()
        return self._kept[1]


def at_alphas(update: ComputedUpdate, alphas: Sequence[float]) -> list[ComputedUpdate]:
    """The update at several strengths; the last tensor moved is kept, so that asking each in turn moves it once."""
    last = LastFactors()
    factors = {n: replace(moved, compute=partial(last.of, moved.compute)) for n, moved in update.factors.items()}
    return [replace(update, alpha=alpha, factors=factors) for alpha in alphas]


def planned(
    update: ComputedUpdate, kind: Kind, dtype: torch.dtype | None = None, rounding: Rounding | None = None
) -> list[Planned]:
    """Every tensor the output will hold, in order; ``rounding`` learns while they are made.

    Of presumed changes, a tensor that turns out not to move is made as the base's; in a ``delta`` it has no place.
    """
    rounding = rounding or Rounding()
    if kind == "delta":
        return list(_delta(update, dtype))
    return list((_adapter if kind == "adapter" else _checkpoint)(update, dtype, rounding))


def _adapter(update: ComputedUpdate, dtype: torch.dtype | None, rounding: Rounding) -> Iterator[Planned]:
    for layer, moved in update.factors.items():
        out_features, in_features = moved.shape
        own = dtype or moved.dtype
        for part, size in {"a": (moved.rank, in_features), "b": (out_features, moved.rank)}.items():
            alpha = 1.0 if part == "a" else update.alpha
            name = f"{PREFIX}{layer}.lora_{part.upper()}.weight"
            yield Planned(name, size, own, partial(_factor, moved.compute, part, own, alpha), needs=moved.needs)
    for name, stored in saved_whole(update).items():
        yield _whole(update, stored, dtype, rounding)._replace(name=f"{PREFIX}{name}")


def _checkpoint(update: ComputedUpdate, dtype: torch.dtype | None, rounding: Rounding) -> Iterator[Planned]:
    for name in dict.fromkeys(slot.stored for slot in update.target.slots.values()):
        yield _whole(update, name, dtype, rounding)


def _whole(update: ComputedUpdate, name: str, dtype: torch.dtype | None, rounding: Rounding) -> Planned:
    """A tensor of the target, update included."""
    shape, own = shape_of(update.target.tensors, name), _own(update, name, dtype)
    make = partial(_tuned, update, name, own, rounding)
    return Planned(name, shape, own, make, update.tiles(name), update.needs(name))


def _delta(update: ComputedUpdate, dtype: torch.dtype | None) -> Iterator[Planned]:
    for name in update.planned:
        shape, own = shape_of(update.target.tensors, name), dtype or update.dtype(name)
        make = partial(_cast, update, name, own)
        yield Planned(name, shape, own, make, update.tiles(name), update.needs(name))


def _cast(update: ComputedUpdate, name: str, dtype: torch.dtype, rows: slice | None) -> Tensor:
    return rows_of(update, name, rows).to(dtype)


def _own(update: ComputedUpdate, name: str, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype to write a tensor of the target in: the base's, or the one asked for where it is floating point."""
    own = dtype_of(update.target.tensors, name)
    return dtype if dtype is not None and own.is_floating_point else own


def _tuned(update: ComputedUpdate, name: str, dtype: torch.dtype, rounding: Rounding, rows: slice | None) -> Tensor:
    """Base plus update, or these rows of it; the base's own bits where nothing moves."""
    base = rows_of(update.target.tensors, name, rows).detach().cpu()
    if name not in update:
        return base.to(dtype)
    change, rounded = rows_of(update, name, rows), torch.empty(base.shape, dtype=dtype)
    rounding.put(rounded, name, base, change)
    return rounded


def _factor(compute: Callable[[], Factors], part: str, dtype: torch.dtype, alpha: float, rows: slice | None) -> Tensor:
    factor: Tensor = getattr(compute(), part)
    return (factor * alpha).to(dtype).contiguous()


def kind_of(asked: Literal["auto"] | Kind, tuned: Checkpoint, rank: int | None = None) -> Kind:
    """What to write for a tune, where ``auto`` is an adapter for an adapter and a checkpoint for a checkpoint.

    Raises:
        InputRefused: a rank is asked for of what is no adapter.
    """
    auto: Kind = "adapter" if tuned.kind == "adapter" else "checkpoint"
    kind = auto if asked == "auto" else asked
    if rank is not None and kind != "adapter":
        raise InputRefused(f"--rank {rank} is of an adapter, a {kind} has none; add --output adapter, or leave it out")
    return kind
