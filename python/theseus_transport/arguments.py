"""What `align` and `transport` refuse before anything heavy runs: arguments that cannot be what their names say."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from .delta import Delta, Renamed
from .errors import InputRefused
from .models import Base

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


def check_whole(**given: tuple[object, int]) -> None:
    """Refuse what is no whole number from its least to what 63 bits hold: name=(value, least)."""
    for name, (value, least) in given.items():
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**63:
            raise InputRefused(f"{name} is {value!r}; give a whole number from {least} to 2^63 - 1")


def check_number(alpha: Any) -> None:
    """Refuse a strength that is no finite number."""
    if isinstance(alpha, str) and alpha == "match":
        raise InputRefused(
            "alpha is 'match', which needs the update first; give alpha=theseus_transport.strength.matched(transport("
            "alignment, delta, target))"
        )
    if isinstance(alpha, bool) or not isinstance(alpha, Real) or not math.isfinite(alpha):
        raise InputRefused(f"alpha is {alpha!r}; give a finite number")


def sample_of(base: Base) -> dict[str, str]:
    """What tells a source from its tunes, for its alignment's provenance."""
    return {SAMPLE: _sampled(_rows(base))}


def check_direction(provenance: Any, delta: Delta, base: Base, tuned: Renamed) -> None:
    """Refuse a delta the wrong way round, where the alignment knows values of its source."""
    known = provenance.get(SAMPLE) if isinstance(provenance, Mapping) else None  # a file may have been edited
    if known is None or delta.tuned is None or not tuned.slots.keys() >= base.slots.keys():
        return
    swapped = known == _sampled((name, tuned.rows(name, FIRST)) for name in sorted(base.slots))
    if swapped and known != _sampled(_rows(base)):
        raise InputRefused(
            "what is given as tuned is the source that was aligned; give Delta.between(base, tuned) in this order"
        )


def _rows(base: Base) -> Iterator[tuple[str, Tensor]]:
    for name in sorted(base.slots):
        if (value := base.get(name, FIRST)) is not None:
            yield name, value


def _sampled(values: Iterable[tuple[str, Tensor]]) -> str:
    """BLAKE2b of names, dtypes and values: of a row of every tensor it costs little."""
    running = hashlib.blake2b(digest_size=16)
    for name, value in values:
        running.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        running.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return running.hexdigest()
