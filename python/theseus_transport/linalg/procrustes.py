"""Orthogonal Procrustes with an honest null space: the partial polar factor of a cross-moment, and its certificate.

T = argmax tr(T^T C) over partial isometries. With C = U diag(s) V^T the maximiser is U_r V_r^T on the r directions the
data determines (s > floor * s_1); what lies outside is a choice, named by ``null``.
Reference: Schönemann, "A generalized solution of the orthogonal Procrustes problem", Psychometrika 31 (1966).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Literal, get_args

import scipy.linalg
import torch
from torch import Tensor

import theseus_ext

from ..errors import InputRefused, NumericalError
from .certificate import EPS, certify, check_isometry
from .polar import FULL_RATE, START, largest_eigenvalue, magnitude, newton, polar_factor, remote

Null = Literal["partial", "completed", "svd"]
Method = Literal["auto", "iterate", "lapack"]
FLOOR = 1e-6  # singular values below this share of the largest do not determine a direction
FLOOR_DOUBLE = 1e-12  # where both models compute in float64, rounding lies at 1e-16
LEAN = 1e-4  # weight of another map beside a cross-moment's norm: float32 rounds at 1e-7 of that
ITERATE_FROM = 1024  # smaller sides at least this long are iterated where they have full rank: LAPACK is slower there
# Rows and columns up to which a GPU's rotations (theseus_ext.polar) make maps, and not batched products: in float64,
# with vectors, they fit the shared memory of any GPU. Not yet measured on a GPU.
JACOBI_UP_TO = 64


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
        method: ``iterate`` needs less memory (``polar_bytes`` in ``polar.py``); ``lapack`` is torch's svd;
            ``auto`` iterates on CUDA, which has not run yet, and on the CPU large matrices of full rank. What
            iterations do not give (``svd``; on the CPU ``completed`` with ``toward`` below full rank) and what fails
            its certificate is left to ``lapack``.

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
    # Completion looks at the rank of one map: a batch is taken one by one.
    if null == "completed" and toward is not None and c.ndim > 2:
        options = {"null": null, "floor": floor, "method": method}
        each = [procrustes(one, toward=other, **options) for one, other in zip(c, toward, strict=True)]  # type: ignore[arg-type]
        return Polar(*(torch.stack([getattr(p, f.name) for p in each]) for f in fields(Polar)))
    # Who may decide: iterations give no LAPACK factors (`svd`), and complete below full rank only on a device.
    device, completes = remote(c), null == "completed" and toward is not None
    iterate = method == "iterate" or (method == "auto" and device)
    iterate &= null != "svd" and c.numel() > 0 and (device or not completes)
    if not (iterate and device):
        _check_finite(c)  # else the certificate tells
    # Full rank on the CPU, where there is no null space to complete: half the time and memory of a decomposition.
    newtons = method == "iterate" or (method == "auto" and min(c.shape[-2:]) >= ITERATE_FROM)
    if c.ndim == 2 and c.numel() and newtons and not device and (found := _newton(c, floor)):
        return found
    # Any rank, by products; a map that fails its certificate, or its completion, falls through to LAPACK.
    if iterate and (found := _iterate(c, floor, energies)):
        whole = _complete_afar(found, toward.double(), floor) if completes and toward is not None else found
        if whole is not None:
            return whole
    # LAPACK: the directions above the floor, or as many as the correlations of comparable features have.
    u, s, vh = _svd(c)
    kept = torch.ones_like(s, dtype=torch.bool) if null == "svd" else s > floor * _first(s)
    if energies is not None and not bool(kept.all()):
        kept = torch.arange(len(s), device=s.device) < max(int(kept.sum()), _rank_of_correlations(c, energies, floor))
    rank, gap = kept.sum(-1), _gap(s, kept)
    result = Polar(u.mul_(kept[..., None, :]) @ vh, rank, gap)
    if null != "completed" or toward is None:
        del u, vh  # as large as C and more
    certify(result.map, c, rank, floor=floor)
    return result if null != "completed" or toward is None else _complete(result, u, vh, toward.double(), floor)


def leaning(cross: Tensor, t: Tensor) -> Tensor:
    """C + 1e-4 |C| T: what C [..., dS, dT] hardly determines is left to T, a map from more data than C sums.

    Where both know the same map it is the polar factor of either, and no direction of T is near the floor.
    """
    c = cross.double()
    weight: Tensor = LEAN * torch.linalg.matrix_norm(c)
    return torch.addcmul(c, weight[..., None, None], t)


def _first(s: Tensor) -> Tensor:
    """The largest of singular values [..., k], as [..., 1]."""
    return s[..., :1] if s.shape[-1] else s.new_zeros(*s.shape[:-1], 1)


def _gap(s: Tensor, kept: Tensor) -> Tensor:
    """The smallest singular value kept over the largest, 0 where there is none."""
    largest = _first(s)[..., 0]
    smallest = torch.where(kept, s, torch.inf).amin(-1) if s.shape[-1] else torch.full_like(largest, torch.inf)
    return torch.where(kept.any(-1) & (largest > 0), smallest / largest, 0.0)


def _rank_of_correlations(c: Tensor, energies: tuple[Tensor, Tensor], floor: float, *, iterate: bool = False) -> int:
    """Rank of C_ij / sqrt(E_i E_j); features as silent as rounding (floor of the loudest) do not count."""
    loud = [e.double().clamp(min=floor**2 * float(e.max())).sqrt() for e in energies]
    if not all(bool((x > 0).all()) for x in loud):
        return 0
    c = (c / loud[0][:, None]).div_(loud[1])
    if iterate:
        return int(polar_factor(c, floor=floor, eigh=not remote(c))[1])
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
    """The map of C [..., dS, dT] of any rank by iteration, certified, or None: LAPACK decides.

    A device is asked for its rank when the map is certified; only then does it matter what energies say.
    """
    device = remote(c)
    least = 0 if energies is None or device else _rank_of_correlations(c, energies, floor, iterate=True)
    found = _certified(c, floor, eigh=not device, least=least)
    if found is None or energies is None or not device or int(found.rank) == min(c.shape):
        return found
    least = _rank_of_correlations(c, energies, floor, iterate=True)
    return found if least <= int(found.rank) else _certified(c, floor, eigh=True, least=least)


def _certified(c: Tensor, floor: float, *, eigh: bool, least: int) -> Polar | None:
    """The first that passes its certificate of the ways there are, or None."""
    for result, eps in _attempts(c, floor, eigh=eigh, least=least):
        try:
            certify(result.map, c, result.rank, floor=floor, eps=eps)
            return result
        except NumericalError:
            _check_finite(c)
    return None


def _attempts(c: Tensor, floor: float, *, eigh: bool, least: int) -> Iterator[tuple[Polar, float]]:
    """Maps with the unit roundoff of what made them, in the order in which they are tried."""
    if not least and takes_jacobi(c):
        t, s = theseus_ext.polar(c, floor)
        kept = s > floor * _first(s)
        yield Polar(t, kept.sum(-1), _gap(s, kept)), EPS
    mixed = c.is_cuda and torch.cuda.get_device_capability(c.device) not in FULL_RATE
    for start, rough in ((START, mixed), (START * 1e-3, False)):
        start, eps = max(min(start, floor / 100), EPS), torch.finfo(torch.float32 if rough else torch.float64).eps
        yield Polar(*polar_factor(c, floor=floor, start=start, mixed=rough, eigh=eigh, least=least)), eps


def takes_jacobi(c: Tensor) -> bool:
    """Whether C goes to the kernel of one-sided Jacobi rotations."""
    return remote(c) and max(c.shape[-2:]) <= JACOBI_UP_TO and theseus_ext.cuda_problem(c.device) is None


def _complete(partial: Polar, u: Tensor, vh: Tensor, toward: Tensor, floor: float) -> Polar:
    """The polar factor of what ``toward`` [dS, dT] says between the directions ``partial`` leaves out, added to it.

    Args:
        u, vh: singular vectors [dS, k] and [k, dT] of the cross-moment ``partial`` was made of.
    """
    rank = int(partial.rank)
    left, right = (_complement(q) for q in (u[:, :rank], vh[:rank].mT))
    if not left.shape[1] or not right.shape[1]:
        return partial
    inner_u, s, inner_vh = _svd(left.mT @ toward @ right)
    kept = s > floor * torch.linalg.matrix_norm(toward, ord=2)
    t = partial.map + left @ (inner_u[:, kept] @ inner_vh[kept]) @ right.mT
    check_isometry(t if t.shape[0] <= t.shape[1] else t.mT, t.shape)
    return Polar(t, partial.rank + kept.sum(), partial.gap)


def _complete_afar(partial: Polar, toward: Tensor, floor: float) -> Polar | None:
    """T and the polar factor of (1 - T T^T) W (1 - T^T T) added, T = ``partial``'s map and W = ``toward`` [dS, dT].

    What :func:`_complete` makes of singular vectors, here by products alone. None: LAPACK decides.
    """
    t = partial.map
    if int(partial.rank) == min(t.shape):
        return partial
    w = toward / magnitude(toward).clamp(min=torch.finfo(t.dtype).tiny)
    rest = w - t @ (t.mT @ w)
    rest -= (rest @ t.mT) @ t
    size, left = (_spectral_norm(x) for x in (w, rest))
    if not left > floor * size:
        return partial
    found = _certified(rest, floor * size / left, eigh=False, least=0)
    if found is None:
        return None
    t = t + found.map
    try:
        check_isometry(t if t.shape[0] <= t.shape[1] else t.mT, t.shape)
    except NumericalError:
        return None
    return Polar(t, partial.rank + found.rank, partial.gap)


def _spectral_norm(x: Tensor) -> float:
    """The largest singular value of x [m, n], to a percent."""
    return math.sqrt(float(largest_eigenvalue(lambda v: x @ (x.mT @ v), x.mT[None])))


def _complement(q: Tensor) -> Tensor:
    """Orthonormal columns orthogonal to the orthonormal columns of ``q`` [d, r]: [d, d - r]."""
    basis: Tensor = torch.linalg.qr(q, mode="complete")[0]
    return basis[:, q.shape[1] :]


def _check_finite(c: Tensor) -> None:
    if c.numel() and not bool(torch.isfinite(magnitude(c)).all()):
        raise NumericalError(f"the cross-moment {list(c.shape)} holds NaN or Inf")


def _svd(c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    try:
        return theseus_ext.svd(c) if c.ndim > 2 else torch.linalg.svd(c, full_matrices=False)
    except torch.linalg.LinAlgError:  # divide and conquer did not converge: QR iteration is slower and surer
        if c.ndim > 2:
            u, s, vh = zip(*(_svd(one) for one in c), strict=True)
            return torch.stack(u), torch.stack(s), torch.stack(vh)
        u, s, vh = scipy.linalg.svd(c.cpu().numpy(), full_matrices=False, lapack_driver="gesvd")
        return tuple(torch.from_numpy(x).to(c) for x in (u, s, vh))  # type: ignore[return-value]
