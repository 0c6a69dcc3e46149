"""The polar factor by iteration beside what torch.linalg makes: `make bench`, on a GPU `make gpu-check` (not run yet).

On a GPU an SVD of a large matrix takes minutes, and one of many small ones a launch each: there large matrices are
compared with the eigenvectors of their Gram (right to eps / gap^2, which is enough here), and of many small ones FEW
are decomposed and the time is scaled to all. Every map of ours is certified (procrustes.certify), compared or not.
"""

from __future__ import annotations

import pytest
import torch
from ceilings import ceilings
from theseus_transport.budget.time import polar_flops
from theseus_transport.linalg import polar, procrustes
from timing import DEVICE, in_turns, ratio
from torch import Tensor

FLOOR = 1e-6
CUDA = {  # (rows, columns, matrices): the model target on an H200, in ms
    (3072, 4096, 1): 40,
    (8192, 14336, 1): 1000,
    (64, 64, 10_000): 15,
}
CPU = ((768, 1024, 1), (1216, 2240, 1), (64, 64, 144))
DEFICIENT = 0.75  # share of columns that are not 0, where the rank is not full
FEW = 128
GRAM_FROM = 2048  # smaller sides from here on, on a GPU
CLEAR = 1e-8  # eigenvalues of a Gram are right to 1e-12 of the largest; these matrices have none between


def by_svd(c: Tensor) -> Tensor:
    u, s, vh = torch.linalg.svd(c, full_matrices=False)
    return (u * (s > FLOOR * s[..., :1])[..., None, :]) @ vh


def by_gram(c: Tensor) -> Tensor:
    """(C C^T)^(-1/2) C of a wide C, on the directions of clearly positive eigenvalues."""
    values, vectors = torch.linalg.eigh(c @ c.mT)
    roots = torch.where(values > CLEAR * values[-1], values, torch.inf).rsqrt()
    return ((vectors * roots) @ vectors.mT) @ c


@pytest.mark.parametrize("rows, columns, count", CUDA if DEVICE == "cuda" else CPU)
@pytest.mark.parametrize("rank", ["full", "deficient"])
def test_polar(store, rows: int, columns: int, count: int, rank: str) -> None:
    draw = torch.Generator(DEVICE).manual_seed(0)
    c = torch.randn(count, rows, columns, dtype=torch.float64, device=DEVICE, generator=draw)
    if rank == "deficient":
        c[..., int(DEFICIENT * min(rows, columns)) :] = 0
    c = c[0] if count == 1 else c
    gram = DEVICE == "cuda" and min(rows, columns) >= GRAM_FROM
    few = c[:FEW] if DEVICE == "cuda" and count > 1 else c
    plain = by_gram if gram else by_svd
    # as neurons are: their rank is that of correlations; only a single map has it
    alike = tuple(torch.ones(d, dtype=c.dtype, device=DEVICE) for d in (rows, columns)) if count == 1 else None
    found = procrustes.procrustes(c, floor=FLOOR, method="iterate")
    # Both are right to eps over the smallest kept share: the gap, and through a Gram over its square.
    allowed = 30 * torch.finfo(c.dtype).eps * max(rows, columns) / found.gap.min() ** (2 if gram else 1)
    difference = (found.map if few is c else found.map[: len(few)]) - plain(few)
    error = difference.norm(dim=(-2, -1)).max()
    assert error <= 2 * allowed
    del found, difference
    seconds = in_turns(
        {
            "ours": lambda: procrustes.procrustes(c, floor=FLOOR, method="iterate"),
            "bare": lambda: polar.polar_factor(c, floor=FLOOR, eigh=DEVICE == "cpu"),
            **(
                {"weighed": lambda: procrustes.procrustes(c, floor=FLOOR, method="iterate", energies=alike)}
                if alike
                else {}
            ),
            "torch": lambda: plain(few),
        }
    )
    if few is not c:
        seconds["torch"] = [each * count / len(few) for each in seconds["torch"]]
    row = {"case": f"{count} x {rows} x {columns}, {rank} rank, beside {'eigh of the Gram' if gram else 'svd'}"}
    # bare: without certificate; weighed: with energies
    row |= {f"{name} ms": 1e3 * min(each) for name, each in seconds.items()}
    rate = count * polar_flops(rows, columns) / min(seconds["ours"])
    row |= {"GFLOP/s": rate / 1e9}
    row |= {"error": float(error)}
    if DEVICE == "cuda":
        row |= {"target ms": CUDA[rows, columns, count], "share of ceiling": rate / ceilings()["float64"]}
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        procrustes.procrustes(c, floor=FLOOR, method="iterate")
        row |= {"peak MB": (torch.cuda.max_memory_allocated() - before) / 1e6}
    row |= {"over torch": ratio(seconds["ours"], seconds["torch"])}
    store("polar", row)
