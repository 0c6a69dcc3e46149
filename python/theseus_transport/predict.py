"""What a job will take, before it runs: memory from sizes, time from flops and this machine's own rate."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch

from .alignment import Alignment, by_position
from .checkpoint import Checkpoint
from .links import moment_links
from .models import canonical_shapes, shape_of
from .recipes import Recipe
from .spaces import Layout
from .update import Update

RUNTIME = 500 << 20  # bytes: the interpreter with torch and transformers
TRIAL = 768  # edge of the square matrices whose product measures the rate
Sides = Sequence[Checkpoint]
Layouts = tuple[Layout, Layout]


@dataclass(frozen=True)
class Prediction:
    """Peak host memory in bytes, and seconds by stage; reading, writing and starting up are not in them."""

    nbytes: int
    seconds: dict[str, float]

    @classmethod
    def of_alignment(
        cls, sides: Sides, layouts: Layouts, recipe: Recipe, tokens: int, device: torch.device, move: int = 0
    ) -> Prediction:
        """Of aligning two bases on so many tokens, and of moving an update with ``move`` flops."""
        single, double = rate(torch.float32, device), rate(torch.float64, device)
        stages = {
            "forward": sum(forward(*side, tokens) for side in zip(sides, layouts, strict=True)) / single,
            "cross-moments": sum(2 * tokens * s * t for s, t in _widths(layouts)) / single,
            "decompositions": decompositions(layouts, recipe) / double,
        }
        return cls(alignment_bytes(sides, layouts, recipe), stages | move_seconds(move))

    @classmethod
    def of_moving(cls, alignment: Alignment, update: Update, move: int) -> Prediction:
        """Of moving an update through an alignment that is there."""
        maps = sum(t.numel() * t.element_size() for m in alignment.maps.values() for t in m.tensors().values())
        widest = max(prod(shape_of(update.target.tensors, name)) for name in update)
        return cls(RUNTIME + maps + 6 * 8 * widest, move_seconds(move))


def rate(dtype: torch.dtype, device: torch.device | str = "cpu") -> float:
    """Flops per second of a matrix product here and now, the best of three."""
    a = torch.ones(TRIAL, TRIAL, dtype=dtype, device=device)
    a @ a  # first calls set up threads and handles
    best = float("inf")
    for _ in range(3):
        _wait(a.device)
        start = time.perf_counter()
        a @ a
        _wait(a.device)
        best = min(best, time.perf_counter() - start)
    return 2 * TRIAL**3 / best


def forward(checkpoint: Checkpoint, layout: Layout, tokens: int) -> int:
    """Flops of the blocks' linear layers; attention scores are far below them."""
    shapes = canonical_shapes(layout, checkpoint).items()
    inner = [shape for name, shape in shapes if name.startswith(f"{layout.family.blocks}.")]
    return 2 * tokens * sum(prod(shape) for shape in inner if len(shape) == 2)


def decompositions(layouts: Layouts, recipe: Recipe) -> int:
    """Flops of all polar factors: every space, the head maps, and in ``paper`` every layer's output too."""
    source, target = layouts
    sizes = [pair for name, pair in _named_widths(layouts).items() if recipe.name == "paper" or "context" not in name]
    if recipe.name == "coherent":
        sizes += [(source.head_dim, target.head_dim)] * (2 * target.kv_heads * target.depth)
    own, into = source.weights(), target.weights()
    for role in (layer.role for layer in target.layers() if layer.role in into and recipe.name == "paper"):
        (out_s, in_s), (out_t, in_t) = own[role], into[role]
        expands = out_s > in_s + 1 and out_t > in_t + 1  # then the small factor is decomposed
        sizes.append((in_s + 1, in_t + 1) if expands else (out_s, out_t))
    return sum(polar_flops(*size) for size in sizes)


def polar_flops(rows: int, columns: int) -> int:
    """24 m k^2 + 9 k^3 for [m, k], k the smaller: the iteration of the design, and about what gesdd takes as time."""
    m, k = max(rows, columns), min(rows, columns)
    return 24 * m * k**2 + 9 * k**3


def move_flops(update: Update) -> int:
    """Flops of T_out^T dW T_in over an update: dense, or through the factors of a LoRA."""
    adapter, family = update.delta.adapter, update.source_family
    layers = adapter.layers() if adapter else {}
    ranks = {part: adapter.rank(la) for la in layers for part in family.parts(family.canonical(la))} if adapter else {}
    flops = 0
    for name, into in update.moved.items():
        if name not in update.source:  # a bias of the target alone
            continue
        source, target = update.source.shape(name), update.target.shape(into)
        if len(target) == len(source) == 2:
            (out_s, in_s), (out_t, in_t) = source, target
            rank = ranks.get(name.removesuffix(".weight"))
            flops += 2 * rank * (in_s * in_t + out_s * out_t) if rank else 2 * out_s * in_t * (in_s + out_t)
    return flops


def move_seconds(flops: int) -> dict[str, float]:
    """Updates move in float64 on the CPU."""
    return {"move": flops / rate(torch.float64)} if flops else {}


def alignment_bytes(sides: Sides, layouts: Layouts, recipe: Recipe) -> int:
    """Peak host memory: float32 weights, float64 moments, Grams and maps, workspace of the widest decomposition."""
    elements = sum(prod(shape) for checkpoint in sides for shape in checkpoint.shapes.values())
    spaces = [s * t for s, t in _widths(layouts)]
    grams = sum(s * s + t * t for s, t in _widths(layouts)) if recipe.whiten_power else 0
    return RUNTIME + 4 * elements + 3 * 8 * sum(spaces) + 8 * grams + 5 * 8 * max(spaces)


def _named_widths(layouts: Layouts) -> dict[str, tuple[int, int]]:
    links = moment_links(*layouts, by_position(*layouts))
    return {name: (link.source.width, link.target.width) for name, link in links.items()}


def _widths(layouts: Layouts) -> list[tuple[int, int]]:
    return list(_named_widths(layouts).values())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
