"""Is an alignment any good? Each map on rows it has not seen, beside the same rows shifted against each other."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..recipes.maps import Map, cosine
from ..recipes.solver import Rows

log = logging.getLogger(__name__)
CHUNK = 512  # rows taken to float64 at a time
CHANCE = 0.1  # share of what is left between chance and 1 below which a map says next to nothing


@dataclass(frozen=True)
class Quality:
    """One space: tr(T^T C) / sqrt(E_S E_T) on held-out rows, and on the same rows shifted; 1 is a perfect match."""

    space: str
    held: float
    shifted: float

    @property
    def near_chance(self) -> bool:
        return not self.held - self.shifted > CHANCE * (1 - self.shifted)

    def as_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "near_chance": self.near_chance}


def quality(t: Map, rows: Rows, samples: int) -> tuple[float, float]:
    """(held, shifted) of one map: how well ``x_S @ T`` matches ``x_T``, and the rows of another sample.

    Args:
        rows: [rows, dS] and [rows, dT] the map was not made from, of so many samples one after the other; the shift is
            a sample, or half of the rows where there is one sample.
    """
    own, other = rows
    step = len(own) // samples if samples > 1 else (len(own) + 1) // 2
    return matched(t, own, other), matched(t, own, other.roll(-step, 0))


def matched(t: Map, source: Tensor, target: Tensor) -> float:
    """:func:`cosine` of ``x_S @ T`` and ``x_T``, from rows [rows, dS] and [rows, dT]."""
    own, other = (sum(part.double().square().sum(0) for part in x.split(CHUNK)) for x in (source, target))
    pairs = list(zip(source.split(CHUNK), target.split(CHUNK), strict=True))
    return cosine(t, lambda t: sum(float((t(x.double()) * y.double()).sum()) for x, y in pairs), (own, other))


def warn(qualities: Sequence[Quality]) -> None:
    """Say which maps are near chance."""
    if poor := [one for one in qualities if one.near_chance]:
        first = poor[0]
        log.warning(
            "%d of %d maps are near chance on held-out data, first %s (%.2f, shifted rows %.2f): give more "
            "calibration, or the two bases have little in common",
            len(poor), len(qualities), first.space, first.held, first.shifted,
        )  # fmt: skip
