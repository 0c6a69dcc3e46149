"""svd of small batches on the CPU beside torch.linalg.svd at its best thread count: `make bench`."""

import os

import pytest
import torch
from timing import in_turns, ratio

import theseus_ext

CASES = ((16, 1024), (32, 512), (64, 144), (64, 168), (128, 48))  # (side, matrices): LoRA cores, heads of ViT-B/16
CORES = len(os.sched_getaffinity(0))
WAYS = {
    "svd": (theseus_ext.svd, lambda x: torch.linalg.svd(x, full_matrices=False)),
    "svdvals": (theseus_ext.svdvals, torch.linalg.svdvals),
}


def on(threads: int, function, *args):
    torch.set_num_threads(threads)
    return function(*args)


@pytest.mark.parametrize("side, count", CASES)
@pytest.mark.parametrize("what", WAYS)
def test_svd(store, what: str, side: int, count: int) -> None:
    ours, plain = WAYS[what]
    matrices = torch.randn(count, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    try:
        found, expected = on(CORES, ours, matrices), on(1, plain, matrices)
        parts = zip(found, expected, strict=True) if what == "svd" else [(found, expected)]
        assert all(torch.equal(a, b) for a, b in parts)
        counts = sorted({1, 2, CORES // 2 or 1, CORES})
        ways = {f"torch {n}": lambda n=n: on(n, plain, matrices) for n in counts}
        seconds = in_turns({"ours": lambda: on(CORES, ours, matrices), **ways})
    finally:
        torch.set_num_threads(before)
    best = min(ways, key=lambda way: min(seconds[way]))
    row = {"case": f"{what} {count} x {side} x {side}", "ours ms": 1e3 * min(seconds["ours"])}
    row |= {"torch ms": 1e3 * min(seconds[best]), "its threads": int(best.split()[1]), "cores": CORES}
    store("svd", row | {"over torch": ratio(seconds["ours"], seconds[best])})
