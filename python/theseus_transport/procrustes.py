"""Orthogonal Procrustes with an honest null space: the partial polar factor of a cross-moment, and its certificate.

T = argmax tr(T^T C) over partial isometries. With C = U diag(s) V^T the maximiser is U_r V_r^T on the r directions the
data determines (s > floor * s_1); what lies outside is a choice, named by ``null``.
Reference: Schönemann, "A generalized solution of the orthogonal Procrustes problem", Psychometrika 31 (1966).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, get_args

import scipy.linalg
import torch
from torch import Tensor

import theseus_ext

from .errors import InputRefused, NumericalError

Null = Literal["partial", "completed", "svd"]
FLOOR = 1e-6  # singular values below this share of the largest do not determine a direction
FLOOR_DOUBLE = 1e-12  # where both models compute in float64, rounding lies at 1e-16
ITERATE_FROM = 1024  # smaller sides at least this long are iterated where they have full rank: LAPACK is slower there


@dataclass(frozen=True)
class Polar:
    """A map with what is known about it.

    Attributes:
        map: float64 [..., dS, dT], a partial isometry.
        rank: int64 [...], how many directions the data determined.
        gap: float64 [...], the smallest kept singular value over the largest; 0 when nothing was kept. To a percent
            where the map was iterated.
    """

    map: Tensor
    rank: Tensor
    gap: Tensor


def procrustes(
    cross: Tensor,
    *,
    null: Null = "partial",
    floor: float = FLOOR,
    toward: Tensor | None = None,
    energies: tuple[Tensor, Tensor] | None = None,
) -> Polar:
    """The map T [dS, dT] that best aligns source to target rows (``x_S @ T`` near ``x_T``).

    Args:
        cross: [..., dS, dT] cross-moment(s) x_S^T x_T; leading dimensions are a batch.
        null: ``partial`` leaves undetermined directions out (deterministic); ``completed`` aligns them by what
            ``toward`` says about them; ``svd`` keeps LAPACK's full thin factors, noise included (for comparisons only).
        floor: singular values at most ``floor`` times the largest count as undetermined.
        toward: [..., dS, dT] companion cross-moment for ``completed``; without one, ``completed`` equals ``partial``.

        energies: ([dS], [dT]) of features that are comparable one by one (neurons): the rank is then that of their
            correlations, so one massive neuron does not make all others look undetermined. One map, no batch.

    Raises:
        InputRefused: ``null`` is unknown or ``floor`` is not in [0, 1).
        NumericalError: ``cross`` is not finite, or the result fails its certificate.
    """
    if null not in get_args(Null):
        raise InputRefused(f"null is {null!r}; choose one of {', '.join(get_args(Null))}")
    if not 0 <= floor < 1:
        raise InputRefused(f"floor is {floor}; it must be at least 0 and below 1 (default {FLOOR:g})")
    c = cross.double()
    if null == "completed" and toward is not None and c.ndim > 2:
        options = {"null": null, "floor": floor}
        each = [procrustes(one, toward=other, **options) for one, other in zip(c, toward, strict=True)]  # type: ignore[arg-type]
        return Polar(*(torch.stack([getattr(p, f.name) for p in each]) for f in fields(Polar)))
    if not bool(torch.isfinite(c).all()):
        raise NumericalError(f"the cross-moment {list(c.shape)} holds NaN or Inf")
    if c.ndim == 2 and min(c.shape) >= ITERATE_FROM and (iterated := _iterate(c, floor)):
        return iterated
    u, s, vh = _svd(c)
    largest = s[..., :1] if s.shape[-1] else s.new_zeros(*s.shape[:-1], 1)
    kept = torch.ones_like(s, dtype=torch.bool) if null == "svd" else (s > floor * largest)
    if energies is not None and not bool(kept.all()):
        kept = torch.arange(len(s), device=s.device) < max(int(kept.sum()), _rank_of_correlations(c, energies, floor))
    rank = kept.sum(-1)
    smallest = torch.where(kept, s, torch.inf).amin(-1) if s.shape[-1] else torch.full_like(largest[..., 0], torch.inf)
    gap = torch.where((rank > 0) & (largest[..., 0] > 0), smallest / largest[..., 0], 0.0)
    result = Polar((u * kept[..., None, :]) @ vh, rank, gap)
    certify(result.map, c, rank, floor=floor)
    return result if null != "completed" or toward is None else _complete(result, u, vh, toward.double(), floor)


def _rank_of_correlations(c: Tensor, energies: tuple[Tensor, Tensor], floor: float) -> int:
    """Rank of C_ij / sqrt(E_i E_j); features as silent as rounding (floor of the loudest) do not count."""
    loud = [e.double().clamp(min=floor**2 * float(e.max())).sqrt() for e in energies]
    if not all(bool((x > 0).all()) for x in loud):
        return 0
    s = torch.linalg.svdvals(c / loud[0][:, None] / loud[1])
    return int((s > floor * s[0]).sum())


def _iterate(c: Tensor, floor: float) -> Polar | None:
    """The polar factor of one C whose singular values all lie clearly above the floor, or None: LAPACK decides.

    Scaled Newton, X <- (z X + X^-T / z) / 2, on the triangular factor. Backward stable, and all products and inverses,
    where half of a singular value decomposition waits for memory.
    References: Higham, "Computing the polar decomposition - with applications", SIAM J. Sci. Stat. Comput. 7 (1986);
    the scaling z is of Byers and Xu, SIAM J. Matrix Anal. Appl. 30 (2008).
    """
    wide = c if c.shape[0] <= c.shape[1] else c.mT
    q, r = torch.linalg.qr((wide / wide.abs().max()).mT)  # the largest entry becomes 1: no product over- or underflows
    smallest = r.diagonal().abs().min()
    if not bool(smallest > torch.finfo(r.dtype).eps * torch.linalg.matrix_norm(r)):  # also where C = 0 gave NaN
        return None
    x, eye = r.mT, torch.eye(len(r), dtype=r.dtype, device=r.device)
    inverse = torch.linalg.solve_triangular(x, eye, upper=False)
    low, high = 1 / _largest(inverse), _largest(x)
    if low <= 1.1 * floor * high:  # `_largest` errs by less than that factor
        return None
    scale, following = (low * high) ** -0.5, (2 * (low * high) ** 0.5 / (low + high)) ** 0.5
    for _ in range(30):  # 9 steps at most from any condition float64 can hold
        step = x * (scale / 2) + inverse.mT / (2 * scale)
        change = torch.linalg.matrix_norm(step - x) / len(x) ** 0.5
        x = step
        if bool(change < 1e-8):  # the next change would be its square
            break
        inverse = torch.linalg.inv(x)
        scale, following = following, (2 / (following + 1 / following)) ** 0.5
    t = x @ q.mT
    t = t if c.shape[0] <= c.shape[1] else t.mT
    rank = torch.tensor(len(r), device=c.device)
    try:
        certify(t, c, rank, floor=floor)
    except NumericalError:
        return None
    return Polar(t, rank, torch.tensor(low / high, dtype=c.dtype, device=c.device))


def _largest(a: Tensor) -> float:
    """Largest singular value by block power iteration from a fixed start: from below, to a percent or better."""
    q = torch.randn(len(a), 8, dtype=a.dtype, generator=torch.Generator().manual_seed(0)).to(a.device)
    for _ in range(12):
        q = torch.linalg.qr(a.mT @ (a @ q))[0]
    return float(torch.linalg.matrix_norm(a @ q, ord=2))


def _complete(partial: Polar, u: Tensor, vh: Tensor, toward: Tensor, floor: float) -> Polar:
    """The polar factor of what ``toward`` [dS, dT] says between the directions ``partial`` leaves out, added to it."""
    rank = int(partial.rank)
    left, right = (_complement(q) for q in (u[:, :rank], vh[:rank].mT))
    if not left.shape[1] or not right.shape[1]:
        return partial
    inner_u, s, inner_vh = _svd(left.mT @ toward @ right)
    kept = s > floor * torch.linalg.matrix_norm(toward, ord=2)
    t = partial.map + left @ (inner_u[:, kept] @ inner_vh[kept]) @ right.mT
    _check_isometry(t if t.shape[0] <= t.shape[1] else t.mT, t.shape)
    return Polar(t, partial.rank + kept.sum(), partial.gap)


def _complement(q: Tensor) -> Tensor:
    """Orthonormal columns orthogonal to the orthonormal columns of ``q`` [d, r]: [d, d - r]."""
    basis: Tensor = torch.linalg.qr(q, mode="complete")[0]
    return basis[:, q.shape[1] :]


def certify(t: Tensor, cross: Tensor, rank: Tensor, *, floor: float) -> None:
    """Check that ``t`` is the partial polar factor of ``cross`` on ``rank`` directions, however it was made.

    T is a partial isometry, H = T^T C is symmetric positive semidefinite, and what T leaves out of C is small:
    |C - T T^T C| and |C - C T^T T| at most 2 floor s_1 sqrt(k - rank). Without the last, T = 0 would pass.

    Raises:
        NumericalError: one of these fails; the message says which, and by how much.
    """
    k = min(t.shape[-2:])
    if k == 0:
        return
    shape, tiny = t.shape, torch.finfo(torch.float64).tiny
    cross = cross / cross.abs().amax((-2, -1), keepdim=True).clamp(min=tiny)  # norms square: 1e300 would overflow
    if shape[-2] > k:  # the shorter side first: every product is then as small as it can be
        t, cross = t.mT, cross.mT
    full = bool((rank == k).all())
    gram = _check_isometry(t, shape, full=full)
    eps = _rounding(t)
    norm = torch.linalg.matrix_norm
    scale = norm(cross).clamp(min=tiny)
    h = cross @ t.mT
    left_out = 2 * floor * scale * (k - rank).double().sqrt() + eps * scale
    shifted = (h + h.mT) / 2 / scale[..., None, None] + eps * torch.eye(k, dtype=h.dtype, device=h.device)
    checks = {
        "|H - H^T|": (norm(h - h.mT), eps * scale),
        "|C - C T^T T|": (norm(cross - h @ t), left_out),
        "the number of H that are not positive semidefinite": (torch.linalg.cholesky_ex(shifted)[1] != 0, 0.5),
    }
    if not full:  # else T T^T = I leaves nothing out
        checks["|C - T T^T C|"] = norm(cross - gram @ cross), left_out
    for name, (value, bound) in checks.items():
        _require(shape, name, value, bound)


def _check_isometry(t: Tensor, shape: torch.Size, *, full: bool = False) -> Tensor:
    """T T^T of the wide ``t`` [k, m]: a projector, and the identity where T has its ``full`` rank k."""
    gram = t @ t.mT
    if full:
        name, excess = "|T T^T - 1|", gram - torch.eye(t.shape[-2], dtype=t.dtype, device=t.device)
    else:
        name, excess = "|T T^T T - T|", gram @ t - t
    _require(shape, name, torch.linalg.matrix_norm(excess), _rounding(t) * t.shape[-2] ** 0.5)
    return gram


def _rounding(t: Tensor) -> float:
    """Relative rounding of a float64 product of these sizes, with room for the decomposition's own."""
    return 64 * torch.finfo(torch.float64).eps * max(t.shape[-2:])


def _require(shape: torch.Size, name: str, value: Tensor, bound: Tensor | float) -> None:
    if not bool((value <= bound).all()):
        worst, limit = float(value.double().max()), float(torch.as_tensor(bound).max())
        raise NumericalError(f"a map {list(shape)} failed its certificate: {name} is {worst:.3g}, above {limit:.3g}")


def _svd(c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    try:
        return theseus_ext.svd(c) if c.ndim > 2 else torch.linalg.svd(c, full_matrices=False)
    except torch.linalg.LinAlgError:  # divide and conquer did not converge: QR iteration is slower and surer
        if c.ndim > 2:
            u, s, vh = zip(*(_svd(one) for one in c), strict=True)
            return torch.stack(u), torch.stack(s), torch.stack(vh)
        u, s, vh = scipy.linalg.svd(c.cpu().numpy(), full_matrices=False, lapack_driver="gesvd")
        return tuple(torch.from_numpy(x).to(c) for x in (u, s, vh))  # type: ignore[return-value]
