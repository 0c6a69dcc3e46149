"""Ridge regression from sums: a linear layer fitted to what its outputs miss, its strength, and its cut to a rank.

The penalty is lambda = rho tr(G) / d_in, relative to the inputs' mean energy: energies span five orders of magnitude
over the depth of a model. With a bias G is the Gram about the mean, and the bias is not penalised.
Reference: reduced-rank regression, Izenman, Journal of Multivariate Analysis 5 (1975).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ..errors import InputRefused, NumericalError
from .leading import SEED, balanced, leading

GRID = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # rho, beside "no update"
SKETCHED = 64  # random directions of the outputs whose error is watched
SILENT = 1e-12  # a Gram about the mean below this share of the Gram is what rounding left of constant inputs
ROUNDING = 1e-12  # an error on held-out rows below this share of its terms is rounding
LARGEST = 1e3  # rho up to which a Gram that is not positive is helped
EPS = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class Normal:
    """Sums over rows of X [rows, d_in] and M [rows, d_out] from which X dW^T + 1 b^T = M is solved; all float64.

    Attributes:
        gram: X^T X [d_in, d_in].
        cross: X^T M [d_in, d_out].
        input_sum, output_sum: [d_in] and [d_out].
        count: number of rows.
    """

    gram: Tensor
    cross: Tensor
    input_sum: Tensor
    output_sum: Tensor
    count: int

    def __add__(self, other: Normal) -> Normal:
        """Sums over the union of two sets of rows."""
        if self.cross.shape != other.cross.shape:
            raise InputRefused(f"cannot add the sums of a fit {list(self.cross.shape)} and {list(other.cross.shape)}")
        return Normal(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass(frozen=True)
class Fit:
    """What is added to a layer: ``weight`` [d_out, d_in], and ``bias`` [d_out] where one was fitted."""

    weight: Tensor
    bias: Tensor | None


def ridge(normal: Normal, rho: float, *, bias: bool) -> Fit:
    """The dW and b that minimise ``|X dW^T + 1 b^T - M|^2 + lambda |dW|^2``.

    Zero where X is zero or, with a bias, constant. Memory beside the sums: one d_in x d_in, three d_in x d_out.

    Args:
        rho: lambda in units of the inputs' mean energy per feature, above 0.
        bias: whether b is fitted.

    Raises:
        InputRefused: rho is not above 0.
        NumericalError: the sums are not finite, or too far from those of any rows for a Cholesky factor.
    """
    factor = _cholesky(normal, rho, bias=bias)
    weight = torch.zeros_like(normal.cross) if factor is None else _solved(factor, _cross(normal, bias=bias))
    if not bool(torch.isfinite(weight).all()):
        raise NumericalError(f"the sums of a fit {list(normal.cross.shape)} hold NaN or Inf")
    if not bias:
        return Fit(weight.mT, None)
    n = max(normal.count, 1)
    return Fit(weight.mT, normal.output_sum / n - normal.input_sum / n @ weight)


def chosen_ridge(fit: Normal, held: Normal, *, bias: bool, grid: Sequence[float] = GRID) -> float | None:
    """The rho of ``grid`` whose fit to some rows has the least error on others; None: no update has less.

    Errors are those of up to ``SKETCHED`` random combinations of the outputs, the same in every run. Memory beside the
    sums: one d_in x d_in.

    Args:
        fit, held: sums over the rows that are fitted and over those that judge.
    """
    fit, held = _sketched(fit), _sketched(held)
    best: tuple[float, float] | None = None
    for rho in grid:
        found = ridge(fit, rho, bias=bias)
        gain, size = _gain(found, held)
        if gain > ROUNDING * size and (best is None or gain > best[0]):
            best = gain, rho
    return None if best is None else best[1]


def low_rank(weight: Tensor, normal: Normal, rho: float, rank: int, *, bias: bool) -> tuple[Tensor, Tensor, float]:
    """The product B A of a rank nearest to a fitted dW in the metric of the fit, ``|X dW^T|^2 + lambda |dW|^2``.

    With G + lambda = C C^T and V the ``rank`` leading right singular vectors of C^T dW^T it is V V^T dW. Nothing is
    divided by a root of G: where ``rank`` suffices, B A is dW to rounding.

    Args:
        weight: dW [d_out, d_in].
        normal, rho, bias: of the fit that found it.

    Returns:
        A [rank, d_in] and B [d_out, rank], of one norm, and the share of ``|X dW^T|^2 + lambda |dW|^2`` that is kept,
        1 of nothing.
    """
    if rank < 1:
        raise InputRefused(f"rank is {rank}; it must be at least 1")
    factor = _cholesky(normal, rho, bias=bias)
    seen = weight.mT if factor is None else factor.mT @ weight.mT
    del factor
    _, s, v = leading(seen, rank)
    v = v[:, s > EPS * s[:1]]  # none of a zero dW
    total = float(seen.square().sum())
    kept = float(s.square().sum()) / total if total else 1.0
    a, b = balanced(v.mT @ weight, v, rank)
    return a, b, min(kept, 1.0)


def _cholesky(normal: Normal, rho: float, *, bias: bool) -> Tensor | None:
    """Lower C with C C^T = G + lambda, or None where G is zero; in one matrix of G's size.

    rho rises tenfold where G + lambda is not positive, as of sums that were rounded.
    """
    if not rho > 0:
        raise InputRefused(f"rho is {rho}; it must be above 0")
    energy, mean = normal.gram.diagonal(), normal.input_sum / max(normal.count, 1)
    about = energy - normal.input_sum * mean if bias else energy
    trace = float(about.sum())
    if trace <= SILENT * float(energy.sum()):
        return None
    work = torch.empty_like(normal.gram, memory_format=torch.contiguous_format).mT  # columns, as LAPACK has them
    for tried in _rising(rho):
        work.copy_(normal.gram)
        if bias:
            work.addr_(normal.input_sum, mean, alpha=-1)
        work.diagonal().add_(tried * trace / len(work))
        info = torch.empty((), dtype=torch.int32, device=work.device)
        torch.linalg.cholesky_ex(work, out=(work, info))
        if not int(info):
            return work
    raise NumericalError(
        f"the Gram {list(normal.gram.shape)} of a fit, trace {trace:.3g} of {normal.count} rows, has no Cholesky "
        f"factor even with rho {tried:g}; are the activations finite?"
    )


def _rising(rho: float) -> Iterator[float]:
    yield rho
    while rho < LARGEST:
        rho *= 10
        yield rho


def _cross(normal: Normal, *, bias: bool) -> Tensor:
    """X^T M, with a bias about both means."""
    if not bias:
        return normal.cross
    return normal.cross.addr(normal.input_sum, normal.output_sum / max(normal.count, 1), alpha=-1)


def _solved(factor: Tensor, cross: Tensor) -> Tensor:
    """(C C^T)^-1 of ``cross`` [d_in, d]; torch.cholesky_solve would copy C."""
    half = torch.linalg.solve_triangular(factor, cross, upper=False)
    solved: Tensor = torch.linalg.solve_triangular(factor.mT, half, upper=True)
    return solved


def _sketched(normal: Normal) -> Normal:
    """The same inputs with ``SKETCHED`` random combinations of the outputs."""
    width = normal.cross.shape[1]
    if width <= SKETCHED:
        return normal
    seeded = torch.Generator().manual_seed(SEED)
    mix = torch.randn(width, SKETCHED, generator=seeded, dtype=torch.float64).to(normal.cross)
    return Normal(normal.gram, normal.cross @ mix, normal.input_sum, normal.output_sum @ mix, normal.count)


def _gain(found: Fit, held: Normal) -> tuple[float, float]:
    """By how much a fit lowers ``|M|^2`` on held-out rows, and the size of the terms of that difference."""
    weight, outputs = found.weight, found.weight @ held.gram
    shown = float((outputs * weight).sum())
    wanted = float((held.cross.mT * weight).sum())
    if found.bias is not None:
        shown += float(found.bias @ (2 * weight @ held.input_sum + held.count * found.bias))
        wanted += float(found.bias @ held.output_sum)
    return 2 * wanted - shown, abs(shown) + 2 * abs(wanted)
