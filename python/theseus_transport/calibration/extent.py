"""How much calibration there will be, before it is read: what memory and time it will take follows from that."""

from __future__ import annotations

import filecmp
import os
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from ..activations.inputs import SideInfo
from ..files.checkpoint import Checkpoint
from ..files.companions import VOCABULARIES
from ..files.headers import if_inside
from ..models.forward import MAIN_INPUT
from ..models.pair import Pair
from .calibration import drawn_rows, held_of, images_wanted, in_random_order, with_held
from .documents import LINES, PIECE, Size, measured, refuse_other_files
from .images import find_images, largest
from .text import ENCODED_AT_ONCE, LENGTH

PREFIXES = "source.", "target."
ROWS = 4096  # of a mask that are read at a time
INTEGER, REAL = 8, 4  # bytes of an id or a mask's entry, and of a pixel
# Bytes while text and images are read, at most:
OF_RECORD = 24  # for each of a record as stored: parsed, told, and four bytes a character
OF_LINE = 24  # where it begins, its pieces, and its place in the draw
OF_PIECE = 1 << 10  # of those that are drawn: arrays, tuples and entries of dicts
OF_TOKEN = 48  # ids and offsets, by pieces and joined, of each side
OF_CHUNK = 32 << 20  # what tokenizers return at a time
OF_PIXEL = 16  # of an image as stored: decoded, converted, and as floats
OF_TOKENIZER, OF_LOADING = 10, 6  # for each of the files: once loaded, and more while the larger one is
BUILTIN = 32 << 20  # the text that Python ships


@dataclass(frozen=True)
class Extent:
    """How much calibration there will be at most.

    Attributes:
        samples: rows or images, what is held out included.
        lengths: tokens of a sample as the models see it, padding included: source, target.
        nbytes: of all batches; loading: bytes in memory while they are read.
        expected: samples, as far as can be told; held: those held out of them.
    """

    samples: int
    lengths: Pair[int]
    nbytes: int
    loading: int = 0
    expected: int = 0
    held: int = 0

    def with_(self, other: Extent) -> Extent:
        """Of this and of ``other``, which is read after it."""
        return Extent(
            self.samples + other.samples,
            Pair(*map(max, zip(self.lengths, other.lengths, strict=True))),
            self.nbytes + other.nbytes,
            max(self.loading, self.nbytes + other.loading),
            self.expected + other.expected,
            self.held + other.held,
        )


def extent(reference: str, infos: Pair[SideInfo], *, wanted: int, most: int, seed: int) -> Extent:
    """The extent of what ``load_calibration`` gives for these arguments; of a file that it refuses, anything.

    Args:
        wanted: tokens; most: samples that may be held out.
    """
    path = Path(os.path.expanduser(reference))
    if path.suffix == ".safetensors" and path.is_file():
        return _of_tensors(Checkpoint.open(path), infos, wanted, most, seed)
    if infos.source.kind == "vision":
        return _of_images(path, infos, wanted, most, seed)
    return _of_text(path if reference not in ("builtin", "self") else None, infos, wanted, most)


def _of_images(folder: Path, infos: Pair[SideInfo], wanted: int, most: int, seed: int) -> Extent:
    samples, pixels = images_wanted(infos, wanted, most), 0
    if folder.is_dir():
        paths = in_random_order(find_images(folder), seed)
        samples = min(samples, len(paths))
        pixels = largest(paths[:samples])
    shown = infos.map(_shown)
    same = _same(infos, ["preprocessor_config.json"]) and shown.source == shown.target
    one = REAL * sum(map(prod, shown[:1] if same else shown))
    loading = (samples + 1) * one + OF_PIXEL * pixels
    lengths = infos.map(lambda info: info.tokens_per_image)
    return Extent(samples, lengths, samples * one, loading, samples, held_of(samples, most))


def _of_text(path: Path | None, infos: Pair[SideInfo], wanted: int, most: int) -> Extent:
    """Path: None for text that Python ships, or that the tune says."""
    length = min([LENGTH, *(info.max_positions for info in infos if info.max_positions)])
    expected, same = with_held(-(-wanted // length), most), _same(infos, VOCABULARIES)
    samples = (expected + 2) * (1 if same else 2)  # a row is as long as the finer of both tokenizers makes it
    read, pieces = BUILTIN, BUILTIN // PIECE
    if path is not None and path.is_file():
        refuse_other_files(path)
        nbytes, records = path.stat().st_size, path.suffix.lower() in LINES
        size = measured(path) if records else Size(nbytes // PIECE + 1, 0)
        read, pieces = OF_LINE * size.lines + OF_RECORD * size.longest, size.lines + nbytes // PIECE
        # no token is shorter than a byte; what chat templates say beside a record is no longer than that is as JSON
        samples = min(samples, (2 if records else 1) * nbytes // length + 1)
        expected = min(expected, samples)
    tokens = samples * length + 2 * PIECE * ENCODED_AT_ONCE
    batches = samples * length * INTEGER * (2 if same else 8)  # ids and masks, of both sides with offsets
    tokenizers = [_tokenizer_bytes(info) for info in infos]
    if path is not None and path.suffix.lower() in LINES:  # the tune's own tells chats
        tokenizers.append(tokenizers[0])
    loading = read + 2 * batches + 2 * OF_TOKEN * tokens + OF_PIECE * min(pieces, tokens) + OF_CHUNK
    loading += OF_TOKENIZER * sum(tokenizers) + OF_LOADING * max(tokenizers)
    return Extent(samples, Pair(length, length), batches, loading, expected, held_of(expected, most))


def _of_tensors(file: Checkpoint, infos: Pair[SideInfo], wanted: int, most: int, seed: int) -> Extent:
    vision, key = infos.source.kind == "vision", MAIN_INPUT[infos.source.kind]
    names = [f"{prefix}{key}" if f"{prefix}{key}" in file else key for prefix in PREFIXES]
    if not all(len(file.shapes.get(name, ())) > 1 for name in names):
        return Extent(1, Pair(1, 1), 0)
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
    samples, one = len(drawn_rows(counts, wanted, most, seed)), sum(each.values())
    loading = (rows * 5 // 4 + samples) * one  # a quarter more for flags of what its values are
    return Extent(samples, Pair(*lengths), samples * one, loading, samples, held_of(samples, most))


def _shown(info: SideInfo) -> tuple[int, ...]:
    """Channels, height and width of an image as a model reads it."""
    size = info.image_size if isinstance(info.image_size, tuple) else (info.image_size or 0,) * 2
    return (info.channels or 3, *size)


def _tokenizer_bytes(info: SideInfo) -> int:
    """Of the files that a tokenizer is made from."""
    found = [path.stat().st_size for name in VOCABULARIES if (path := if_inside(info.folder, name))]
    return max(found, default=0)


def _same(infos: Sequence[SideInfo], names: Sequence[str]) -> bool:
    """Whether both models have the same of these files."""
    for name in names:
        own, other = (if_inside(info.folder, name) for info in infos)
        if (own is None) != (other is None) or (own and other and not filecmp.cmp(own, other, shallow=False)):
            return False
    return True
