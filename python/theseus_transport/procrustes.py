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

from .errors import InputRefused, NumericalError

Null = Literal["partial", "completed", "svd"]
FLOOR = 1e-6  # singular values below this share of the largest do not determine a direction
FLOOR_DOUBLE = 1e-12  # where both models compute in float64, rounding lies at 1e-16


@dataclass(frozen=True)
class Polar:
    """A map with what is known about it.

    Attributes:
        map: float64 [..., dS, dT], a partial isometry.
        rank: int64 [...], how many directions the data determined.
        gap: float64 [...], the smallest kept singular value over the largest; 0 when nothing was kept.
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


def _complete(partial: Polar, u: Tensor, vh: Tensor, toward: Tensor, floor: float) -> Polar:
    """The polar factor of what ``toward`` [dS, dT] says between the directions ``partial`` leaves out, added to it."""
    rank = int(partial.rank)
    left, right = (_complement(q) for q in (u[:, :rank], vh[:rank].mT))
    if not left.shape[1] or not right.shape[1]:
        return partial
    inner_u, s, inner_vh = _svd(left.mT @ toward @ right)
    kept = s > floor * torch.linalg.matrix_norm(toward, ord=2)
    t = partial.map + left @ (inner_u[:, kept] @ inner_vh[kept]) @ right.mT
    _check_isometry(t)
    return Polar(t, partial.rank + kept.sum(), partial.gap)


def _complement(q: Tensor) -> Tensor:
    """Orthonormal columns orthogonal to the orthonormal columns of ``q`` [d, r]: [d, d - r]."""
    return torch.linalg.qr(q, mode="complete")[0][:, q.shape[1] :]


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
    _check_isometry(t)
    eps = _rounding(t)
    norm = torch.linalg.matrix_norm
    adjoint = t.mT
    scale = norm(cross).clamp(min=torch.finfo(torch.float64).tiny)
    h = adjoint @ cross
    left_out = 2 * floor * scale * (k - rank).double().sqrt() + eps * scale
    shifted = (h + h.mT) / 2 / scale[..., None, None] + eps * torch.eye(h.shape[-1], dtype=h.dtype, device=h.device)
    checks = {
        "|H - H^T|": (norm(h - h.mT), eps * scale),
        "|C - T T^T C|": (norm(cross - t @ h), left_out),
        "|C - C T^T T|": (norm(cross - (cross @ adjoint) @ t), left_out),
        "the number of H that are not positive semidefinite": (torch.linalg.cholesky_ex(shifted)[1] != 0, 0.5),
    }
    for name, (value, bound) in checks.items():
        _require(t, name, value, bound)


def _check_isometry(t: Tensor) -> None:
    k = min(t.shape[-2:])
    _require(t, "|T T^T T - T|", torch.linalg.matrix_norm(t @ t.mT @ t - t), _rounding(t) * k**0.5)


def _rounding(t: Tensor) -> float:
    """Relative rounding of a float64 product of these sizes, with room for the decomposition's own."""
    return 64 * torch.finfo(torch.float64).eps * max(t.shape[-2:])


def _require(t: Tensor, name: str, value: Tensor, bound: Tensor | float) -> None:
    if not bool((value <= bound).all()):
        worst, limit = float(value.double().max()), float(torch.as_tensor(bound).max())
        raise NumericalError(f"a map {list(t.shape)} failed its certificate: {name} is {worst:.3g}, above {limit:.3g}")


def _svd(c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    try:
        return torch.linalg.svd(c, full_matrices=False)
    except torch.linalg.LinAlgError:  # divide and conquer did not converge: QR iteration is slower and surer
        if c.ndim > 2:
            u, s, vh = zip(*(_svd(one) for one in c), strict=True)
            return torch.stack(u), torch.stack(s), torch.stack(vh)
        u, s, vh = scipy.linalg.svd(c.cpu().numpy(), full_matrices=False, lapack_driver="gesvd")
        return tuple(torch.from_numpy(x).to(c) for x in (u, s, vh))  # type: ignore[return-value]
