"""Leading singular directions of a matrix: by LAPACK where it is small, by randomised subspace iteration above.

Reference: Halko, Martinsson and Tropp, "Finding structure with randomness", SIAM Review 53 (2011), algorithm 4.4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import NumericalError

WHOLE_UP_TO = 256  # smaller sides up to this are decomposed whole: of 1024 LAPACK takes five times as long as iterating
OVERSAMPLING = 16  # directions carried beside those asked for
ITERATIONS = 8  # of Y^T Y: of values that fall as i^-1/2, rank 16 keeps all but 1e-6 of what the best directions do
SEED = 14


def leading(y: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The ``rank`` largest singular values s of Y [m, n] with their vectors: U [m, k], s [k], V [n, k].

    k = min(rank, m, n). Where Y has rank k or less, U diag(s) V^T is Y but for rounding. Above ``WHOLE_UP_TO`` on the
    smaller side values are the largest of a subspace found by iteration from seeded directions: the same in every run,
    and never above the true ones.

    Raises:
        NumericalError: Y is not finite, or its decomposition did not converge.
    """
    k = min(rank, *y.shape)
    try:
        if min(y.shape) <= max(WHOLE_UP_TO, k + OVERSAMPLING):
            u, s, vh = torch.linalg.svd(y, full_matrices=False)
            return u[:, :k], s[:k], vh[:k].mT
        seeded = torch.Generator().manual_seed(SEED)
        q = torch.randn(y.shape[1], k + OVERSAMPLING, generator=seeded, dtype=torch.float64).to(y)
        for _ in range(ITERATIONS):  # orthonormal after every product: small values would drown in large ones
            q = torch.linalg.qr(y.mT @ torch.linalg.qr(y @ q)[0])[0]
        u, s, vh = torch.linalg.svd(y @ q, full_matrices=False)
    except torch.linalg.LinAlgError as error:
        raise NumericalError(f"singular values of a matrix {list(y.shape)} were not found: {error}") from error
    return u[:, :k], s[:k], q @ vh[:k].mT


def balanced(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors A [rank, in], B [out, rank] of the product B A of ``a`` [k, in] and ``b`` [out, k], k <= rank.

    Row i of A and column i of B have the same norm; the largest entry of the column is positive. Directions that are
    not there are zero.
    """
    rows, columns = (torch.linalg.vector_norm(x, dim=d) for x, d in ((a, 1), (b, 0)))
    largest = b.gather(0, b.abs().argmax(0, keepdim=True))[0] if len(b) else columns
    root = (rows * columns).sqrt() * torch.where(largest < 0, -1.0, 1.0)
    up, left = (torch.where(norm > 0, root / norm, 0.0) for norm in (rows, columns))
    pad = rank - len(a)
    return (
        torch.nn.functional.pad(a * up[:, None], (0, 0, 0, pad)),
        torch.nn.functional.pad(b * left, (0, pad)),
    )
