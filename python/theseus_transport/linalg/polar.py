"""The polar factor by iteration: with products, Cholesky and LU factors alone.

``polar_factor``: any device, rank and batch. Every step maps singular values s of X to f(s) and leaves its singular
vectors: rational steps (Cholesky-QDWH) lift small ones, quintic polynomials that are minimax on an interval bring all
to 1; small matrices take polynomials only. At the end T is multiplied by the projector on what the data determines.
``newton``: one matrix of full rank on the CPU, in the least memory.

References: weights of Nakatsukasa, Bai and Gygi, SIAM J. Matrix Anal. Appl. 31 (2010); with Cholesky factors,
Nakatsukasa and Higham, SIAM J. Sci. Comput. 35 (2013); composed polynomials, Chen and Chow, "A stable scaling of
Newton-Schulz for improving the sign function computation" (2014). None of this has run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

START = 1e-9  # singular values of X from here on are brought to 1; smaller ones end below, and the projector decides
GENTLE = 1e-2  # weights are those of no smaller value: a step's rounding grows with the root of its c, here 27
POLYNOMIAL_UP_TO = 1024  # smaller sides up to this take polynomials alone: a batch of products beats one of Cholesky
TAME = 1e-100  # C whose largest entry lies between this and its inverse needs no scaling: squares are representable
BUFFERS = 8 << 20  # bytes the BLAS keeps for itself, once
STRIP = 1024  # rows or columns multiplied at a time on a device: of 8192 x 14336 still 0.2 TFLOP
FULL_RATE = {(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)}  # compute capabilities with float64 at half of float32 or more
# f(s) = a s + b s^3 + c s^5, minimax to 1 where its singular values lie.
LIFT = (3.8555313934291933, -9.552448559055275, 6.696917165626081)  # on [0.1, 1], over its maximum: into [0.376, 1]
ENTRY = 0.35  # where LIFT or the rational steps have brought every value to
QUINTICS = (
    (3.2137926016389686, -5.0344859653327685, 2.8965065434227704),  # on [0.35, 1]
    (1.881090169337065, -1.256750334155286, 0.3756756721839019),  # on 1 -+ 0.0758, what the first leaves
    (1.875, -1.25, 0.375),  # Taylor's at 1, on 1 -+ 2.7e-4
)
LAST = QUINTICS[-1]  # once more, on 1 -+ 5.1e-11: in float64


def polar_factor(
    c: Tensor,
    *,
    floor: float,
    eigh: bool,
    least: int = 0,
    start: float = START,
    mixed: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The partial polar factor of float64 C [..., dS, dT] on the directions above ``floor`` times the largest.

    No host synchronisation but the one inside eigh. Peak memory above C: the map, and four of the smaller side squared.

    Args:
        eigh: the projector from eigenvectors, else by the sign iteration of H - floor.
        least: that many directions are kept even below the floor; only with ``eigh``.
        start: share of the bound on the largest singular value from which values are brought to 1.
        mixed: quintic steps in float32, for devices whose float64 is slow: T is then right to float32, not float64.

    Returns:
        map [..., dS, dT], rank int64 [...], gap [...] (to a percent without ``eigh``). Without a certificate.
    """
    wide = c if c.shape[-2] <= c.shape[-1] else c.mT
    k, m = wide.shape[-2:]
    wide = wide.reshape(-1, k, m)
    unit = magnitude(wide).clamp(min=torch.finfo(c.dtype).tiny)
    x = orthogonalise(wide / unit, start, mixed=mixed)
    h = torch.empty_like(wide[:, :, :k])
    for rows in blocks(k, x):
        h[:, rows] = (wide[:, rows] / unit) @ x.mT
    h = (h + h.mT).div_(2)
    projector, rank, gap = _by_eigenvalues(h, floor, least) if eigh else _by_sign(h, floor, start)
    del h
    _apply(projector, x)
    t = (x if c.shape[-2] <= c.shape[-1] else x.mT).reshape(c.shape)
    return t, rank.reshape(c.shape[:-2]), gap.reshape(c.shape[:-2])


def orthogonalise(x: Tensor, start: float, *, mixed: bool) -> Tensor:
    """X [batch, k, m], k <= m, with its singular values from ``start`` on brought to 1. In place."""
    tiny, k = torch.finfo(x.dtype).tiny, x.shape[1]
    gram = x @ x.mT
    bound = torch.linalg.matrix_norm(gram @ gram).sqrt().sqrt()  # |G^2|_F^(1/4) >= |X|_2
    x /= bound.clamp(min=tiny)[:, None, None]
    del gram
    low = start
    while low < ENTRY:
        if k <= POLYNOMIAL_UP_TO:
            _quintic(x, LIFT)
            low = _value(LIFT, low)
        else:
            a, b, c = qdwh_weights(max(low, GENTLE))
            _rational(x, a, b, c)
            low = low * (a + b * low**2) / (1 + c * low**2)
    steps = x.float() if mixed else x
    for weights in QUINTICS:
        _quintic(steps, weights)
    x = steps.to(x.dtype)
    _quintic(x, LAST)
    return x


def qdwh_weights(low: float) -> tuple[float, float, float]:
    """a, b, c of f(s) = s (a + b s^2) / (1 + c s^2), which maps [low, 1] into the shortest interval below 1."""
    d = (4 * (1 - low**2) / low**4) ** (1 / 3)
    a = (1 + d) ** 0.5 + 0.5 * (8 - 4 * d + 8 * (2 - low**2) / (low**2 * (1 + d) ** 0.5)) ** 0.5
    b = (a - 1) ** 2 / 4
    return a, b, a + b - 1


def _rational(x: Tensor, a: float, b: float, c: float) -> None:
    """X <- (b/c) X + (a - b/c) (1 + c X X^T)^-1 X."""
    z = (x @ x.mT).mul_(c)
    z.diagonal(dim1=-2, dim2=-1).add_(1)
    z = _inverse(z).mul_(a - b / c)
    z.diagonal(dim1=-2, dim2=-1).add_(b / c)
    _apply(z, x)


def _inverse(z: Tensor) -> Tensor:
    """Z^-1 of positive definite matrices."""
    factor = torch.linalg.cholesky_ex(z)[0]
    if not remote(z):
        return torch.cholesky_inverse(factor)
    eye = torch.eye(z.shape[-1], dtype=z.dtype, device=z.device).expand_as(z)
    half = torch.linalg.solve_triangular(factor, eye, upper=False)  # cholesky_inverse waits for its error code
    inverse: Tensor = half.mT @ half
    return inverse


def _quintic(x: Tensor, weights: tuple[float, float, float]) -> None:
    """X <- (a + b G + c G^2) X, G = X X^T."""
    a, b, c = weights
    gram = x @ x.mT
    w = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    w.diagonal(dim1=-2, dim2=-1).add_(a)
    _apply(w, x)


def _value(weights: tuple[float, float, float], s: float) -> float:
    a, b, c = weights
    return s * (a + b * s**2 + c * s**4)


def _apply(w: Tensor, x: Tensor) -> None:
    """X <- W X in place, by columns."""
    for columns in blocks(x.shape[-1], x):
        x[..., columns] = w @ x[..., columns]


def _by_eigenvalues(h: Tensor, floor: float, least: int) -> tuple[Tensor, Tensor, Tensor]:
    """Projector on H > floor |H|, its rank, and the smallest eigenvalue kept over the largest."""
    values, vectors = torch.linalg.eigh(h)
    largest = values.amax(-1, keepdim=True).clamp(min=0)
    kept = (values > floor * largest) | (torch.arange(h.shape[-1], device=h.device) >= h.shape[-1] - least)
    smallest = torch.where(kept, values, torch.inf).amin(-1)
    gap = torch.where(kept.any(-1), smallest / largest[:, 0], 0.0)
    vectors *= kept[:, None]
    return vectors @ vectors.mT, kept.sum(-1), gap


def _by_sign(h: Tensor, floor: float, start: float) -> tuple[Tensor, Tensor, Tensor]:
    """Projector on H > floor |H|, its rank, and the smallest eigenvalue kept over the largest (to a percent).

    By products alone: (1 + sign(H - floor |H|)) / 2, where the sign is the polar factor of a symmetric matrix.
    """
    tiny = torch.finfo(h.dtype).tiny
    h = h / largest_eigenvalue(lambda v: h @ v, h).clamp(min=tiny)[:, None, None]
    shifted = h.clone()
    shifted.diagonal(dim1=-2, dim2=-1).sub_(floor)
    p = orthogonalise(shifted, start, mixed=False)
    p = (p + p.mT).div_(4)
    p.diagonal(dim1=-2, dim2=-1).add_(0.5)
    rank = p.diagonal(dim1=-2, dim2=-1).sum(-1).round().long()
    rest = p @ h @ p - p  # 1 where nothing is kept: H there, which is positive definite
    rest.diagonal(dim1=-2, dim2=-1).add_(1)
    factor = torch.linalg.cholesky_ex(rest)[0]
    solve = torch.linalg.solve_triangular
    inverse = largest_eigenvalue(lambda v: solve(factor.mT, solve(factor, v, upper=False), upper=True), h)
    return p, rank, torch.where(rank > 0, 1 / inverse.clamp(min=1), 0.0)


def largest_eigenvalue(product: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    """Largest eigenvalue of positive semidefinite matrices by block power iteration: from below, to a percent."""
    start = torch.Generator(like.device).manual_seed(0)
    q = torch.randn(like.shape[-1], 8, dtype=like.dtype, device=like.device, generator=start).expand(len(like), -1, -1)
    for _ in range(48):
        q = _orthonormal(product(q))
    return _norm(q.mT @ product(q))


def _orthonormal(y: Tensor) -> Tensor:
    """Orthonormal columns of the span of Y, those below rounding shortened: by the Cholesky factor of Y^T Y + shift.

    Reference: Fukaya, Kannan, Nakatsukasa, Yamamoto and Yanagisawa, "Shifted Cholesky QR for computing the QR
    factorization of ill-conditioned matrices", SIAM J. Sci. Comput. 42 (2020).
    """
    gram, info = y.mT @ y, torch.finfo(y.dtype)
    shift = 11 * y.shape[-2] * info.eps * _trace(gram) + info.tiny  # more than Y^T Y is rounded by; 0 stays 0
    gram.diagonal(dim1=-2, dim2=-1).add_(shift[:, None])
    q: Tensor = torch.linalg.solve_triangular(torch.linalg.cholesky_ex(gram)[0].mT, y, upper=True, left=False)
    return q


def _norm(s: Tensor) -> Tensor:
    """Largest eigenvalue of small positive semidefinite matrices: their mean weighted by its 4096th powers."""
    tiny, power = torch.finfo(s.dtype).tiny, s
    for _ in range(12):
        power = power / _trace(power).clamp(min=tiny)[:, None, None]
        power = power @ power
    largest: Tensor = _trace(power @ s) / _trace(power).clamp(min=tiny)
    return largest


def _trace(s: Tensor) -> Tensor:
    trace: Tensor = s.diagonal(dim1=-2, dim2=-1).sum(-1)
    return trace


def polar_bytes(rows: int, columns: int, *, method: str, device: bool = False) -> int:
    """Peak memory in bytes of one map [rows, columns] by ``procrustes``, the map included, a float64 C not.

    ``newton`` is ``auto`` (of a smaller side from 1024) or ``iterate`` on the CPU where C has full rank; ``iterate``,
    ``lapack`` and ``auto``, which leaves the rest to LAPACK, hold for any rank. With ``energies``, ``iterate`` takes a
    copy of C more below full rank, on a ``device`` (other than the CPU) two. For ``lapack`` a bound: what gesdd asks
    for differs between wide and tall.
    """
    k, m = sorted((rows, columns))
    lapack = 2, 4 if m < 11 * k / 6 else 6  # gesdd's divide and conquer; from there on it begins with QR
    copies, squares = {"newton": (1, 2), "iterate": (1, 4), "lapack": lapack, "auto": lapack}[method]
    strips = 3 if method == "iterate" else 2  # of C, of its residual and, below full rank, of what T leaves out of C
    blocked = strips * min(k, _strip(k, device=device)) * m  # in the certificate
    return 8 * (copies * k * m + squares * k * k + blocked) + BUFFERS


def newton(c: Tensor, floor: float) -> tuple[Tensor, float] | None:
    """The polar factor and gap of one C whose singular values all lie clearly above the floor, else None.

    Scaled Newton, X <- (z X + X^-T / z) / 2, on the triangular factor. Backward stable, and all products and inverses,
    where half of a singular value decomposition waits for memory. Q becomes the map in place and the inverse is made
    and used by rows, so one copy of C and two of the smaller side squared are the peak.
    References: Higham, "Computing the polar decomposition - with applications", SIAM J. Sci. Stat. Comput. 7 (1986);
    the scaling z is of Byers and Xu, SIAM J. Matrix Anal. Appl. 30 (2008).
    """
    wide, unit = c if c.shape[0] <= c.shape[1] else c.mT, magnitude(c)
    tame = bool((unit > TAME) & (unit < 1 / TAME))  # else the largest entry becomes 1: no product over- or underflows
    q, r = torch.linalg.qr((wide if tame else wide / unit).mT)
    x = r.mT.div_(unit) if tame else r.mT
    if not bool(x.diagonal().abs().min() > torch.finfo(x.dtype).eps * torch.linalg.matrix_norm(x)):  # NaN where C = 0
        return None
    solve = torch.linalg.solve_triangular
    estimate = partial(largest_eigenvalue, like=x[None])
    high = float(estimate(lambda v: x.mT @ (x @ v))) ** 0.5
    low = float(estimate(lambda v: solve(x.mT, solve(x, v, upper=False), upper=True))) ** -0.5
    if not low > 1.1 * floor * high:  # the estimates err by less than that factor
        return None
    scale, following = (low * high) ** -0.5, (2 * (low * high) ** 0.5 / (low + high)) ** 0.5
    for _ in range(30):  # 9 steps at most from any condition float64 can hold
        if bool(_newton_step(x, scale) < 1e-8):  # the next change would be its square
            break
        scale, following = following, (2 / (following + 1 / following)) ** 0.5
    t = q.mT
    _apply(x, t)
    return (t if c.shape[0] <= c.shape[1] else t.mT), low / high


def _newton_step(x: Tensor, scale: float) -> Tensor:
    """X <- (z X + X^-T / z) / 2 in place; |change|_F / sqrt(k)."""
    change = x.new_zeros(())
    lu, pivots, _ = torch.linalg.lu_factor_ex(x)
    for rows in blocks(len(x)):
        step = torch.zeros_like(x[rows]).mT
        step[rows].fill_diagonal_(1)
        torch.linalg.lu_solve(lu, pivots, step, out=step)  # these columns of the inverse
        step.div_(2 * scale).add_(x[rows].mT, alpha=scale / 2 - 1)
        x[rows] += step.mT
        change = torch.hypot(change, torch.linalg.matrix_norm(step))
    mean: Tensor = change / len(x) ** 0.5
    return mean


def magnitude(c: Tensor) -> Tensor:
    """The largest absolute entry of each matrix [..., 1, 1]; NaN where one is NaN. Makes no copy."""
    return torch.maximum(c.amax((-2, -1), keepdim=True), -c.amin((-2, -1), keepdim=True))


def remote(x: Tensor) -> bool:
    """Whether ``x`` lies on a device that works while the host goes on: nothing is read before the certificate."""
    return bool(x.is_cuda)


def _strip(length: int, *, device: bool) -> int:
    return max(STRIP if device else 64, -(-length // 32))


def blocks(length: int, like: Tensor | None = None) -> Iterator[slice]:
    """Slices of rows, so that a temporary of one is small beside the matrix; STRIP of them where ``like`` is remote."""
    size = _strip(length, device=like is not None and remote(like))
    return (slice(start, min(start + size, length)) for start in range(0, length, size))
