"""The polar factor by iteration beside U V^T of torch.linalg.svd: `make bench`. On a GPU not run yet."""

import pytest
import torch
from theseus_transport import polar, procrustes
from timing import DEVICE, in_turns, ratio

FLOOR = 1e-6
CUDA = ((3072, 4096, 1), (8192, 14336, 1), (64, 64, 10_000))  # (rows, columns, matrices)
CPU = ((768, 1024, 1), (1216, 2240, 1), (64, 64, 144))
DEFICIENT = 0.75  # share of columns that are not 0, where the rank is not full


def by_svd(c: torch.Tensor) -> torch.Tensor:
    u, s, vh = torch.linalg.svd(c, full_matrices=False)
    return (u * (s > FLOOR * s[..., :1])[..., None, :]) @ vh


@pytest.mark.parametrize("rows, columns, count", CUDA if DEVICE == "cuda" else CPU)
@pytest.mark.parametrize("rank", ["full", "deficient"])
def test_polar(store, rows: int, columns: int, count: int, rank: str) -> None:
    draw = torch.Generator(DEVICE).manual_seed(0)
    c = torch.randn(count, rows, columns, dtype=torch.float64, device=DEVICE, generator=draw)
    if rank == "deficient":
        c[..., int(DEFICIENT * min(rows, columns)) :] = 0
    c = c[0] if count == 1 else c
    expected = by_svd(c)
    found = procrustes.procrustes(c, floor=FLOOR, method="iterate")
    # Both are right to eps over the smallest kept share: the gap.
    allowed = 30 * torch.finfo(c.dtype).eps * max(rows, columns) / found.gap.min()
    assert (found.map - expected).norm(dim=(-2, -1)).max() <= 2 * allowed
    seconds = in_turns(
        {
            "ours": lambda: procrustes.procrustes(c, floor=FLOOR, method="iterate"),
            "bare": lambda: polar.polar_factor(c, floor=FLOOR, eigh=DEVICE == "cpu"),
            "svd": lambda: by_svd(c),
        }
    )
    row = {"case": f"{count} x {rows} x {columns}, {rank} rank"}
    row |= {f"{name} ms": 1e3 * min(each) for name, each in seconds.items()}  # bare: without certificate
    if DEVICE == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        procrustes.procrustes(c, floor=FLOOR, method="iterate")
        row |= {"peak MB": (torch.cuda.max_memory_allocated() - before) / 1e6}
    row |= {"over svd": ratio(seconds["ours"], seconds["svd"])}
    store("polar", row)
