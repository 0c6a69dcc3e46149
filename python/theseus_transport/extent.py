"""How much calibration there will be, before it is read: what memory it will take follows from that."""

from __future__ import annotations

import filecmp
import os
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from .batches import MAIN_INPUT
from .calibration import LENGTH, drawn_rows
from .checkpoint import Checkpoint
from .headers import if_inside
from .images import find_images
from .inputs import SideInfo

PREFIXES = "source.", "target."
ROWS = 4096  # of a mask that are read at a time
INTEGER, REAL = 8, 4  # bytes of an id or a mask's entry, and of a pixel


@dataclass(frozen=True)
class Extent:
    """At most so much.

    Attributes:
        samples: rows or images, what is held out included.
        lengths: tokens of a sample as the models see it, padding included: source, target.
        nbytes: of all batches; loading: bytes in memory while they are read.
    """

    samples: int
    lengths: tuple[int, int]
    nbytes: int
    loading: int = 0


def extent(reference: str, infos: tuple[SideInfo, SideInfo], *, wanted: int, extra: int, seed: int) -> Extent:
    """Of what :func:`load_calibration` will give for these arguments; of a file that it will refuse, anything.

    Args:
        wanted: tokens; extra: samples to be held out.
    """
    path = Path(os.path.expanduser(reference))
    if path.suffix == ".safetensors" and path.is_file():
        return _of_tensors(Checkpoint.open(path), infos, wanted, extra, seed)
    if infos[0].kind == "vision":
        each = [info.tokens_per_image for info in infos]
        samples = -(-wanted // min(each)) + extra
        if path.is_dir():
            samples = min(samples, len(find_images(path)))
        return Extent(samples, (each[0], each[1]), samples * REAL * sum(map(_pixels, infos)))
    length = min([LENGTH, *(info.max_positions for info in infos if info.max_positions)])
    samples, same = -(-wanted // length) + extra + 1, _same_tokenizer(infos)
    if not same:
        samples *= 2  # a row is as long as the finer of both makes it, and counts what the coarser does
    if path.is_file():
        samples = min(samples, path.stat().st_size // length + 1)  # no token is shorter than a byte
    kinds = 2 if same else 8  # ids and masks, of both sides with offsets
    return Extent(samples, (length, length), samples * length * INTEGER * kinds)


def _of_tensors(file: Checkpoint, infos: Sequence[SideInfo], wanted: int, extra: int, seed: int) -> Extent:
    vision, key = infos[0].kind == "vision", MAIN_INPUT[infos[0].kind]
    names = [f"{prefix}{key}" if f"{prefix}{key}" in file else key for prefix in PREFIXES]
    if not all(len(file.shapes.get(name, ())) > 1 for name in names):
        return Extent(1, (1, 1), 0)
    shapes = [file.shapes[name] for name in names]
    rows, lengths = min(shape[0] for shape in shapes), [shape[1] for shape in shapes]
    counts = torch.tensor([min(lengths)] * rows)
    if vision:
        lengths = [info.tokens_per_image for info in infos]
        counts.fill_(min(lengths))
        each = {name: prod(file.shapes[name][1:]) * file.dtypes[name].itemsize for name in names}
    else:
        for name in names:
            mask = f"{name.removesuffix(key)}attention_mask"
            if file.shapes.get(mask) == file.shapes[name]:
                parts = [
                    file.rows(mask, slice(i, i + ROWS)).long().sum(1) for i in range(0, file.shapes[mask][0], ROWS)
                ]
                counts = torch.minimum(counts, torch.cat(parts)[:rows])
        each = {name: file.shapes[name][1] * INTEGER * (2 if names[0] == names[1] else 4) for name in names}
    kept = drawn_rows(counts, wanted, extra, seed)
    samples, one = rows if kept is None else len(kept), sum(each.values())
    loading = (rows * 5 // 4 + samples) * one  # a quarter more for flags of what its values are
    return Extent(samples, (lengths[0], lengths[1]), samples * one, loading)


def _pixels(info: SideInfo) -> int:
    size = info.image_size if isinstance(info.image_size, tuple) else (info.image_size or 0,) * 2
    return prod(size) * (info.channels or 3)


def _same_tokenizer(infos: Sequence[SideInfo]) -> bool:
    own, other = (if_inside(info.folder, "tokenizer.json") for info in infos)
    return own is not None and other is not None and filecmp.cmp(own, other, shallow=False)
