"""Partial whitening, for ``paper``: features are evened out on each side before the polar factor is taken.

With Grams A = x_S^T x_S and B = x_T^T x_T the map is polar((A + eps)^-p C (B + eps)^-p): p = 0 is the cross-moment C
itself, p = 1/2 aligns fully whitened features. It costs two more moments per space, [dS, dS] and [dT, dT].
Reference: Hotelling, "Relations between two sets of variates", Biometrika 28 (1936), for p = 1/2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import NumericalError


def whiten(cross: Tensor, grams: tuple[Tensor, Tensor], *, power: float, eps: float) -> Tensor:
    """(A + eps)^-power C (B + eps)^-power in float64, [dS, dT].

    Args:
        cross: C [dS, dT]; centred if the Grams are.
        grams: A [dS, dS] and B [dT, dT], sums over the same tokens as C.
        power: in [0, 1/2]; eps: above 0, in the units of the Grams.
    """
    left, right = (_inverse_power(gram.double(), power, eps) for gram in grams)
    return left @ cross.double() @ right


def whiten_bytes(source: int, target: int, *, center: bool) -> int:
    """Peak bytes of :func:`whiten` between spaces so wide, beside the moments, with centred copies of these.

    eigh holds the symmetrised Gram, the vectors and twice as much to work in, one power beside it; then both powers, a
    product and the result.
    """
    own, other, both = source**2, target**2, source * target
    powers, product = max(4 * own, own + 4 * other), own + other + 2 * both
    return 8 * (max(powers, product) + center * (own + other + both))


def _inverse_power(gram: Tensor, power: float, eps: float) -> Tensor:
    """(G + eps)^-power of a symmetric G, no eigenvalue of G + eps counting as less than eps."""
    if not bool(torch.isfinite(gram).all()):
        raise NumericalError(f"the Gram {list(gram.shape)} to whiten with holds NaN or Inf")
    values, vectors = torch.linalg.eigh((gram + gram.mT) / 2)
    powers: Tensor = (values + eps).clamp(min=eps) ** -power
    return torch.matmul(vectors * powers, vectors.mT)
