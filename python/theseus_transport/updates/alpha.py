"""How strong an update is added: numbers, or as strong as it was in the source."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from torch import Tensor

from ..errors import InputRefused
from ..models.tensors import double, fresh, row_tiles, rows_of, squares
from .computed import ComputedUpdate

Alpha = float | Literal["match", "auto"]
TRIED = 0.25, 0.5, 0.75, 1.25, 1.5, 2.0  # strengths that auto compares with 1


@dataclass(frozen=True)
class Strength:
    """One strength as it was asked for: a finite number other than 0, ``match`` or ``auto``."""

    asked: Alpha

    def resolved(self, update: ComputedUpdate, removed: Mapping[float, float] = MappingProxyType({})) -> float:
        """The number that it is.

        Args:
            removed: strength -> share of divergence it removes on rows that were held out; empty where none can tell.
        """
        if self.asked == "auto":
            return max(removed, key=lambda alpha: removed[alpha], default=1.0)
        return matched(update) if self.asked == "match" else float(self.asked)


def chosen(alpha: Alpha | Sequence[Alpha]) -> list[Strength]:
    """The strengths of a job; refuses what is no strength, and one given twice."""
    asked: list[Any] = list(alpha) if isinstance(alpha, (list, tuple)) else [alpha]
    for one in asked:
        number = isinstance(one, (int, float)) and not isinstance(one, bool)
        if one not in ("match", "auto") and not (number and 0 < abs(one) <= sys.float_info.max):
            raise InputRefused(f"alpha is {one}; give a finite number other than 0, match or auto")
    asked = [one if isinstance(one, str) else float(one) for one in asked]
    if twice := [one for one in asked if asked.count(one) > 1]:
        raise InputRefused(f"alpha {twice[0]} is given twice; keep one")
    if not asked:
        raise InputRefused("no alpha is given; leave it out for 1")
    return [Strength(one) for one in asked]


def folders(out: Path, alphas: Sequence[Strength]) -> list[Path]:
    """The folder of each strength: ``out`` for one, ``out/alpha-...`` for several; other numbers have other names."""
    return [out] if len(alphas) == 1 else [out / f"alpha-{str(a.asked).removesuffix('.0')}" for a in alphas]


def matched(update: ComputedUpdate) -> float:
    """alpha with alpha |delta_T| / |W_T| = |delta_S| / |W_S|, Frobenius norms over the weight matrices that move.

    Moves every weight once, beside the time it is written.

    Raises:
        InputRefused: no weight matrix moves, or what moves is zero.
    """
    update.compare(set(update.presumed))  # what does not change does not count
    delta_s = weight_s = delta_t = weight_t = 0.0
    into = dict.fromkeys(f"{layer}.weight" for layer in update.fits.planned)
    for name, of in _source_weights(update):
        tiles = row_tiles(update.source.shape(name)) or (None,)
        change, before = (sum(each) for each in zip(*(map(squares, of(rows)) for rows in tiles), strict=True))
        if change:
            delta_s, weight_s = delta_s + change, weight_s + before
        if name in update.moved:
            into[update.moved[name]] = None
    for name in into:
        slot = update.target.slots[name]
        if name not in update.computations(slot.stored):
            continue
        for rows in update.tiles(slot.stored) or (None,):
            moved = rows_of(update, slot.stored, rows)
            delta_t += squares(moved if rows else slot.view(moved)) / update.alpha**2
            weight_t += squares(update.target.need(name, rows))
    if not (delta_s and weight_s and delta_t and weight_t):
        raise InputRefused("alpha match needs weight matrices that change on both sides; give a number")
    return math.sqrt(delta_s / weight_s * weight_t / delta_t)


def _source_weights(update: ComputedUpdate) -> Iterator[tuple[str, Callable[[slice | None], tuple[Tensor, Tensor]]]]:
    """Canonical name -> (delta, base) in float64, or rows of them, of every weight matrix that maps or fits move."""
    adapter, source, family = update.delta.adapter, update.source, update.source_family
    layers = adapter.layers() if adapter else ()
    spelled = {part: (la, slot) for la in layers for part, slot in family.parts(family.canonical(la)).items()}
    tuned = update.tuned

    def product(name: str, rows: slice | None) -> tuple[Tensor, Tensor]:
        assert adapter is not None
        layer, slot = spelled[name.removesuffix(".weight")]
        f = adapter.factors(layer)
        b = double(f.b, source.device).chunk(slot.parts)[slot.part]
        return f.scaling * (b if rows is None else b[rows]) @ double(f.a, source.device), source.need(name, rows)

    def difference(name: str, rows: slice | None) -> tuple[Tensor, Tensor]:
        before = source.need(name, rows)
        return fresh(rows_of(tuned, name, rows), source.device).sub_(before), before

    fitted = [family.canonical(row.tensor) for row in update.coverage if row.fate == "fitted"]
    for name in dict.fromkeys([*update.moved, *(f"{own.removesuffix('.weight')}.weight" for own in fitted)]):
        into = update.moved.get(name)
        if into and into not in update.computations(update.target.slots[into].stored):
            continue  # presumed to have changed, and did not
        factored = name.removesuffix(".weight") in spelled
        matrix = name in source and len(source.shape(name)) > 1  # no bias, which may be the target's alone
        matrix &= into not in update.new  # which moves whole, whatever the strength
        if matrix and (factored or name in tuned):  # a tied head is its embedding, counted once
            yield name, partial(product if factored else difference, name)


AUTO = "the share of divergence removed on held-out rows is largest"
MATCH = "alpha |delta_T| / |W_T| = |delta_S| / |W_S|, norms over the weight matrices that move"
WHY = {"match": f" (match: {MATCH})", "auto": f" (auto: {AUTO})"}  # asked -> what is said beside the number
