"""What both models read, and the refusal of what they cannot, before anything runs on it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import InputRefused
from ..models.forward import MAIN_INPUT, Batch
from ..models.geometry import Geometry
from ..models.pair import SIDES, Pair
from .pairing_tokens import check_correspond


@dataclass(frozen=True)
class SideInfo:
    """What calibration has to know of one model; `tokens_per_image` is what one image counts as (patches)."""

    folder: Path
    kind: str  # "text" or "vision"
    name: str
    vocab_size: int | None = None
    channels: int | None = None
    image_size: int | tuple[int, int] | None = None  # pixels: side, or (height, width)
    max_positions: int | None = None  # tokens
    tokens_per_image: int = 1

    @classmethod
    def of(cls, geometry: Geometry, name: str, folder: Path = Path()) -> SideInfo:
        vision = geometry.family.modality == "vision"
        return cls(
            folder=folder,
            kind=geometry.family.modality,
            name=name,
            vocab_size=geometry.vocabulary,
            channels=geometry.channels,
            image_size=geometry.image,
            max_positions=geometry.positions,
            tokens_per_image=geometry.grid[0] * geometry.grid[1] + sum(geometry.ahead) if vision else 1,
        )

    @property
    def main(self) -> str:
        """The argument of the forward pass that it cannot do without."""
        return MAIN_INPUT[self.kind]


def checked_batches(batches: Iterable[Batch | tuple[Batch, Batch]], geometries: Pair[Geometry]) -> list[Pair[Batch]]:
    """Pairs of batches, each of arguments that its model can read and that correspond.

    Raises:
        InputRefused: they are no such batches; the message names the batch, the values and the model.
    """
    if isinstance(batches, (Mapping, torch.Tensor, str)) or not isinstance(batches, Iterable):
        raise InputRefused(
            f"batches is a {type(batches).__name__}, and must be a list of batches, each a dict of forward arguments; "
            "give [batch]"
        )
    infos = geometries.zip(SIDES).map(lambda of: SideInfo.of(of[0], f"the {of[1]}"))
    pairs: list[Pair[Batch]] = []
    for i, batch in enumerate(batches):
        pair = Pair(*batch) if isinstance(batch, tuple) and len(batch) == 2 else Pair(batch, batch)
        for info, side in infos.zip(pair):
            if not isinstance(side, Mapping):
                raise InputRefused(
                    f"batch {i} of {info.name} is {_described(side)}; give a dict of forward arguments, as "
                    f"{{{info.main!r}: ...}}, or a pair (source, target) of these"
                )
            _check_arguments(f"batch {i} of {info.name}", side, info)
        check_correspond(infos.source.main, *pair, where=f"batch {i}: ")
        pairs.append(pair)
    if not pairs:
        raise InputRefused("no calibration batches were given; a few unlabelled ones are needed")
    return pairs


def _check_arguments(where: str, side: Batch, info: SideInfo) -> None:
    """Refuse arguments of a forward pass; those beside the ones that calibration knows are the user's own affair."""
    if info.main not in side:
        has = ", ".join(map(str, side)) or "nothing"
        raise InputRefused(f"{where} has no {info.main}, only {has}; {info.name} is a {info.kind} model")
    for key in (info.main, "attention_mask", "offsets"):
        if side.get(key) is None:
            if key == info.main:
                raise InputRefused(f"{where}: {key} is None; give a tensor")
        elif not isinstance(side[key], torch.Tensor):
            shape = "[n, channels, height, width]" if info.kind == "vision" else "[n, tokens], shorter rows padded"
            raise InputRefused(f"{where}: {key} is {_described(side[key])}; give a tensor {shape}")
    known = (info.main,) if info.kind == "vision" else ("input_ids", "attention_mask", "offsets")
    check_tensors(f"{where}: ", {key: side[key] for key in known if side.get(key) is not None}, info)
    if (dtype := side[info.main].dtype) not in (torch.int32, torch.int64) and info.kind == "text":
        raise InputRefused(f"{where}: input_ids is {dtype}, of which no embedding is looked up; give ids.long()")


def check_tensors(where: str, side: Mapping[str, torch.Tensor], info: SideInfo) -> None:
    """Refuse tensors of one side that its model cannot read.

    Args:
        where: what the names of tensors follow in a message.
        side: by the names that calibration knows, and no others.
    """
    data = side[info.main]
    if data.numel() == 0:
        raise InputRefused(f"{where}{info.main} {list(data.shape)} is empty")
    if info.kind == "vision":
        size = (info.image_size, info.image_size) if isinstance(info.image_size, int) else info.image_size
        expected = (info.channels, *(size or (None, None)))
        fits = data.ndim == 4 and all(want in (None, have) for have, want in zip(data.shape[1:], expected, strict=True))
        if not fits or not data.is_floating_point():
            raise InputRefused(
                f"{where}pixel_values is {list(data.shape)} {data.dtype}, {info.name} reads floats "
                f"[n, {', '.join('any' if want is None else str(want) for want in expected)}]; preprocess for it"
            )
        return
    for key, tensor in side.items():
        real = tensor.is_floating_point() or tensor.is_complex()
        if real or (key != "attention_mask" and tensor.dtype is torch.bool):
            raise InputRefused(f"{where}{key} is {tensor.dtype}, expected integers")
    if data.ndim == 1:
        raise InputRefused(
            f"{where}input_ids is {list(data.shape)}, one row of ids without an end; give [n, tokens], a text a row: "
            f"ids[None], or ids[: len(ids) // 512 * 512].view(-1, 512)"
        )
    for key, tensor in side.items():
        expected = (*data.shape, 2) if key == "offsets" else tuple(data.shape)
        if data.ndim != 2 or tuple(tensor.shape) != expected:
            raise InputRefused(f"{where}{key} is {list(tensor.shape)}, expected {list(expected)} ([n, tokens])")
    check_ids(f"{where}input_ids", data, info)
    if info.max_positions and data.shape[1] > info.max_positions:
        raise InputRefused(
            f"{where}input_ids has rows of {data.shape[1]} tokens, {info.name} reads at most "
            f"{info.max_positions}; cut them to that"
        )
    if (mask := side.get("attention_mask")) is not None and not ((mask == 0) | (mask == 1)).all():
        raise InputRefused(f"{where}attention_mask must hold 0 and 1 only")
    if (spans := side.get("offsets")) is not None and ((spans < 0).any() or (spans.diff(dim=-1) < 0).any()):
        raise InputRefused(f"{where}offsets must be [start, stop] with 0 <= start <= stop")


def check_ids(where: str, ids: torch.Tensor, info: SideInfo) -> None:
    """Refuse ids that are not of the model's vocabulary."""
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or (info.vocab_size is not None and high >= info.vocab_size):
        raise InputRefused(
            f"{where} holds ids {low} to {high}, {info.name} has a vocabulary of {info.vocab_size}; "
            "was it made with this model's tokenizer?"
        )


def _described(given: Any) -> str:
    many = f" of {len(given)}" if isinstance(given, (list, tuple)) else ""
    return f"a {type(given).__name__}{many}"
