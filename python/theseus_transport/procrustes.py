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
from .polar import FULL_RATE, START, blocks, magnitude, newton, polar_factor

Null = Literal["partial", "completed", "svd"]
Method = Literal["auto", "iterate", "lapack"]
FLOOR = 1e-6  # singular values below this share of the largest do not determine a direction
FLOOR_DOUBLE = 1e-12  # where both models compute in float64, rounding lies at 1e-16
EPS = torch.finfo(torch.float64).eps
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
    method: Method = "auto",
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
        method: ``iterate`` needs less memory (:func:`~theseus_transport.polar.polar_bytes`); ``lapack`` is torch's svd;
            ``auto`` iterates on CUDA, which has not run yet, and on the CPU large matrices of full rank. What
            iterations do not give (``svd``, ``completed`` with ``toward`` below full rank) and what fails its
            certificate is left to ``lapack``.

    Raises:
        InputRefused: ``null`` or ``method`` is unknown, or ``floor`` is not in [0, 1).
        NumericalError: ``cross`` is not finite, or the result fails its certificate.
    """
    for name, value, choices in (("null", null, get_args(Null)), ("method", method, get_args(Method))):
        if value not in choices:
            raise InputRefused(f"{name} is {value!r}; choose one of {', '.join(choices)}")
    if not 0 <= floor < 1:
        raise InputRefused(f"floor is {floor}; it must be at least 0 and below 1 (default {FLOOR:g})")
    c = cross.double()
    if null == "completed" and toward is not None and c.ndim > 2:
        options = {"null": null, "floor": floor, "method": method}
        each = [procrustes(one, toward=other, **options) for one, other in zip(c, toward, strict=True)]  # type: ignore[arg-type]
        return Polar(*(torch.stack([getattr(p, f.name) for p in each]) for f in fields(Polar)))
    if c.numel() and not bool(torch.isfinite(magnitude(c)).all()):
        raise NumericalError(f"the cross-moment {list(c.shape)} holds NaN or Inf")
    iterate = method == "iterate" or (method == "auto" and c.is_cuda)
    newtons = method == "iterate" or (method == "auto" and min(c.shape[-2:]) >= ITERATE_FROM)
    if c.ndim == 2 and c.numel() and newtons and not c.is_cuda and (found := _newton(c, floor)):
        return found
    partial = null == "partial" or (null == "completed" and toward is None)
    if iterate and c.numel() and partial and (found := _iterate(c, floor, energies)):
        return found
    u, s, vh = _svd(c)
    largest = s[..., :1] if s.shape[-1] else s.new_zeros(*s.shape[:-1], 1)
    kept = torch.ones_like(s, dtype=torch.bool) if null == "svd" else (s > floor * largest)
    if energies is not None and not bool(kept.all()):
        kept = torch.arange(len(s), device=s.device) < max(int(kept.sum()), _rank_of_correlations(c, energies, floor))
    rank = kept.sum(-1)
    smallest = torch.where(kept, s, torch.inf).amin(-1) if s.shape[-1] else torch.full_like(largest[..., 0], torch.inf)
    gap = torch.where((rank > 0) & (largest[..., 0] > 0), smallest / largest[..., 0], 0.0)
    result = Polar(u.mul_(kept[..., None, :]) @ vh, rank, gap)
    if null != "completed" or toward is None:
        del u, vh  # as large as C and more
    certify(result.map, c, rank, floor=floor)
    return result if null != "completed" or toward is None else _complete(result, u, vh, toward.double(), floor)


def _rank_of_correlations(c: Tensor, energies: tuple[Tensor, Tensor], floor: float, *, iterate: bool = False) -> int:
    """Rank of C_ij / sqrt(E_i E_j); features as silent as rounding (floor of the loudest) do not count."""
    loud = [e.double().clamp(min=floor**2 * float(e.max())).sqrt() for e in energies]
    if not all(bool((x > 0).all()) for x in loud):
        return 0
    c = (c / loud[0][:, None]).div_(loud[1])
    if iterate:
        return int(polar_factor(c, floor=floor, eigh=not c.is_cuda)[1])
    s = torch.linalg.svdvals(c)
    return int((s > floor * s[0]).sum())


def _newton(c: Tensor, floor: float) -> Polar | None:
    """The map of one C of full rank that passes its certificate, or None: another way decides."""
    found = newton(c, floor)
    if found is None:
        return None
    t, rank = found[0], torch.tensor(min(c.shape), device=c.device)
    try:
        certify(t, c, rank, floor=floor)
    except NumericalError:
        return None
    return Polar(t, rank, torch.tensor(found[1], dtype=c.dtype, device=c.device))


def _iterate(c: Tensor, floor: float, energies: tuple[Tensor, Tensor] | None) -> Polar | None:
    """The same of any rank and in batches, on any device, or None: LAPACK decides."""
    mixed = c.is_cuda and torch.cuda.get_device_capability(c.device) not in FULL_RATE
    least, eigh = 0, not c.is_cuda  # eigenvectors wait for the host
    if energies is not None:
        least, eigh = _rank_of_correlations(c, energies, floor, iterate=True), True
    for start, rough in ((START, mixed), (START * 1e-3, False)):
        start, eps = max(min(start, floor / 100), EPS), torch.finfo(torch.float32 if rough else torch.float64).eps
        result = Polar(*polar_factor(c, floor=floor, start=start, mixed=rough, eigh=eigh, least=least))
        try:
            certify(result.map, c, result.rank, floor=floor, eps=eps)
            return result
        except NumericalError:
            continue
    return None


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


def certify(t: Tensor, cross: Tensor, rank: Tensor, *, floor: float, eps: float = EPS) -> None:
    """Check that ``t`` is the partial polar factor of ``cross`` on ``rank`` directions, however it was made.

    ``eps`` is the unit roundoff of the steps that made it. Temporaries: two of the smaller side squared, no copy of C.

    T is a partial isometry, H = T^T C is symmetric positive semidefinite, and what T leaves out of C is small:
    |C - T T^T C| and |C - C T^T T| at most 2 floor s_1 sqrt(k - rank). Without the last, T = 0 would pass.

    Raises:
        NumericalError: one of these fails; the message says which, and by how much.
    """
    k = min(t.shape[-2:])
    if t.numel() == 0:
        return
    shape, tiny, norm = t.shape, torch.finfo(torch.float64).tiny, torch.linalg.matrix_norm
    unit = magnitude(cross).clamp(min=tiny)  # norms square: 1e300 would overflow
    if shape[-2] > k:  # the shorter side first: every product is then as small as it can be
        t, cross = t.mT, cross.mT
    full = bool((rank == k).all())
    gram = _check_isometry(t, shape, full=full, eps=eps)
    eps, h = _rounding(t, eps), t.new_empty(*shape[:-2], k, k)
    scale, right, left = t.new_zeros(3, *shape[:-2])
    for rows in blocks(k):
        own = cross[..., rows, :] / unit
        h[..., rows, :] = part = own @ t.mT
        scale = torch.hypot(scale, norm(own))
        if gram is not None:
            left = torch.hypot(left, norm(own - (gram[..., rows, :] / unit) @ cross))
        right = torch.hypot(right, norm(own.sub_(part @ t)))
    del gram
    scale = scale.clamp(min=tiny)
    left_out = 2 * floor * scale * (k - rank).double().sqrt() + eps * scale
    skew = norm(h - h.mT)
    shifted = (h + h.mT).div_(2 * scale[..., None, None])
    shifted.diagonal(dim1=-2, dim2=-1).add_(eps)
    del h
    checks = {
        "|H - H^T|": (skew, eps * scale),
        "|C - C T^T T|": (right, left_out),
        "the number of H that are not positive semidefinite": (torch.linalg.cholesky_ex(shifted)[1] != 0, 0.5),
        "|C - T T^T C|": (left, left_out),  # 0 where T T^T = 1, which leaves nothing out
    }
    for name, (value, bound) in checks.items():
        _require(shape, name, value, bound)


def _check_isometry(t: Tensor, shape: torch.Size, *, full: bool = False, eps: float = EPS) -> Tensor | None:
    """The projector T T^T of the wide ``t`` [k, m]; None where T has its ``full`` rank k, and it is the identity."""
    gram, excess = t @ t.mT, t.new_zeros(shape[:-2])
    if full:
        name = "|T T^T - 1|"
        gram.diagonal(dim1=-2, dim2=-1).sub_(1)
        excess = torch.linalg.matrix_norm(gram)
    else:
        name = "|T T^T T - T|"
        for rows in blocks(t.shape[-2]):
            excess = torch.hypot(excess, torch.linalg.matrix_norm(gram[..., rows, :] @ t - t[..., rows, :]))
    _require(shape, name, excess, _rounding(t, eps) * t.shape[-2] ** 0.5)
    return None if full else gram


def _rounding(t: Tensor, eps: float) -> float:
    """Relative rounding of a product of these sizes, with room for the decomposition's own."""
    return 64 * eps * max(t.shape[-2:])


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
