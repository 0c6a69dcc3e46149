"""The certificate of a map: is it the partial polar factor of its cross-moment, however it was made."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import NumericalError
from .polar import blocks, magnitude

EPS = torch.finfo(torch.float64).eps


def certify(t: Tensor, cross: Tensor, rank: Tensor, *, floor: float, eps: float = EPS) -> None:
    """Check that ``t`` is the partial polar factor of ``cross`` on ``rank`` directions, however it was made.

    ``eps`` is the unit roundoff of the steps that made it. Temporaries: two of the smaller side squared, no copy of C.

    T is a partial isometry, H = T^T C is symmetric positive semidefinite, and what T leaves out of C is small:
    |C - T T^T C| and |C - C T^T T| at most 2 floor s_1 sqrt(k - rank). Without the last, T = 0 would pass.

    Raises:
        NumericalError: one of these fails; the message says which, and by how much.
    """
    k = min(t.shape[-2:])
    if t.numel() == 0:  # nothing to be wrong
        return
    shape, tiny, norm = t.shape, torch.finfo(torch.float64).tiny, torch.linalg.matrix_norm
    unit = magnitude(cross).clamp(min=tiny)  # norms square: 1e300 would overflow
    if shape[-2] > k:  # the shorter side first: every product is then as small as it can be
        t, cross = t.mT, cross.mT
    # A partial isometry: T T^T T = T; of full rank T T^T = 1, and the product with C below is saved.
    full = bool((rank == k).all())
    gram = check_isometry(t, shape, full=full, eps=eps)
    # By rows of C, each strip read once: H = C T^T (T and C are wide now), |C|, and what T leaves out on either side.
    eps, h = _rounding(t, eps), t.new_empty(*shape[:-2], k, k)
    scale, right, left = t.new_zeros(3, *shape[:-2])
    for rows in blocks(k, t):
        own = cross[..., rows, :] / unit
        h[..., rows, :] = part = own @ t.mT
        scale = torch.hypot(scale, norm(own))
        if gram is not None:
            left = torch.hypot(left, norm(own - (gram[..., rows, :] / unit) @ cross))
        right = torch.hypot(right, norm(own.sub_(part @ t)))
    del gram
    # The k - rank singular values that T leaves out are at most floor s_1 each, and s_1 <= |C|; rounding beside them.
    scale = scale.clamp(min=tiny)
    left_out = 2 * floor * scale * (k - rank).double().sqrt() + eps * scale
    # H + eps |C| has a Cholesky factor if and only if all eigenvalues of H are above -eps |C|; none is computed.
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


def check_isometry(t: Tensor, shape: torch.Size, *, full: bool = False, eps: float = EPS) -> Tensor | None:
    """The projector T T^T of the wide ``t`` [k, m]; None where T has its ``full`` rank k, and it is the identity."""
    gram, excess = t @ t.mT, t.new_zeros(shape[:-2])
    if full:
        name = "|T T^T - 1|"
        gram.diagonal(dim1=-2, dim2=-1).sub_(1)
        excess = torch.linalg.matrix_norm(gram)
    else:
        name = "|T T^T T - T|"
        for rows in blocks(t.shape[-2], t):
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
