"""z, what is behind a norm but for its gain and bias: its moments, its rows, and its sum over depth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from ..activations.links import Link
from ..activations.moments import CrossMoment
from ..models.base import Base
from ..models.pair import Pair
from .solver import Rows


def normalised(source: Base, target: Base, link: Link, moment: CrossMoment) -> CrossMoment:
    """The moment of z, behind the norms' gains and biases; under LayerNorm with its exact null direction removed.

    Raises:
        InputRefused: a gain is zero.
    """
    own = source.norm(link.source.norm, link.source.width)
    z = moment.unfold(own, target.norm(link.target.norm, link.target.width), link.target.norm)
    if target.geometry.family.norm == "layer":  # every row of z sums to 0
        cross = z.cross - z.cross.mean(0)
        z = replace(z, cross=cross - cross.mean(1, keepdim=True))
    return z


def together(
    source: Base,
    target: Base,
    links: Mapping[str, Link],
    moments: Mapping[str, CrossMoment],
    so_far: Tensor | None = None,
) -> Tensor | None:
    """The sum of z's crosses [dS, dT] over depth, in the order of ``links``; portions may follow one another."""
    for name in (n for n, link in links.items() if n in moments and link.target.norm):
        cross = normalised(source, target, links[name], moments[name]).cross
        so_far = cross if so_far is None else so_far + cross
    return so_far


def normalised_rows(source: Base, target: Base, link: Link, rows: Rows) -> Rows:
    """Rows of z, of a link behind norms."""
    norms = (base.norm(space.norm, space.width) for base, space in Pair(source, target).zip(link))
    return Pair(*((x - shift.to(x)) / gain.to(x) for x, (gain, shift) in zip(rows, norms, strict=True)))
