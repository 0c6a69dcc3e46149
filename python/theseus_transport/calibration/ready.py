"""Calibration data that are tensors already: one .safetensors, checked against both models."""

from __future__ import annotations

from pathlib import Path

import torch

from ..activations.inputs import SideInfo, check_tensors
from ..activations.pairing_tokens import Tensors
from ..errors import InputRefused
from ..files.checkpoint import Checkpoint, check_finite
from ..models.pair import SIDES, Pair

KEYS = ("input_ids", "attention_mask", "pixel_values", "offsets")


def ready_tensors(path: Path, infos: Pair[SideInfo]) -> Pair[Tensors]:
    """Both sides of a file of ready tensors, as :func:`load_calibration` says; one dict where they read the same."""
    file = Checkpoint.open(path)
    split = [name.rpartition(".") for name in file]
    wrong = [name for name, (side, _, key) in zip(file, split, strict=True) if key not in KEYS or side not in
             ("", *SIDES)]  # fmt: skip
    if wrong:
        raise InputRefused(f"{path}: {wrong[0]!r} is not known; names are {', '.join(KEYS)}, or source.… and target.…")
    prefixes = {side for side, _, _ in split}
    if prefixes not in ({""}, {*SIDES}):
        raise InputRefused(f"{path} holds {', '.join(file)}; give both source.… and target.…, or plain names only")
    if prefixes == {""}:
        shared = dict(file)
        for info in infos:
            _check_side(path, "", shared, info)
        return Pair(shared, shared)

    def side_of(label: str) -> Tensors:
        return {name.removeprefix(f"{label}."): file[name] for name in file if name.startswith(f"{label}.")}

    sides = SIDES.map(side_of)
    for label, side, info in zip(SIDES, sides, infos, strict=True):
        _check_side(path, f"{label}.", side, info)
    rows = sides.map(lambda side: len(next(iter(side.values()))))
    if rows.source != rows.target:
        raise InputRefused(
            f"{path}: {rows.source} source rows and {rows.target} target rows; row i must be the same text or image"
        )
    if ("offsets" in sides.source) != ("offsets" in sides.target):
        raise InputRefused(f"{path}: offsets on one side only; give source.offsets and target.offsets")
    if infos.source.kind == "text" and "offsets" not in sides.source:
        own, other = sides.map(lambda side: side["attention_mask"])
        if own.shape != other.shape or not torch.equal(own, other):
            raise InputRefused(
                f"{path}: source tokens {list(own.shape)} and target tokens {list(other.shape)} differ in "
                "shape or mask, so they cannot pair one to one; add source.offsets and target.offsets [n, tokens, 2]"
            )
    return sides


def _check_side(path: Path, prefix: str, side: Tensors, info: SideInfo) -> None:
    """Validate one side in place (integers become int64); every refusal names values and the model."""
    main = "pixel_values" if info.kind == "vision" else "input_ids"
    allowed = {main} if info.kind == "vision" else {main, "attention_mask"} | ({"offsets"} if prefix else set())
    if main not in side or not set(side) <= allowed:
        raise InputRefused(
            f"{path} holds {', '.join(prefix + key for key in side)}; {info.name} is a {info.kind} model and needs "
            f"{prefix}{main}" + ("" if len(allowed) == 1 else f", with {prefix}attention_mask if wanted")
        )
    check_tensors(f"{path}: {prefix}", side, info)
    if info.kind == "vision":
        check_finite(f"{path}: {prefix}pixel_values", side[main])
        return
    side |= {key: tensor.long() for key, tensor in side.items()}
    if not side.setdefault("attention_mask", torch.ones_like(side[main])).any(dim=1).all():
        raise InputRefused(f"{path}: {prefix}attention_mask must hold a 1 in every row")
