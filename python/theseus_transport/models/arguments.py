"""Arguments of the Python API that concern a model: refused by name where they are none, and told from a tune."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from ..errors import InputRefused
from .base import Base

SAMPLE = "source_values"  # in an alignment's provenance: of the source, where it was a model in memory
FIRST = slice(0, 1)  # row of a tensor


def check_models(**models: object) -> None:
    """Refuse what is no model."""
    for name, model in models.items():
        if not isinstance(model, nn.Module):
            told = f"{name} is a {type(model).__name__}"
            raise InputRefused(f"{told}; give a model, as AutoModel.from_pretrained(...) loads it")


def check_kinds(**given: tuple[object, type]) -> None:
    """Refuse arguments of another kind, by name."""
    for name, (value, kind) in given.items():
        if not isinstance(value, kind):
            raise InputRefused(f"{name} is a {type(value).__name__}, expected {kind.__name__}")


def sample_of(base: Base) -> dict[str, str]:
    """The entry of an alignment's provenance that tells a source from its tunes: a digest of a row of every tensor."""
    return {SAMPLE: sampled(first_rows(base))}


def first_rows(base: Base) -> Iterator[tuple[str, Tensor]]:
    for name in sorted(base.slots):
        if (value := base.get(name, FIRST)) is not None:
            yield name, value


def sampled(values: Iterable[tuple[str, Tensor]]) -> str:
    """BLAKE2b of names, dtypes and values: of a row of every tensor it costs little."""
    running = hashlib.blake2b(digest_size=16)
    for name, value in values:
        running.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        running.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return running.hexdigest()
