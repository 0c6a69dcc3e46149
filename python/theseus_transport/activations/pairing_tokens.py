"""Pairs of batches: what both models read, and which source tokens stand for which target tokens."""

from __future__ import annotations

import torch

from ..errors import InputRefused
from ..models.forward import MAIN_INPUT, Batch
from ..models.geometry import Geometry
from ..models.pair import SIDES, Pair
from . import row_mixing as tokens
from .row_mixing import RowMixing

Tensors = dict[str, torch.Tensor]  # a batch whose tensors are ready
Mixings = Pair[RowMixing | None]


def check_correspond(key: str, source: Batch, target: Batch, where: str = "") -> None:
    """Refuse a pair of batches whose rows do not stand for each other.

    Args:
        key: of the input both are read from. where: begins the message.
    """
    for side, batch in SIDES.zip((source, target)):
        if key not in batch:
            raise InputRefused(f"{where}the {side} batch has no {key}, only {', '.join(batch) or 'nothing'}")
    samples = [len(batch[key]) for batch in (source, target)]
    if samples[0] != samples[1]:
        raise InputRefused(f"{where}the source batch has {samples[0]} samples, the target batch {samples[1]}")
    spans = [batch.get("offsets") is not None for batch in (source, target)]
    if key == "pixel_values" or all(spans):
        return
    if any(spans):
        raise InputRefused(f"{where}offsets on one side only; give both batches offsets")
    shapes = [list(b[key].shape) for b in (source, target)]
    if shapes[0] != shapes[1]:
        raise InputRefused(
            f"{where}source input_ids are {shapes[0]}, target input_ids {shapes[1]}; they must pair up one to one, or "
            "both hold offsets [n, tokens, 2]"
        )
    own, other = (b.get("attention_mask") for b in (source, target))
    same = own is other or (own is not None and other is not None and torch.equal(own.cpu().bool(), other.cpu().bool()))
    if not same:
        raise InputRefused(
            f"{where}the attention masks of source and target differ; give both models the same masked tokens"
        )


def mixings(geometries: Pair[Geometry], source: Batch, target: Batch) -> Mixings:
    """Which source tokens stand for which target tokens in one pair of batches.

    Images: the source's patch grid is interpolated to the target's. Text of one tokenizer: the unmasked tokens. Text of
    two: ``offsets`` int64 [samples, tokens, 2] on both sides mix source tokens onto target tokens by shared characters.

    Raises:
        InputRefused: the two batches do not hold the same samples or tokens.
    """
    key = MAIN_INPUT[geometries.source.family.modality]
    check_correspond(key, source, target)
    samples = len(source[key])
    if key == "pixel_values":
        return _by_patches(*geometries, samples)
    if "offsets" in source and "offsets" in target:
        return _by_characters(source, target)
    mask = target.get("attention_mask")
    if mask is None:
        return Pair(None, None)
    chosen = tokens.select(mask.cpu())
    return Pair(chosen, chosen)


def of_class_token(geometries: Pair[Geometry], samples: int) -> Pair[RowMixing]:
    """The class token alone of each of so many images, of both models: one row for each, whatever their patches."""

    def first(geometry: Geometry) -> RowMixing:
        rows, columns = geometry.grid
        return tokens.select(torch.arange(sum(geometry.ahead) + rows * columns) == 0).batched(samples)

    return geometries.map(first)


def of_samples(rows: Mixings, length: int, samples: torch.Tensor) -> Mixings:
    """Of the rows of a pair of batches those of some samples.

    Args:
        length: tokens of a sample of the target's batch; samples: bool [samples], which, where the mixings lie.
    """
    of = samples.repeat_interleave(length)  # of the target's tokens
    kept = of if rows.target is None else of[rows.target.leading]
    return rows.map(lambda mixing: tokens.select(kept) if mixing is None else mixing.only(kept))


def _by_characters(source: Batch, target: Batch) -> Mixings:
    """Row mixings of a batch whose two sides were cut by different tokenizers."""
    columns, pointers, weights, kept_rows = [], [torch.zeros(1, dtype=torch.int64)], [], []
    width, entries = source["offsets"].shape[1], 0
    for i, (own, other) in enumerate(zip(source["offsets"], target["offsets"], strict=True)):
        mixing, kept = tokens.overlap(own, other)
        assert mixing.row_ptr is not None and mixing.weight is not None
        columns.append(mixing.column + i * width)
        weights.append(mixing.weight)
        pointers.append(mixing.row_ptr[1:] + entries)
        entries += len(mixing.column)
        kept_rows.append(kept)
    mixed = RowMixing(torch.cat(columns), width * len(columns), torch.cat(pointers), torch.cat(weights))
    return Pair(mixed, tokens.select(torch.stack(kept_rows)))


def _by_patches(source: Geometry, target: Geometry, samples: int) -> Mixings:
    """The source's patch grid interpolated to the target's; class and register tokens where both sides have them."""
    if source.ahead == target.ahead:
        if source.grid == target.grid:
            return Pair(None, None)
        mixing = tokens.bilinear(source.grid, target.grid, prefix=sum(source.ahead))
        return Pair(mixing.batched(samples), None)
    shared = tuple(min(pair) for pair in zip(source.ahead, target.ahead, strict=True))
    kept = []
    for geometry in (source, target):
        (classes, registers), (rows, columns) = geometry.ahead, geometry.grid
        ones = [i < shared[0] for i in range(classes)] + [i < shared[1] for i in range(registers)]
        kept.append(torch.tensor(ones + [True] * (rows * columns)))
    own = tokens.select(kept[0]).then(tokens.bilinear(source.grid, target.grid, prefix=sum(shared)))
    return Pair(own.batched(samples), tokens.select(kept[1].repeat(samples)))
