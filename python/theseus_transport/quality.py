"""Is an alignment any good? Each map on rows it has not seen, beside the same rows shifted against each other."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .alignment import Alignment
from .capture import Batch, capture
from .links import Link
from .maps import Map
from .models import Base
from .moments import CrossMoment
from .regression import cosine
from .tokens import RowMixing

log = logging.getLogger(__name__)
Moments = Mapping[str, CrossMoment]
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


def quality(maps: Mapping[str, Map], held: Moments, shifted: Moments) -> list[Quality]:
    """A row for every space of both moments that has a map; warns of those near chance.

    Args:
        maps: by space; ``x_S @ T``.
        held: moments of rows the maps were not made from. shifted: of the same, source row i with target row i + n.
    """
    rows = [Quality(s, matched(maps[s], held[s]), matched(maps[s], shifted[s])) for s in held if s in maps]
    if poor := [row for row in rows if row.near_chance]:
        first = poor[0]
        log.warning(
            "%d of %d maps are near chance on held-out data, first %s (%.2f, shifted rows %.2f): give more "
            "calibration, or the two bases have little in common",
            len(poor), len(rows), first.space, first.held, first.shifted,
        )  # fmt: skip
    return rows


def matched(t: Map, moment: CrossMoment) -> float:
    """The cosine of ``x_S @ T`` and ``x_T`` over a moment's rows."""
    return cosine(t, moment.cross, (moment.source_energy, moment.target_energy))


class Twin:
    """Stands for a space's moment during capture: adds rows as they pair, and shifted against each other."""

    def __init__(self, held: CrossMoment, samples: int) -> None:
        self.held, self.samples = held, samples
        self.shifted = CrossMoment.zeros(len(held.source_sum), len(held.target_sum), held.cross.device)

    def update(
        self,
        source: Tensor,
        target: Tensor,
        source_mixing: RowMixing | None = None,
        target_mixing: RowMixing | None = None,
    ) -> None:
        """As :meth:`CrossMoment.update`; the shift is a sample's tokens, or half of them where there is one sample."""
        self.held.update(source, target, source_mixing, target_mixing)
        pairs = ((source, source_mixing), (target, target_mixing))
        own, other = (rows if mixing is None else mixing(rows) for rows, mixing in pairs)
        step = len(own) // self.samples if self.samples > 1 else (len(own) + 1) // 2
        self.shifted.update(own, other.roll(-step, 0))


def measure(alignment: Alignment, source: nn.Module, target: nn.Module, batch: tuple[Batch, Batch]) -> list[Quality]:
    """Rows of :func:`quality` from one pair of batches that was held out; the models stay as they are."""
    layouts = (alignment.source, alignment.target)
    samples = len(next(v for k, v in batch[0].items() if k in ("input_ids", "pixel_values")))
    with capture(source, target, layouts, energies=False, blocks=alignment.blocks) as seen:
        twins = {name: Twin(moment, samples) for name, moment in seen.moments.items()}
        seen.moments = twins  # type: ignore[assignment]
        seen.run(*batch)
    bases = Base.of(source, layouts[0]), Base.of(target, layouts[1])
    held, shifted = (
        _as_mapped(alignment, bases, seen.links, {n: getattr(t, kind) for n, t in twins.items()})
        for kind in ("held", "shifted")
    )
    return quality(alignment.maps, held, shifted)


def _as_mapped(
    alignment: Alignment, bases: tuple[Base, Base], links: Mapping[str, Link], moments: Moments
) -> dict[str, CrossMoment]:
    """Moments of what the maps map: behind a norm's gain and bias where the recipe folds them, centred if it does."""
    found = {}
    for name, moment in moments.items():
        norms = links[name].source.norm, links[name].target.norm
        if alignment.recipe.center:
            moment = moment.centred()
        elif alignment.recipe.name == "coherent" and all(norms):
            own, other = (base.norm(norm, base.layout.width) for base, norm in zip(bases, norms, strict=True))
            moment = moment.unfold(own, other, norms[1])
        found[name] = moment
    return found
