"""cross_moment_ beside plain torch and beside torch's own product alone: `make bench`, on a GPU `make gpu-check`."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import cycle

import baseline
import pytest
import torch
from timing import DEVICE, in_turns, ratio
from torch import Tensor

import theseus_ext

NAMES = ("cross", "source_sum", "target_sum", "source_energy", "target_energy")
L2 = 2**28  # bytes: more than caches hold, so that calls in turn over several inputs read them from memory


@dataclass(frozen=True)
class Case:
    rows: int
    source: int  # width of a head
    target: int
    kind: str = "bfloat16"  # "float32", "bfloat16, 80 % mask", "bfloat16, interpolated"
    heads: int = 1

    def __str__(self) -> str:
        widths = f"{self.source} x {self.target}"
        return f"{self.rows} x {widths if self.heads == 1 else f'{self.heads} heads of {widths}'}, {self.kind}"


MIXED = ("bfloat16, 80 % mask", "bfloat16, interpolated")
IMAGES, TEXT = (6304, 8224), (4096, 32768)  # 32 images of 197 and 257 tokens; tokens of text
ON_CPU = [Case(6304, *w, k) for w in ((768, 896), (1024, 1024), (3072, 3584)) for k in ("float32", "bfloat16", *MIXED)]
WIDTHS = {
    IMAGES: ((768, 896), (3072, 3584)),
    TEXT: ((1024, 1024), (896, 1536), (4864, 8960), (2048, 3072), (3072, 4096), (8192, 14336)),
}
ON_CUDA = [
    *(Case(r, *w, k) for rows, widths in WIDTHS.items() for w in widths for r in rows for k in ("float32", "bfloat16")),
    *(Case(r, w, w, k, 64) for w in (64, 128) for r in TEXT for k in ("float32", "bfloat16")),
    *(Case(r, *w, k) for r, w in ((6304, (768, 896)), (4096, (3072, 4096))) for k in MIXED),
]
BLOCK = ((2048, 3072), (2048, 3072), (2048, 3072), (8192, 8192))  # spaces of a block, Llama 3.2 1B to 3B


def masters(case: Case) -> dict[str, Tensor]:
    source, target = case.heads * case.source, case.heads * case.target
    cross = (case.source, case.target) if case.heads == 1 else (case.heads, case.source, case.target)
    shapes = (cross, (source,), (target,), (source,), (target,))
    return {name: torch.zeros(s, dtype=torch.float64, device=DEVICE) for name, s in zip(NAMES, shapes, strict=True)}


def interpolation(rows: int, tokens: int) -> tuple[Tensor, ...]:
    """Linear interpolation of `tokens` onto `rows`: two entries per row."""
    position = torch.linspace(0, tokens - 1, rows, dtype=torch.float64)
    left = position.floor().clamp_max(tokens - 2).long()
    column, weight = torch.stack([left, left + 1], 1), torch.stack([1 - (position - left), position - left], 1)
    parts = torch.arange(rows + 1) * 2, column.flatten(), weight.flatten()
    return tuple(part.to(DEVICE) for part in parts)


def inputs(case: Case) -> tuple[Tensor, Tensor, dict]:
    """Source and target tokens, and the mixings that leave at most ``rows`` rows."""
    source, target = (torch.randn(case.rows, case.heads * w, device=DEVICE) for w in (case.source, case.target))
    if case.kind == "float32":
        return source, target, {}
    source, target = source.bfloat16(), target.bfloat16()
    if case.kind.endswith("mask"):
        kept = (torch.rand(case.rows, device=DEVICE) < 0.8).nonzero()[:, 0]
        return source, target, dict(source_mixing=(None, kept, None), target_mixing=(None, kept, None))
    if case.kind.endswith("interpolated"):
        half = case.rows // 2
        return source[:half], target, dict(source_mixing=interpolation(case.rows, half))
    return source, target, {}


def check(ours, plain, source: Tensor, target: Tensor, mixings: dict, case: Case) -> float:
    """Relative error of cross; all moments at most twice as far from float64 as plain torch's."""
    found, other, exact = (masters(case) for _ in range(3))
    ours(source, target, **found, **mixings)
    plain(source, target, **other, **mixings)
    theseus_ext.reference.cross_moment_(source, target, **exact, **mixings)
    for name in NAMES:
        allowed = 2 * (other[name] - exact[name]).norm() + 1e-14 * exact[name].norm()
        assert (found[name] - exact[name]).norm() <= allowed, name
    return float((found["cross"] - exact["cross"]).norm() / exact["cross"].norm())


@pytest.mark.parametrize("case", ON_CPU if DEVICE == "cpu" else ON_CUDA, ids=str)
def test_cross_moment(store, case: Case) -> None:
    torch.manual_seed(0)
    source, target, mixings = inputs(case)
    error = check(theseus_ext.cross_moment_, baseline.cross_moment_, source, target, mixings, case)
    rows = len(mixings["target_mixing"][1]) if "target_mixing" in mixings else case.rows
    outputs = masters(case)
    nbytes = source.nbytes + target.nbytes
    copies = 1 if DEVICE == "cpu" else 1 + min(15, L2 // nbytes)
    turns = [cycle([(source.clone(), target.clone()) for _ in range(copies)]) for _ in range(2)]
    # What torch's own product alone takes on ready rows of this size, in float32 sums.
    kind = torch.float32 if DEVICE == "cpu" else source.dtype
    x, y = (torch.randn(rows, case.heads * w, device=DEVICE).to(kind) for w in (case.source, case.target))
    heads = None if case.heads == 1 else case.heads
    seconds = in_turns(
        {
            "ours": lambda: theseus_ext.cross_moment_(*next(turns[0]), **outputs, **mixings),
            "torch": lambda: baseline.cross_moment_(*next(turns[1]), **outputs, **mixings),
            "product": lambda: baseline._product(x, y, heads),
        }
    )
    flops = 2.0 * rows * case.heads * case.source * case.target
    best = {name: min(each) for name, each in seconds.items()}
    row = {"case": str(case)} | {f"{name} ms": 1e3 * value for name, value in best.items()}
    row |= {"GFLOP/s": 1e-9 * flops / best["ours"], "of mm GFLOP/s": 1e-9 * flops / best["product"]}
    row |= {"error": error, "over torch": ratio(seconds["ours"], seconds["torch"])}
    row |= {"share of mm": ratio(seconds["ours"], seconds["product"])}
    if DEVICE == "cuda":
        row |= {"share of ceiling": ceiling(flops, nbytes + 2 * outputs["cross"].nbytes, case) / best["ours"]}
    store("cross_moment", row)


def ceiling(flops: float, nbytes: float, case: Case) -> float:
    from ceilings import floor_seconds

    return floor_seconds(flops, nbytes, half=case.kind != "float32" and not case.kind.endswith("interpolated"))


@pytest.mark.skipif(DEVICE == "cpu", reason="no GPU: one launch for a block's spaces is measured there")
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_block(store, kind: str) -> None:
    torch.manual_seed(0)
    cases = [Case(4096, *widths, kind) for widths in BLOCK]
    spaces = [(*inputs(case)[:2], masters(case)) for case in cases]
    source, target = [x for x, _, _ in spaces], [y for _, y, _ in spaces]
    lists = {name: [m[name] for _, _, m in spaces] for name in NAMES}

    def one_by_one(function) -> None:
        for x, y, m in spaces:
            function(x, y, **m)

    errors = [
        check(theseus_ext.cross_moment_, baseline.cross_moment_, x, y, {}, case)
        for case, (x, y, _) in zip(cases, spaces, strict=True)
    ]
    seconds = in_turns(
        {
            "ours": lambda: theseus_ext.cross_moments_(source, target, **lists),
            "torch": lambda: one_by_one(baseline.cross_moment_),
            "one by one": lambda: one_by_one(theseus_ext.cross_moment_),
        }
    )
    flops = sum(2.0 * case.rows * case.source * case.target for case in cases)
    nbytes = sum(x.nbytes + y.nbytes + 2 * m["cross"].nbytes for x, y, m in spaces)
    best = {name: min(each) for name, each in seconds.items()}
    row = {"case": f"block of 4 spaces, {kind}"} | {f"{name} ms": 1e3 * value for name, value in best.items()}
    row |= {"GFLOP/s": 1e-9 * flops / best["ours"], "error": max(errors)}
    row |= {"over torch": ratio(seconds["ours"], seconds["torch"])}
    row |= {"share of ceiling": ceiling(flops, nbytes, cases[0]) / best["ours"]}
    store("cross_moments", row)
