"""Was an adapter trained on the source that is given? By its layers, by the name it records, by weights at hand."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

import torch

from ..errors import InputRefused
from ..files.checkpoint import Checkpoint
from ..models.base import Base
from ..models.family import Family
from ..models.geometry import Geometry
from ..models.tensors import rows_of
from .adapter import Adapter

SAMPLED, ROWS = 32, 16  # matrices, and rows of each, that are compared
UNRELATED = 0.05  # cosine of weights below which two models were trained apart
ROUNDED = 1e-5  # 1 - cosine up to which weights are the same, rounded: 2^-9 of each value gives 1e-6
QUANTISED = re.compile(r"(-unsloth)?-bnb-\d+bit$|-(gptq|awq)(-\w+)?$")  # what ends the names of quantised copies


def changed_by(adapter: Adapter, family: Family) -> set[str]:
    """Canonical names of the layers that an adapter factors."""
    return {part for spelled in adapter.layers() for part in family.parts(family.canonical(spelled))}


def check_layers(adapter: Adapter, source: Base, moved: Collection[str]) -> None:
    """Refuse an adapter of layers that the source does not have: no option could move them.

    Args:
        moved: canonical names of layers that have a rule, stored in the source or not (a tied head is not).
    """
    family, depth = source.geometry.family, source.geometry.depth
    known = {*moved, *(name.rpartition(".")[0] for name in source.slots)}
    names = {spelled: family.canonical(spelled) for spelled in adapter.layers()}
    foreign = [spelled for spelled, name in names.items() if not family.parts(name).keys() & known]
    if foreign:
        block = family.block_of(names[foreign[0]])
        lacks = f"has {depth} blocks" if block is not None and block >= depth else "has no such layer"
        raise InputRefused(
            f"the adapter changes {foreign[0]} ({len(foreign)} of its {len(names)} layers are like it), but the source "
            f"base {lacks}; give the base that the adapter was trained on as SOURCE"
        )


def shared_matrices(one: Base, other: Base) -> list[str]:
    """Canonical names of the matrices that two models have in one shape."""
    both = [name for name in one.slots if name in other.slots and len(one.shape(name)) > 1]
    return [name for name in both if one.shape(name) == other.shape(name)]


def cosine(one: Base, other: Base) -> float | None:
    """Cosine of weights of two models, over rows of matrices that both have; None where there are none, or zeros.

    Fine-tuning moves weights a little; two models trained apart are uncorrelated.
    """
    shared, sums = shared_matrices(one, other), torch.zeros(3, dtype=torch.float64)
    for name in shared[:: max(1, len(shared) // SAMPLED)]:
        a, b = (rows_of(base.tensors, base.slots[name].stored, slice(0, ROWS)).double() for base in (one, other))
        if a.shape == b.shape:
            sums += torch.stack([(a * b).sum(), a.square().sum(), b.square().sum()])
    return float(sums[0] / (sums[1] * sums[2]).sqrt()) if sums[1:].min() > 0 else None


def doubt_of_base(tuned: Checkpoint, source: Checkpoint, geometry: Geometry) -> str | None:
    """Why an adapter may be of another base than the source, in words; None: no reason.

    Raises:
        InputRefused: the base that it records is at hand and another model.
    """
    if tuned.kind != "adapter":
        return None
    return _doubt_by_record(tuned, source, geometry) or _doubt_by_depth(Adapter.of(tuned), source, geometry)


def _doubt_by_depth(adapter: Adapter, source: Checkpoint, geometry: Geometry) -> str | None:
    """By its last block: ``target_modules`` name layers of the source behind it, of which it has no factors."""
    family, config = geometry.family, adapter.config
    inside = (family.block_of(family.canonical(layer)) for layer in adapter.parts)
    held = [block for block in inside if block is not None]
    if not held or any(config.get(option) is not None for option in ("layers_to_transform", "exclude_modules")):
        return None
    behind = f"{family.blocks}.{max(held) + 1}."
    matrices = [name for name in source if family.canonical(name).startswith(behind) and len(source.shapes[name]) == 2]
    if not (missing := [layer for name in matrices if adapter.targets(layer := name.removesuffix(".weight"))]):
        return None
    return (
        f"the adapter has factors up to block {max(held)} of SOURCE's {geometry.depth}, and its target_modules name "
        f"{missing[0]} too: if it was trained on a base of {max(held) + 1} blocks, the moved adapter means nothing"
    )


def _doubt_by_record(tuned: Checkpoint, source: Checkpoint, geometry: Geometry) -> str | None:
    """By the base that its configuration records.

    Where that base is at hand, a folder or in the hub's cache, weights decide; else its name, and another name is no
    proof: folders are renamed, models mirrored.
    """
    recorded = tuned.adapter_config.get("base_model_name_or_path")
    if not isinstance(recorded, str) or not recorded.strip():
        return None
    trained = f"the adapter {tuned.folder} was trained on {recorded[:200]!r}"
    if (base := _at_hand(recorded)) is None:
        names = (str(source.folder), str(source.config.get("_name_or_path") or ""))
        if _name(recorded) in map(_name, names):
            return None
        return f"{trained}, and SOURCE is {source.folder}: if these are two models, the moved adapter means nothing"
    if base.folder.resolve() == source.folder.resolve():
        return None
    try:
        models = Base.of(base, Geometry.of(base.config)), Base.of(source, geometry)
        shared = shared_matrices(*models)
    except InputRefused:
        shared = []  # of a family that is not known
    agreement = cosine(*models) if shared else None
    if not shared or (agreement is not None and agreement < UNRELATED):
        differ = f"a cosine of weights of {agreement:.3f}" if shared else "no matrix of one shape"
        raise InputRefused(f"{trained}, which has {differ} with SOURCE {source.folder}; give {base.folder} as SOURCE")
    if agreement is not None and agreement < 1 - ROUNDED:
        return f"{trained}; SOURCE {source.folder} has other weights (cosine {agreement:.4f}), as if tuned further"
    return None


def _at_hand(recorded: str) -> Checkpoint | None:
    """The recorded base where it can be read without asking a network; None where it cannot, and decides nothing."""
    try:
        if (place := Path(recorded).expanduser()).is_dir():
            found = Checkpoint.open(place)
        elif re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", recorded):
            from huggingface_hub import snapshot_download  # imported late: local models need no hub client

            found = Checkpoint.open(snapshot_download(recorded, local_files_only=True))
        else:
            return None
    except (InputRefused, OSError, ValueError, RuntimeError):
        return None
    return found if found.config and found.kind == "checkpoint" else None


def _name(reference: str) -> str:
    """What a hub id, a folder or a folder of the hub's cache calls a model, without its owner."""
    parts = [part for part in re.split(r"[/\\]+", reference.strip().lower()) if part]
    cached = [part for part in parts if part.startswith("models--")]  # models--owner--name/snapshots/<revision>
    last = (cached or parts or [""])[-1].rpartition("--")[2]
    return QUANTISED.sub("", last)
