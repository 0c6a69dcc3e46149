"""The time a job will take, from its flops and this machine's own rate."""

from __future__ import annotations

import time
from collections.abc import Sequence
from math import prod

import torch

from .checkpoint import Checkpoint
from .depth import by_position
from .links import moment_links
from .models import canonical_shapes
from .recipes import Recipe
from .spaces import Layout
from .update import Update

TRIAL = 768  # edge of the square matrices whose product measures the rate
Sides = Sequence[Checkpoint]
Layouts = tuple[Layout, Layout]


def alignment_seconds(
    sides: Sides, layouts: Layouts, recipe: Recipe, tokens: int, device: torch.device
) -> dict[str, float]:
    """Of aligning two bases on so many tokens, by stage; reading, writing and starting up are not in them."""
    single, double = rate(torch.float32, device), rate(torch.float64, device)
    return {
        "forward": sum(forward(*side, tokens) for side in zip(sides, layouts, strict=True)) / single,
        "cross-moments": sum(2 * tokens * s * t for s, t in _widths(layouts)) / single,
        "decompositions": decompositions(layouts, recipe) / double,
    }


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
    adapter, family, target_family = update.delta.adapter, update.source_family, update.family
    tables = {e.name for e in target_family.embeddings} | {f"{head}.weight" for head in target_family.heads.values()}
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
            if into in tables and not rank:  # rows are the same on both sides
                flops += 2 * out_s * in_s * in_t
                continue
            flops += 2 * rank * (in_s * in_t + out_s * out_t) if rank else 2 * out_s * in_t * (in_s + out_t)
    return flops


def move_seconds(flops: int) -> dict[str, float]:
    """Updates move in float64 on the CPU."""
    return {"move": flops / rate(torch.float64)} if flops else {}


def _named_widths(layouts: Layouts) -> dict[str, tuple[int, int]]:
    links = moment_links(*layouts, by_position(*layouts))
    return {name: (link.source.width, link.target.width) for name, link in links.items()}


def _widths(layouts: Layouts) -> list[tuple[int, int]]:
    return list(_named_widths(layouts).values())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
