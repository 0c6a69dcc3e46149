"""svd and svdvals of many small matrices on a GPU, beside torch.linalg: `make gpu-check`. bench_svd.py is the CPU's.

Torch takes most sizes one by one, which would take minutes: it is timed on FEW matrices and the time scaled to all.
"""

import pytest
import torch
from timing import DEVICE, in_turns, ratio

import theseus_ext

FEW = 128
CASES = (  # (side, matrices, dtype): LoRA cores, heads; the last is the model target of docs/performance.md
    (16, 4096, torch.float32),
    (32, 1024, torch.float64),
    (64, 1024, torch.float64),
    (128, 256, torch.float32),
    (128, 256, torch.float64),
    (64, 10_000, torch.float32),
)
WAYS = {
    "svd": (theseus_ext.svd, lambda x: torch.linalg.svd(x, full_matrices=False)),
    "svdvals": (theseus_ext.svdvals, torch.linalg.svdvals),
}
SWEEPS = 8  # of one-sided Jacobi, a guess; a pair of columns of m numbers takes 6 m FLOP for its angle, 6 m to turn


def flops(what: str, side: int, count: int) -> float:
    pairs = side * (side - 1) / 2
    return SWEEPS * pairs * (12 if what == "svdvals" else 18) * side * count


@pytest.mark.skipif(DEVICE == "cpu", reason="no GPU: bench_svd.py measures the CPU")
@pytest.mark.parametrize("side, count, dtype", CASES, ids=str)
@pytest.mark.parametrize("what", WAYS)
def test_small_svd(store, what: str, side: int, count: int, dtype: torch.dtype) -> None:
    from ceilings import ceilings

    ours, plain = WAYS[what]
    matrices = torch.randn(
        count, side, side, dtype=dtype, device="cuda", generator=torch.Generator("cuda").manual_seed(0)
    )
    few = matrices[: min(FEW, count)]
    found, exact = ours(matrices), torch.linalg.svdvals(few.double())
    values = found[1] if what == "svd" else found
    error = float((values[: len(few)].double() - exact).norm() / exact.norm())
    if what == "svd":
        u, s, vh = found
        error = max(error, float((u * s[:, None] @ vh - matrices).norm() / matrices.norm()))
    assert error <= 30 * side * torch.finfo(dtype).eps, error  # LAPACK's test ratio
    seconds = in_turns({"ours": lambda: ours(matrices), "torch": lambda: plain(few)}, rounds=3)
    seconds["torch"] = [each * count / len(few) for each in seconds["torch"]]
    work, best = flops(what, side, count), min(seconds["ours"])
    results = sum(x.nbytes for x in found) if what == "svd" else found.nbytes
    rate = ceilings()["float32"] if dtype == torch.float32 else ceilings()["float32"] / 2
    floor = max(work / rate, (matrices.nbytes + results) / ceilings()["copy"])
    row = {"case": f"{what} {count} x {side} x {side}, {str(dtype).removeprefix('torch.')}", "ours ms": 1e3 * best}
    row |= {"torch ms": 1e3 * min(seconds["torch"]), "GFLOP/s": 1e-9 * work / best, "error": error}
    row |= {"over torch": ratio(seconds["ours"], seconds["torch"]), "share of ceiling": floor / best}
    store("small_svd", row)
