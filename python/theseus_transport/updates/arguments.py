"""What `align` and `transport` refuse before anything heavy runs: arguments that cannot be what their names say."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

from ..errors import InputRefused
from ..models.arguments import FIRST, SAMPLE, first_rows, sampled
from ..models.base import Base
from .delta import Delta, Renamed


def check_whole(**given: tuple[object, int]) -> None:
    """Refuse what is no whole number from its least to what 63 bits hold: name=(value, least)."""
    for name, (value, least) in given.items():
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**63:
            raise InputRefused(f"{name} is {value!r}; give a whole number from {least} to 2^63 - 1")


def check_number(alpha: Any) -> None:
    """Refuse a strength that is no finite number."""
    if isinstance(alpha, str) and alpha == "match":
        raise InputRefused(
            "alpha is 'match', which needs the update first; give alpha=theseus_transport.updates.alpha.matched("
            "transport(alignment, delta, target))"
        )
    if isinstance(alpha, bool) or not isinstance(alpha, Real) or not math.isfinite(alpha):
        raise InputRefused(f"alpha is {alpha!r}; give a finite number")


def check_direction(provenance: Any, delta: Delta, base: Base, tuned: Renamed) -> None:
    """Refuse a delta the wrong way round, where the alignment knows values of its source."""
    known = provenance.get(SAMPLE) if isinstance(provenance, Mapping) else None  # a file may have been edited
    if known is None or delta.tuned is None or not tuned.slots.keys() >= base.slots.keys():
        return
    swapped = known == sampled((name, tuned.rows(name, FIRST)) for name in sorted(base.slots))
    if swapped and known != sampled(first_rows(base)):
        raise InputRefused(
            "what is given as tuned is the source that was aligned; give Delta.between(base, tuned) in this order"
        )
