"""Batches and forward passes as merge-and-rebase's methods take them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from ..models.precision import widened
from .taps import Refused

INPUTS = ("pixel_values", "images", "image", "inputs", "x")


def encode(model: nn.Module, images: Tensor) -> object:
    """Run the part of the model that reads images, where it says which; on the device the model is on, 16 bits widened
    as it is."""
    known = next(iter(model.parameters()), images)
    run = getattr(model, "encode_image", None) or getattr(model, "visual", None)
    return (run if callable(run) else model)(widened(images).to(known.device))


def batches(
    source: Iterable[Any], target: Iterable[Any], *, count: int | None, seed: int, size: int | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs (source's inputs, target's inputs) of the same samples.

    Loaders with a dataset of known length are read in one random order, drawn from ``seed`` over as many samples as
    both have; others are read side by side.

    Args:
        count: how many batches at most; size: samples per batch, instead of the loaders' own.

    Raises:
        Refused: two batches do not hold equally many samples, or a batch holds no tensor.
    """
    shuffled = _shuffled(source, target, count, seed, size)
    for own, other in islice(zip(source, target, strict=True) if shuffled is None else shuffled, count):
        pair = inputs(own), inputs(other)
        if len(pair[0]) != len(pair[1]):
            raise Refused(f"a batch of the source has {len(pair[0])} samples, the target's has {len(pair[1])}")
        yield pair


def inputs(batch: Any) -> Tensor:
    """The tensor a model reads, in a batch that is one, or names it, or starts with it."""
    found = batch
    if isinstance(batch, Mapping):
        found = next((batch[key] for key in INPUTS if isinstance(batch.get(key), Tensor)), None)
    elif isinstance(batch, (tuple, list)) and batch:
        found = batch[0]
    if not isinstance(found, Tensor):
        raise Refused(
            f"a batch is a {type(batch).__name__} without inputs; give a tensor, a tuple that starts with one, or a "
            f"mapping with one of {', '.join(INPUTS)}"
        )
    return found


def _shuffled(
    source: Any, target: Any, count: int | None, seed: int, size: int | None
) -> Iterator[tuple[Any, Any]] | None:
    """Batches of both datasets at the same random indices, or None where a loader does not say how to make them."""
    loaders = (source, target)
    try:
        samples = min(len(loader.dataset) for loader in loaders)
        size = min(int(loader.batch_size) for loader in loaders) if size is None else int(size)
        collate = [loader.collate_fn for loader in loaders]
    except (AttributeError, TypeError):
        return None
    if size <= 0 or not all(callable(function) for function in collate):
        return None
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(seed)).tolist()
    if count is not None:
        order = order[: count * size]
    return (
        tuple(function([loader.dataset[i] for i in chosen]) for loader, function in zip(loaders, collate, strict=True))
        for chosen in (order[start : start + size] for start in range(0, len(order), size))
    )
