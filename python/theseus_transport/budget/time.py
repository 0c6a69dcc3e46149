"""The time a job will take, from its flops and this machine's own rate."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from math import prod

import torch

from ..activations.links import Pairs
from ..calibration.extent import Extent
from ..files.checkpoint import Checkpoint
from ..machine import rate
from ..models.base import canonical_shapes
from ..models.geometry import Geometry
from ..models.pair import Pair
from ..recipes.recipe import Recipe
from ..streaming.schedule import schedule
from ..updates.computed import ComputedUpdate
from .choice import Choice


@dataclass(frozen=True)
class Effort:
    """What aligning two bases takes.

    Attributes:
        pairs: of blocks, as far as it is known which feeds which.
        needed: links and layers of the target that something moves through.
        tokens: pairs of tokens that are aligned on; held: that are held out.
        rows: tokens of each model's forward passes, held out ones and padding included.
        passes: over what is needed; whole: over all of both models.
    """

    checkpoints: Pair[Checkpoint]
    pairs: Pairs
    recipe: Recipe
    needed: Collection[str]
    tokens: int
    rows: Pair[int]
    held: int = 0
    passes: int = 1
    whole: int = 0

    @classmethod
    def of(
        cls,
        checkpoints: Pair[Checkpoint],
        geometries: Pair[Geometry],
        recipe: Recipe,
        needed: Collection[str],
        extent: Extent,
        tokens: int,
        choice: Choice,
    ) -> Effort:
        """The effort of a run on calibration of this extent, of which ``tokens`` are wanted, as ``choice`` says."""
        lengths, fit = extent.lengths, extent.expected - extent.held
        other_depths = geometries.source.depth != geometries.target.depth
        return cls(
            checkpoints=checkpoints,
            pairs=Pairs.by_position(*geometries),
            recipe=recipe,
            needed=needed,
            tokens=min(tokens, fit * min(lengths)),
            rows=lengths.map(lambda length: extent.expected * length),
            held=extent.held * lengths.target,
            passes=choice.tiles,
            whole=other_depths + recipe.solver.leans_on_depth(recipe),
        )

    def seconds(self, device: torch.device) -> dict[str, float]:
        """Predicted seconds by stage, at this machine's rate; reading, writing and starting up are not in them."""
        single, double = rate(torch.float32, device), rate(torch.float64, device)
        solver, pairs = self.recipe.solver, self.pairs
        visits = schedule(pairs, self.needed)
        links = {name: link for visit in visits for name, link in visit.moments.items()}
        flops = 0
        for k, side in enumerate(zip(self.checkpoints, pairs.geometries, self.rows, strict=True)):
            run = {b for visit in visits if (b := visit.blocks[k]) is not None}
            flops += self.passes * forward(*side, run) + self.whole * forward(*side)
        compared = {name: link for name, link in links.items() if link.whole}  # one row of a sample's costs nothing
        crosses = sum(prod(link.widths) for link in compared.values())
        grams = solver.gram_sides(pairs, self.recipe, links)
        own = sum(links[name].widths[k] ** 2 for name, sides in grams.items() for k in sides)
        found = {
            "forward": flops / single,
            "cross-moments": 2 * self.tokens * (crosses + own) / single,
            "decompositions": decompositions(pairs, self.recipe, links) / double,
        }
        if self.held:  # rows as they pair and as they are shifted
            mapped = sum(prod(link.widths) // solver.diagonal(name, pairs.target) for name, link in compared.items())
            found["held-out quality"] = 2 * 2 * self.held * mapped / double
        return found


def forward(checkpoint: Checkpoint, geometry: Geometry, tokens: int, blocks: Collection[int] | None = None) -> int:
    """Flops of the linear layers of these blocks, or of all; attention scores are far below them."""
    inside = range(geometry.depth) if blocks is None else blocks
    shapes = canonical_shapes(geometry, checkpoint).items()
    found = [shape for name, shape in shapes if len(shape) == 2 and geometry.family.block_of(name) in inside]
    return 2 * tokens * sum(map(prod, found))


def decompositions(pairs: Pairs, recipe: Recipe, links: Collection[str] | None = None) -> int:
    """Flops of the polar factors that are made of these links, or of all."""
    found = recipe.solver.decompositions(pairs, recipe)
    return sum(polar_flops(*size) for name, size in found if links is None or name in links)


def polar_flops(rows: int, columns: int) -> int:
    """24 m k^2 + 9 k^3 for [m, k], k the smaller: the iteration of the design, and about what gesdd takes as time."""
    m, k = max(rows, columns), min(rows, columns)
    return 24 * m * k**2 + 9 * k**3


def move_flops(update: ComputedUpdate) -> int:
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


def move_seconds(flops: int, device: torch.device) -> dict[str, float]:
    """Predicted seconds of a move of so many flops, by stage: updates move in float64 on the job's device."""
    return {"move": flops / rate(torch.float64, device)} if flops else {}
