"""What this GPU reaches at best, measured once: library products and a copy. Kernels are judged by shares of it."""

from functools import lru_cache

import torch
from timing import in_turns

SIDE = 8192
PARTS = 6  # bfloat16 products that make one float32 product (csrc/cuda/grouped_moment.cu)


@lru_cache
def ceilings() -> dict[str, float]:
    """FLOP/s of products [SIDE, SIDE] in bfloat16, float32 and float64, bytes/s of a copy within device memory."""
    x = torch.randn(SIDE, SIDE, device="cuda")
    half, double, copy = x.bfloat16(), x.double(), torch.empty(2**30, dtype=torch.uint8, device="cuda")
    seconds = in_turns(
        {
            "bfloat16": lambda: torch.mm(half, half),
            "float32": lambda: torch.mm(x, x),
            "float64": lambda: torch.mm(double, double),
            "copy": lambda: copy[: 2**29].copy_(copy[2**29 :]),
        }
    )
    work = {**dict.fromkeys(("bfloat16", "float32", "float64"), 2.0 * SIDE**3), "copy": 2.0**30}
    return {name: work[name] / min(seconds[name]) for name in work}


def floor_seconds(flops: float, nbytes: float, *, half: bool) -> float:
    """No version runs faster: the slower of arithmetic (float32 in the better of its two ways) and memory."""
    best = ceilings()
    rate = best["bfloat16"] if half else max(best["float32"], best["bfloat16"] / PARTS)
    return max(flops / rate, nbytes / best["copy"])
