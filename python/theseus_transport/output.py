"""Writing a moved update: an adapter PEFT loads, a checkpoint ``from_pretrained`` loads, or the task vector alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from .delta import PREFIX, Factors
from .errors import InputRefused
from .models import dtype_of, shape_of
from .update import Update
from .writer import check_writable, write_checkpoint

Kind = Literal["adapter", "checkpoint", "delta"]
Planned = tuple[str, Sequence[int], torch.dtype, Callable[[], Tensor]]
LOST = 0.1  # share of an update that rounding may swallow before it is worth a warning


def write_update(
    update: Update,
    folder: str | Path,
    kind: Kind,
    *,
    files: Mapping[str, bytes | str | Path | Callable[[], str]] | None = None,
    metadata: Callable[[], Mapping[str, Any]] | None = None,
    base_name: str | None = None,
    overwrite: bool = False,
    inputs: Sequence[Path] = (),
    progress: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Write the update, whole or not at all; values are computed one layer at a time while writing.

    Args:
        kind: ``adapter`` (for a LoRA), ``checkpoint`` (target base plus update, in the base's dtypes) or ``delta``.
        files: what belongs beside it, by name: configuration, tokenizer, model card (a function is called once
            all tensors are written).
        base_name: what an adapter's configuration should name as its base.
        metadata: makes what the manifest should record, once all tensors are written.
        progress: called after every tensor.

    Returns:
        The manifest.
    """
    if kind == "adapter" and update.delta.adapter is None:
        raise InputRefused("a full fine-tune has no low-rank factors; write it as a checkpoint or a delta")
    extra: dict[str, bytes | str | Path | Callable[[], str]] = dict(files or {})
    if kind == "adapter":
        extra["adapter_config.json"] = adapter_config(update, base_name)
    tensors = [(n, s, d, partial(_then, make, progress)) for n, s, d, make in planned(update, kind)]
    stem = {"adapter": "adapter_model", "checkpoint": "model", "delta": "delta"}[kind]
    return write_checkpoint(
        folder, tensors, stem=stem, files=extra, metadata=metadata, overwrite=overwrite, inputs=inputs
    )


def planned(update: Update, kind: Kind) -> list[Planned]:
    """Name, shape, dtype and computation of every tensor the output will hold."""
    return list({"adapter": _adapter, "checkpoint": _checkpoint, "delta": _delta}[kind](update))


def check_output(update: Update, folder: str | Path, kind: Kind, *, overwrite: bool, inputs: Sequence[Path]) -> int:
    """Bytes the output will take; refuses a folder that cannot be written, before anything heavy runs."""
    nbytes = sum(torch.Size(shape).numel() * dtype.itemsize for _, shape, dtype, _ in planned(update, kind))
    check_writable(folder, nbytes, overwrite=overwrite, inputs=inputs)
    return nbytes


def adapter_config(update: Update, base_name: str | None) -> str:
    """The source adapter's configuration with the target as its base; ranks and alphas stay.

    Where not all of the adapter moved, or the target's class names its modules otherwise, what moved is listed by name.
    """
    adapter, source, target = update.delta.adapter, update.source_family, update.family
    assert adapter is not None
    config = {**adapter.config, "base_model_name_or_path": base_name, "inference_mode": True, "revision": None}
    keys = adapter.layers()
    as_it_was = {layer: (adapter.rank(layer), adapter.scaling(layer)) for layer in keys}
    if as_it_was != {layer: (moved.rank, moved.scaling) for layer, moved in update.factors.items()}:
        root = (lambda r: r**0.5) if config.get("use_rslora") else float
        config |= {
            "target_modules": sorted(update.factors),
            "rank_pattern": {layer: moved.rank for layer, moved in update.factors.items()},
            "alpha_pattern": {layer: moved.scaling * root(moved.rank) for layer, moved in update.factors.items()},
            **dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern")),
        }
    if source is not target:
        config["fan_in_fan_out"] = bool(target.transposed)
    whole = {name: source.canonical(name) in update.target for name in adapter.whole()}
    if not all(whole.values()):  # else PEFT looks for a head that is not there
        modules = {name.rpartition(".")[0].rpartition(".")[2] for name, kept in whole.items() if kept}
        config |= {"modules_to_save": sorted(modules) or None, "task_type": None}
    return json.dumps(config, indent=2, sort_keys=True)


def _adapter(update: Update) -> Iterator[Planned]:
    adapter = update.delta.adapter
    assert adapter is not None
    for layer, moved in update.factors.items():
        once = lru_cache(maxsize=1)(moved.compute)
        out_features, in_features = moved.shape
        sizes = {"a": (moved.rank, in_features), "b": (out_features, moved.rank)}
        for part, size in sizes.items():
            make = partial(_factor, once, part, moved.dtype, 1.0 if part == "a" else update.alpha)
            yield f"{PREFIX}{layer}.lora_{part.upper()}.weight", size, moved.dtype, make
    for name in adapter.whole():
        canonical = update.source_family.canonical(name)
        if canonical in update.target:
            stored = update.target.slots[canonical].stored
            shape, dtype = shape_of(update.target.tensors, stored), dtype_of(update.target.tensors, stored)
            yield f"{PREFIX}{stored}", shape, dtype, partial(_tuned, update, stored)


def _checkpoint(update: Update) -> Iterator[Planned]:
    for name in dict.fromkeys(slot.stored for slot in update.target.slots.values()):
        tensors = update.target.tensors
        yield name, shape_of(tensors, name), dtype_of(tensors, name), partial(_tuned, update, name)


def _delta(update: Update) -> Iterator[Planned]:
    for name in update:
        yield name, shape_of(update.target.tensors, name), update.dtype(name), partial(update.__getitem__, name)


def _tuned(update: Update, name: str) -> Tensor:
    """Base plus update in the base's dtype; says where rounding swallows the update."""
    base = update.target.tensors[name].detach().cpu()
    if name not in update:
        return base
    change = update[name].cpu()
    exact = base.to(change.dtype) + change
    rounded = exact.to(base.dtype)
    swallowed = float((rounded.to(change.dtype) - exact).norm() / change.norm().clamp(min=1e-30))
    if swallowed > LOST and float(change.norm()) > 0:
        update.warnings.append(
            f"{name}: rounding to {str(base.dtype).removeprefix('torch.')} swallows {swallowed:.0%} of the update; "
            "--output delta keeps it"
        )
    return rounded


def _factor(once: Callable[[], Factors], part: str, dtype: torch.dtype, alpha: float) -> Tensor:
    return (getattr(once(), part) * alpha).to(dtype).contiguous()


def _then(make: Callable[[], Tensor], progress: Callable[[], object]) -> Tensor:
    tensor = make()
    progress()
    return tensor
