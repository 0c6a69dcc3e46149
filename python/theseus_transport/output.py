"""Writing a moved update: an adapter PEFT loads, a checkpoint ``from_pretrained`` loads, or the task vector alone."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from .delta import PREFIX, Factors
from .errors import InputRefused
from .folder import check_writable
from .models import dtype_of, shape_of
from .update import Update
from .writer import Output, write_checkpoints

Kind = Literal["adapter", "checkpoint", "delta"]
Planned = tuple[str, Sequence[int], torch.dtype, Callable[[], Tensor]]
Files = Mapping[str, bytes | str | Path | Callable[[], str]]
LOST = 0.1  # share of an update that rounding may swallow before it is worth a warning
NAMED = 3  # tensors a warning names


@dataclass
class Rounding:
    """What writing base plus update in the output's dtype loses: |round(W + d) - W - d| / |d|, by tensor."""

    shares: dict[str, float] = field(default_factory=dict)
    lost: float = 0.0  # sum of squares of what rounding changed
    moved: float = 0.0  # sum of squares of the update

    def add(self, name: str, base: Tensor, change: Tensor, rounded: Tensor) -> None:
        lost = float((rounded.double() - base.double() - change.double()).square().sum())
        if moved := float(change.double().square().sum()):
            self.shares[name] = (lost / moved) ** 0.5
            self.lost, self.moved = self.lost + lost, self.moved + moved

    @property
    def total(self) -> float:
        """|round(W + d) - W - d| / |d| over all tensors; 0 where nothing was added."""
        return (self.lost / self.moved) ** 0.5 if self.moved else 0.0

    def as_dict(self) -> dict[str, Any]:
        return {"total": self.total, "tensors": self.shares}

    def warnings(self) -> list[str]:
        """One sentence that names the worst tensors, if rounding swallows more than a tenth of any."""
        worst = sorted((n for n, share in self.shares.items() if share > LOST), key=lambda n: -self.shares[n])
        if not worst:
            return []
        named = ", ".join(f"{name} {self.shares[name]:.0%}" for name in worst[:NAMED])
        return [
            f"rounding swallows more than {LOST:.0%} of the update of {len(worst)} tensors ({self.total:.0%} of all), "
            f"worst {named}; --out-dtype float32 or --output delta keeps it"
        ]


@dataclass
class Written:
    """One folder to write: where, how strong, what belongs beside the tensors; what rounding lost, once written."""

    folder: str | Path
    alpha: float
    files: Files | None = None
    metadata: Callable[[], Mapping[str, Any]] | None = None
    rounding: Rounding = field(default_factory=Rounding)


def write_update(
    update: Update, folder: str | Path, kind: Kind, *, base_name: str | None = None, overwrite: bool = False
) -> dict[str, Any]:
    """Write the update as one folder, nothing beside it; returns the manifest. See :func:`write_updates`."""
    output = Written(folder, update.alpha)
    return write_updates(update, [output], kind, base_name=base_name, overwrite=overwrite)[0]


def write_updates(
    update: Update,
    outputs: Sequence[Written],
    kind: Kind,
    *,
    dtype: torch.dtype | None = None,
    base_name: str | None = None,
    overwrite: bool = False,
    inputs: Sequence[Path] = (),
    progress: Callable[[], object] = lambda: None,
) -> list[dict[str, Any]]:
    """Write the update, each folder whole or not at all; values are computed one layer at a time while writing.

    Args:
        outputs: the folders; each tensor is moved once for all of them.
        kind: ``adapter`` (for a LoRA), ``checkpoint`` (target base plus update) or ``delta``.
        dtype: of what is written; None keeps the base's (checkpoint), the adapter's own, or float32 (delta).
        base_name: what an adapter's configuration should name as its base.
        progress: called after every tensor of the first folder.

    Returns:
        The manifests.
    """
    if kind == "adapter" and update.delta.adapter is None:
        raise InputRefused("a full fine-tune has no low-rank factors; write it as a checkpoint or a delta")
    if kind == "adapter" and not update.family.adapters:
        raise InputRefused(f"PEFT cannot wrap the layers of {update.family.model_type}; write a checkpoint or a delta")
    made = []
    for i, (view, out) in enumerate(zip(at_alphas(update, [o.alpha for o in outputs]), outputs, strict=True)):
        files: dict[str, Any] = dict(out.files or {})
        if kind == "adapter":
            files["adapter_config.json"] = adapter_config(view, base_name)
        step = (lambda: None) if i else progress
        tensors = [(n, s, d, partial(_then, make, step)) for n, s, d, make in planned(view, kind, dtype, out.rounding)]
        made.append(Output(out.folder, tensors, files, out.metadata))
    stem = {"adapter": "adapter_model", "checkpoint": "model", "delta": "delta"}[kind]
    return write_checkpoints(made, stem=stem, overwrite=overwrite, inputs=inputs)


def at_alphas(update: Update, alphas: Sequence[float]) -> list[Update]:
    """The update at several strengths; the last tensor moved is kept, so that asking each in turn moves it once."""
    last: Any = lru_cache(maxsize=1)(lambda compute: compute())
    factors = {n: replace(moved, compute=partial(last, moved.compute)) for n, moved in update.factors.items()}
    return [replace(update, alpha=alpha, factors=factors, _kept={}) for alpha in alphas]


def planned(
    update: Update, kind: Kind, dtype: torch.dtype | None = None, rounding: Rounding | None = None
) -> list[Planned]:
    """Name, shape, dtype and computation of every tensor the output will hold; ``rounding`` learns while writing."""
    rounding = rounding or Rounding()
    if kind == "delta":
        return list(_delta(update, dtype))
    return list((_adapter if kind == "adapter" else _checkpoint)(update, dtype, rounding))


def check_output(
    update: Update,
    folders: Sequence[str | Path],
    kind: Kind,
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    inputs: Sequence[Path] = (),
) -> int:
    """Bytes the outputs will take; refuses folders that cannot be written, before anything heavy runs."""
    sizes = [torch.Size(shape).numel() * d.itemsize for _, shape, d, _ in planned(update, kind, dtype)]
    nbytes = len(folders) * sum(sizes)
    for folder in folders:
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
    depths = {
        base.layout.depth for base in (update.source, update.target)
    }  # a deeper target has more of the same names
    if len(depths) > 1 or as_it_was != {n: (moved.rank, moved.scaling) for n, moved in update.factors.items()}:
        root = (lambda r: r**0.5) if config.get("use_rslora") else float
        config |= {
            "target_modules": sorted(update.factors),
            "rank_pattern": {layer: moved.rank for layer, moved in update.factors.items()},
            "alpha_pattern": {layer: moved.scaling * root(moved.rank) for layer, moved in update.factors.items()},
            **dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern")),
        }
    turned = [any(re.search(p, layer) for p in target.transposed) for layer in update.factors]
    if source is not target and turned:
        config["fan_in_fan_out"] = all(turned)
    whole = whole_tensors(update)
    if len(whole) != len(adapter.whole()) or source is not target:  # else PEFT looks for a head that is not there
        modules = {into.rpartition(".")[0].rpartition(".")[2] for into in whole.values()}
        config |= {"modules_to_save": sorted(modules) or None, "task_type": None}
    return json.dumps(config, indent=2, sort_keys=True)


def _adapter(update: Update, dtype: torch.dtype | None, rounding: Rounding) -> Iterator[Planned]:
    adapter = update.delta.adapter
    assert adapter is not None
    for layer, moved in update.factors.items():
        once = lru_cache(maxsize=1)(moved.compute)
        out_features, in_features = moved.shape
        own = dtype or moved.dtype
        for part, size in {"a": (moved.rank, in_features), "b": (out_features, moved.rank)}.items():
            make = partial(_factor, once, part, own, 1.0 if part == "a" else update.alpha)
            yield f"{PREFIX}{layer}.lora_{part.upper()}.weight", size, own, make
    for into in whole_tensors(update).values():
        stored = update.target.slots[into].stored
        shape, own = shape_of(update.target.tensors, stored), _own(update, stored, dtype)
        yield f"{PREFIX}{stored}", shape, own, partial(_tuned, update, stored, own, rounding)


def whole_tensors(update: Update) -> dict[str, str]:
    """What an adapter saves whole and the target has a place for: name in the adapter -> canonical name there."""
    adapter, source = update.delta.adapter, update.source_family
    assert adapter is not None
    modules = {own.rpartition(".")[0]: into.rpartition(".")[0] for own, into in update.moved.items()}
    found = {}
    for name in adapter.whole():
        module, _, kind = source.canonical(name).rpartition(".")
        into = f"{modules.get(module, module if source is update.family else '')}.{kind}"
        if into in update.target:
            found[name] = into
    return found


def _checkpoint(update: Update, dtype: torch.dtype | None, rounding: Rounding) -> Iterator[Planned]:
    for name in dict.fromkeys(slot.stored for slot in update.target.slots.values()):
        own = _own(update, name, dtype)
        yield name, shape_of(update.target.tensors, name), own, partial(_tuned, update, name, own, rounding)


def _delta(update: Update, dtype: torch.dtype | None) -> Iterator[Planned]:
    for name in update:
        own = dtype or update.dtype(name)
        yield name, shape_of(update.target.tensors, name), own, partial(_cast, update, name, own)


def _cast(update: Update, name: str, dtype: torch.dtype) -> Tensor:
    return update[name].to(dtype)


def _own(update: Update, name: str, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype to write a tensor of the target in: the base's, or the one asked for where it is floating point."""
    own = dtype_of(update.target.tensors, name)
    return dtype if dtype is not None and own.is_floating_point else own


def _tuned(update: Update, name: str, dtype: torch.dtype, rounding: Rounding) -> Tensor:
    """Base plus update."""
    base = update.target.tensors[name].detach().cpu()
    if name not in update:
        return base.to(dtype)
    change = update[name].cpu()
    rounded = (base.to(change.dtype) + change).to(dtype)
    rounding.add(name, base, change, rounded)
    return rounded


def _factor(once: Callable[[], Factors], part: str, dtype: torch.dtype, alpha: float) -> Tensor:
    factor: Tensor = getattr(once(), part)
    return (factor * alpha).to(dtype).contiguous()


def _then(make: Callable[[], Tensor], progress: Callable[[], object]) -> Tensor:
    tensor = make()
    progress()
    return tensor
