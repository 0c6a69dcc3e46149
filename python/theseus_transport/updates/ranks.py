"""Ranks of moved adapters: factors cut to fewer directions, and factors of a whole update."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InputRefused, NumericalError
from ..linalg.leading import balanced, leading
from .adapter import Factors


def cut(factors: Factors, rank: int) -> Factors:
    """The factors of the product of that rank nearest to B A in the Frobenius norm, found without forming B A.

    The same factors where they are no more than ``rank``; else float64, of one norm, with the same scaling.

    Raises:
        InputRefused: ``rank`` is below 1. NumericalError: a factor is not finite.
    """
    _check(rank)
    if len(factors.a) <= rank:
        return factors
    (left, inner), (right, outer) = (torch.linalg.qr(x.double()) for x in (factors.b, factors.a.mT))
    core = inner @ outer.mT
    if not bool(torch.isfinite(core).all()):
        raise NumericalError(f"factors {list(factors.b.shape)} and {list(factors.a.shape)} hold NaN or Inf")
    u, s, v = leading(core, rank)
    return Factors(*balanced((right @ (v * s)).mT, left @ u, rank), factors.scaling)


def resized(factors: Factors, rank: int) -> Factors:
    """The factors cut to ``rank``, or with zeros up to it; see :func:`cut`."""
    found = cut(factors, rank)
    missing = rank - len(found.a)
    pad = torch.nn.functional.pad
    return Factors(pad(found.a, (0, 0, 0, missing)), pad(found.b, (0, missing)), found.scaling) if missing else found


def kept(whole: Factors, part: Factors) -> float:
    """The share of the squared norm of B A that a cut of it has, 1 of a zero product."""
    total, left = (float(((f.b.mT @ f.b) * (f.a @ f.a.mT)).sum()) for f in (_double(whole), _double(part)))
    return min(left / total, 1.0) if total else 1.0


def low_rank_of(dense: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The product B A of that rank nearest to a whole update [out, in] in the Frobenius norm; see ``leading``.

    Returns:
        A [rank, in] and B [out, rank] in float64, of one norm, zero where the update has fewer directions, and the
        share of its squared norm that is kept, 1 of a zero update.

    Raises:
        InputRefused: ``rank`` is below 1. NumericalError: the update is not finite.
    """
    _check(rank)
    wide = dense.double()
    total = float(wide.square().sum())
    if not total < torch.inf:
        raise NumericalError(f"an update {list(dense.shape)} holds NaN or Inf")
    u, s, v = leading(wide, rank)
    share = float(s.square().sum()) / total if total else 1.0
    a, b = balanced((v * s).mT, u, rank)
    return a, b, min(share, 1.0)


def _double(factors: Factors) -> Factors:
    return Factors(factors.a.double(), factors.b.double(), factors.scaling)


def _check(rank: int) -> None:
    if rank < 1:
        raise InputRefused(f"rank is {rank}; it must be at least 1")
