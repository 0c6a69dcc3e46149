"""svd, svdvals and polar of many small matrices on a GPU: `make gpu-check` (not run yet). bench_svd.py is the CPU's.

svd and svdvals beside torch.linalg; the polar factor by rotations (theseus_ext.polar) beside the one by products
(polar.polar_factor): where they cross is what procrustes.JACOBI_UP_TO should be.

Torch takes most sizes one by one, which would take minutes: it is timed on FEW matrices and the time scaled to all.
"""

import pytest
import torch
from theseus_transport.linalg.certificate import certify
from theseus_transport.linalg.polar import polar_factor
from timing import DEVICE, in_turns, ratio

import theseus_ext

FEW, FLOOR = 128, 1e-6
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


@pytest.mark.skipif(DEVICE == "cpu", reason="no GPU: on the CPU LAPACK makes small maps")
@pytest.mark.parametrize("side, count", [(16, 10_000), (32, 10_000), (64, 10_000), (96, 1024), (128, 1024)], ids=str)
def test_rotations_beside_products(store, side: int, count: int) -> None:
    draw = torch.Generator("cuda").manual_seed(0)
    c = torch.randn(count, side, side, dtype=torch.float64, device="cuda", generator=draw)
    turned, s = theseus_ext.polar(c, FLOOR)
    multiplied, rank, _ = polar_factor(c, floor=FLOOR, eigh=False)
    certify(turned, c, (s > FLOOR * s[:, :1]).sum(-1), floor=FLOOR)
    certify(multiplied, c, rank, floor=FLOOR)
    # both are right to eps over the smallest share
    allowed = 60 * torch.finfo(c.dtype).eps * side / (s[:, -1] / s[:, 0]).min()
    error = (turned - multiplied).norm(dim=(-2, -1)).max()
    assert error <= allowed
    ways = {
        "ours": lambda: theseus_ext.polar(c, FLOOR),
        "products": lambda: polar_factor(c, floor=FLOOR, eigh=False),
    }
    seconds = in_turns(ways, rounds=3)
    row = {"case": f"polar {count} x {side} x {side} by rotations, beside products", "error": float(error)}
    row |= {"ours ms": 1e3 * min(seconds["ours"]), "torch ms": 1e3 * min(seconds["products"])}
    row |= {"over torch": ratio(seconds["ours"], seconds["products"])}
    store("small_svd", row)
