"""Moves of one layer's weight and of LoRA factors beside plain torch: `make bench`, on a GPU `make gpu-check`.

All in float64, as every move is. ``ours`` and ``torch`` find bases, tune and maps where they compute; on a GPU ``host``
is ours with the weights in bfloat16 in pageable host memory, as a job reads them, the result left on the GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import baseline
import pytest
import torch
from theseus_transport.models.base import Base
from theseus_transport.models.geometry import Geometry
from theseus_transport.recipes.maps import Dense
from theseus_transport.recipes.ruleset import Rule
from theseus_transport.updates.adapter import Factors
from theseus_transport.updates.available import Available
from theseus_transport.updates.layer_moves import Carried, Move, move_bytes
from timing import DEVICE, in_turns, ratio
from torch import Tensor

LAYER = "layers.0.mlp.down_proj"  # reads no norm: nothing but its products is to be done
Shape = tuple[int, int]  # [out, in]


@dataclass(frozen=True)
class Case:
    source: Shape
    target: Shape
    rank: int = 0  # 0: the whole weight

    def __str__(self) -> str:
        sizes = " to ".join(f"{out} x {width}" for out, width in (self.source, self.target))
        return f"{sizes}, LoRA of rank {self.rank}" if self.rank else sizes

    @property
    def flops(self) -> float:
        """Of ours: first what is read, then what is written."""
        (rows, columns), (out, width) = self.source, self.target
        if self.rank:
            return 2.0 * self.rank * (columns * width + rows * out)
        return 2.0 * (rows * columns * width + rows * width * out)

    @property
    def nbytes(self) -> float:
        """Both maps and the result in float64, and what moves in bfloat16 (two weights) or float32 (factors)."""
        (rows, columns), (out, width) = self.source, self.target
        maps = 8 * (columns * width + rows * out)
        if self.rank:
            return maps + self.rank * (4 * (rows + columns) + 8 * (out + width))
        return maps + 4 * rows * columns + 8 * out * width


VIT = (3072, 768), (3584, 896)  # B/16 to B/16+, fc1
QWEN = (896, 4864), (1536, 8960)  # Qwen2.5 0.5B to 1.5B, down_proj
SQUARE = (3072, 3072), (4096, 4096)  # Llama 3.2 3B to 3.1 8B, o_proj
LARGE = (3072, 8192), (4096, 14336)  # and down_proj
MODEST = tuple(Case(*sizes, rank) for rank in (0, 8, 16) for sizes in (VIT, QWEN))
FULL = tuple(Case(*sizes, rank) for rank in (0, 8, 16) for sizes in (SQUARE, LARGE))


def geometry(shape: Shape) -> Geometry:
    sizes = dict(hidden_size=shape[0], intermediate_size=shape[1], num_attention_heads=8, vocab_size=8)
    return Geometry.of(dict(model_type="llama", num_hidden_layers=1, **sizes))


def made(case: Case) -> tuple[Move, Tensor, Tensor, Tensor, Tensor]:
    """The move, the source's base and tuned weight in bfloat16, T_out and T_in in float64; all random."""
    draw = torch.Generator(DEVICE).manual_seed(0)

    def random(*shape: int, size: float = 1.0) -> Tensor:
        return size * torch.randn(*shape, dtype=torch.float64, device=DEVICE, generator=draw)

    base, target = random(*case.source).bfloat16(), random(*case.target).bfloat16()
    tuned = base + random(*case.source, size=0.1).bfloat16()
    t_out, t_in = (random(s, t, size=s**-0.5) for s, t in zip(case.source, case.target, strict=True))
    place = {"device": torch.device(DEVICE)}
    sides = [
        Base.of({f"{LAYER}.weight": weight}, geometry(shape), **place)
        for weight, shape in ((base, case.source), (target, case.target))
    ]
    rule = Rule(LAYER, "in", "out", fold=False)
    available = Available(rules={LAYER: rule}, maps={"in": Dense(t_in), "out": Dense(t_out)})
    own, into = (next(la for la in side.geometry.layers() if la.name == LAYER) for side in sides)
    return Move(own, into, available, *sides, Carried()), base, tuned, t_out, t_in


@pytest.mark.parametrize("case", [*MODEST, *FULL], ids=str)
def test_transport(store: Callable, case: Case, request: pytest.FixtureRequest) -> None:
    if DEVICE == "cpu" and case in FULL and not request.config.getoption("--full"):
        pytest.skip("minutes on a CPU: make bench FULL=1")
    move, base, tuned, t_out, t_in = made(case)
    if case.rank:
        draw = torch.Generator(DEVICE).manual_seed(1)
        sizes = (case.rank, case.source[1]), (case.source[0], case.rank)
        a, b = (torch.randn(*size, device=DEVICE, generator=draw) for size in sizes)
        factors, elsewhere = Factors(a, b, 1.0), Factors(a.cpu(), b.cpu(), 1.0)
        ways = {
            "ours": lambda: move.factors(factors),
            "torch": lambda: baseline.move_factors(a, b, t_out, t_in),
            "host": lambda: move.factors(elsewhere),
        }
        moved = move.factors(factors)
        pairs = list(zip((moved.a, moved.b), ways["torch"](), strict=True))
    else:
        name = f"{LAYER}.weight"
        on_host = replace(move, source=replace(move.source, tensors={name: base.cpu()}))
        host = tuned.cpu()
        ways = {
            "ours": lambda: move.dense({name: tuned})["weight"],
            "torch": lambda: baseline.move(tuned, base, t_out, t_in),
            "host": lambda: on_host.dense({name: host})["weight"],
        }
        pairs = [(ways["ours"](), ways["torch"]())]
    error = max(float((ours - plain).norm() / plain.norm()) for ours, plain in pairs)
    assert error <= sum(case.source) * torch.finfo(torch.float64).eps, error  # two products, each summed in some order
    del pairs
    if DEVICE == "cpu":
        del ways["host"]
    seconds = in_turns(ways, rounds=3 if DEVICE == "cpu" else 7)
    best = {way: min(each) for way, each in seconds.items()}
    row = {"case": str(case)} | {f"{way} ms": 1e3 * value for way, value in best.items()}
    row |= {
        "GFLOP/s": 1e-9 * case.flops / best["ours"],
        "error": error,
        "over torch": ratio(*list(seconds.values())[:2]),
    }
    if DEVICE == "cuda":
        from ceilings import ceilings

        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        ways["ours"]()
        row |= {"peak MB": (torch.cuda.max_memory_allocated() - before) / 1e6}
        row |= {"predicted MB": (0 if case.rank else move_bytes(case.source, case.target)) / 1e6}
        rates = ceilings()
        row |= {"share of ceiling": max(case.flops / rates["float64"], case.nbytes / rates["copy"]) / best["ours"]}
    store("transport", row)
