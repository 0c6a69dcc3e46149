"""cross_moment_ beside plain torch and beside torch's own float32 product alone: `make bench`."""

import baseline
import pytest
import torch
from timing import DEVICE, in_turns, ratio

import theseus_ext

ROWS = 6304  # 32 images of 197 tokens
WIDTHS = ((768, 896), (1024, 1024), (3072, 3584))
CASES = ("float32", "bfloat16", "bfloat16, 80 % mask", "bfloat16, interpolated")
NAMES = ("cross", "source_sum", "target_sum", "source_energy", "target_energy")


def masters(widths: tuple[int, int]) -> dict[str, torch.Tensor]:
    shapes = (widths, widths[:1], widths[1:], widths[:1], widths[1:])
    return {name: torch.zeros(s, dtype=torch.float64, device=DEVICE) for name, s in zip(NAMES, shapes, strict=True)}


def interpolation(rows: int, tokens: int) -> tuple[torch.Tensor, ...]:
    """Linear interpolation of `tokens` onto `rows`: two entries per row."""
    position = torch.linspace(0, tokens - 1, rows, dtype=torch.float64)
    left = position.floor().clamp_max(tokens - 2).long()
    column, weight = torch.stack([left, left + 1], 1), torch.stack([1 - (position - left), position - left], 1)
    parts = torch.arange(rows + 1) * 2, column.flatten(), weight.flatten()
    return tuple(part.to(DEVICE) for part in parts)


def inputs(case: str, widths: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """Source and target tokens, and the mixings that leave at most ROWS rows."""
    torch.manual_seed(0)
    source, target = (torch.randn(ROWS, width, device=DEVICE) for width in widths)
    kept = (torch.rand(ROWS, device=DEVICE) < 0.8).nonzero()[:, 0]
    if case == "float32":
        return source, target, {}
    if case.endswith("mask"):
        mixings = dict(source_mixing=(None, kept, None), target_mixing=(None, kept, None))
        return source.bfloat16(), target.bfloat16(), mixings
    if case.endswith("interpolated"):
        return source[: ROWS // 2].bfloat16(), target.bfloat16(), dict(source_mixing=interpolation(ROWS, ROWS // 2))
    return source.bfloat16(), target.bfloat16(), {}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("widths", WIDTHS, ids=lambda w: f"{w[0]}x{w[1]}")
def test_cross_moment(store, case: str, widths: tuple[int, int]) -> None:
    source, target, mixings = inputs(case, widths)
    rows = len(mixings["target_mixing"][1]) if "target_mixing" in mixings else ROWS
    found, plain, exact = (masters(widths) for _ in range(3))
    theseus_ext.cross_moment_(source, target, **found, **mixings)
    baseline.cross_moment_(source, target, **plain, **mixings)
    theseus_ext.reference.cross_moment_(source, target, **exact, **mixings)
    for name in NAMES:
        allowed = 2 * (plain[name] - exact[name]).norm() + 1e-14 * exact[name].norm()
        assert (found[name] - exact[name]).norm() <= allowed, name
    # The ceiling: what torch's own float32 product alone takes on ready rows of this size.
    x, y = (torch.randn(rows, width, device=DEVICE) for width in widths)
    seconds = in_turns(
        {
            "ours": lambda: theseus_ext.cross_moment_(source, target, **found, **mixings),
            "torch": lambda: baseline.cross_moment_(source, target, **plain, **mixings),
            "product": lambda: torch.mm(x.T, y),
        }
    )
    gflop = 2e-9 * rows * widths[0] * widths[1]
    best = {name: min(each) for name, each in seconds.items()}
    row = {"case": f"{rows} x {widths[0]} x {widths[1]}, {case}"}
    row |= {f"{name} ms": 1e3 * value for name, value in best.items()}
    row |= {"GFLOP/s": gflop / best["ours"], "of mm GFLOP/s": gflop / best["product"]}
    row |= {"over torch": ratio(seconds["ours"], seconds["torch"])}
    row |= {"share of mm": ratio(seconds["ours"], seconds["product"])}
    store("cross_moment", row)
