"""The time a job will take, from its flops and this machine's own rate."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from math import prod
from types import MappingProxyType

import torch

from ..activations.links import Blocks, Pairs
from ..calibration.extent import Extent
from ..files.checkpoint import Checkpoint
from ..linalg.ridge import GRID
from ..machine import rate
from ..models.base import canonical_shapes
from ..models.geometry import Geometry, Layer
from ..models.pair import Pair
from ..recipes.recipe import Recipe
from ..streaming.half_blocks import ROLES
from ..streaming.schedule import schedule
from ..updates.computed import ComputedUpdate
from .choice import Choice


@dataclass(frozen=True)
class Effort:
    """What aligning two bases takes, and fitting layers to an effect.

    Attributes:
        pairs: of blocks, as far as it is known which feeds which.
        needed: links and layers of the target that something moves through.
        tokens: pairs of tokens that are aligned on; held: that are held out.
        rows: tokens of each model's forward passes, held out ones and padding included.
        passes: over what is needed; whole: over all of both models.
        fits: layers of the target that are fitted -> rank of the factors they get; None: they are whole.
        told: both models run as changed on the rows that are held out.
        moved: flops of what is moved through maps, before the target runs with it.
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
    fits: Mapping[str, int | None] = field(default_factory=dict)
    told: bool = False
    moved: int = 0

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
        fits: Mapping[str, int | None] = MappingProxyType({}),
        told: bool = False,
        moved: int = 0,
        blocks: Blocks | None = None,
    ) -> Effort:
        """The effort of a run on calibration of this extent, of which ``tokens`` are wanted, as ``choice`` says.

        Args:
            blocks: for every target block the source block that feeds it; None: compared where depths differ.
        """
        lengths, fit = extent.lengths, extent.expected - extent.held
        compares = blocks is None and geometries.source.depth != geometries.target.depth
        return cls(
            checkpoints=checkpoints,
            pairs=Pairs.by_position(*geometries) if blocks is None else Pairs(*geometries, blocks),
            recipe=recipe,
            needed=needed,
            tokens=min(tokens, fit * min(lengths)),
            rows=lengths.map(lambda length: extent.expected * length),
            held=extent.held * lengths.target,
            passes=choice.tiles,
            whole=(compares + recipe.solver.leans_on_depth(recipe)) if needed else 0,
            fits=fits,
            told=told,
            moved=0 if recipe.solver.alone else moved,
        )

    def seconds(self, device: torch.device) -> dict[str, float]:
        """Predicted seconds by stage, at this machine's rate; reading, writing and starting up are not in them."""
        single, double = rate(torch.float32, device), rate(torch.float64, device)
        solver, pairs = self.recipe.solver, self.pairs
        visits = schedule(pairs, self.needed, whole=bool(self.fits))
        links = {name: link for visit in visits for name, link in visit.moments.items()}
        flops = told = 0
        for k, side in enumerate(zip(self.checkpoints, pairs.geometries, self.rows, strict=True)):
            run = {b for visit in visits if (b := visit.blocks[k]) is not None}
            flops += self.passes * forward(*side, run) + self.whole * forward(*side)
            told += forward(*side[:2], self.held, run)
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
        if self.fits:
            found["fits"] = self._running() / single + (self._solving() + self.moved) / double
        elif self.told:
            found["effect"] = told / single + self.moved / double
        return {stage: seconds for stage, seconds in found.items() if seconds}

    def _running(self) -> int:
        """Flops of both models as changed and of the sums over what fitted layers read.

        The source runs once; every block of the target once, and once more for each fit, for attention's up to its end.
        """
        (source, target), (_, into) = self.pairs.geometries, self.checkpoints
        first = min(layer.block for layer in self._fitted)
        fed = [own for own in self.pairs.blocks[first:] if own is not None]
        flops = forward(self.checkpoints.source, source, self.rows.source, range(min(fed, default=0), source.depth))
        flops += forward(into, target, self.rows.target, range(first, target.depth))
        for layer in self._fitted:
            inputs = target.weights()[layer.role][1]
            flops += 2 * self.tokens * inputs * (inputs + source.width + target.width)
            block = forward(into, target, self.rows.target, {layer.block})
            flops += block - self._mlp(layer.block) if layer.role == "output" else block
        return flops

    def _mlp(self, b: int) -> int:
        """Flops of the target's MLP in block ``b``."""
        target = self.pairs.geometries.target
        shapes = [target.weights()[la.role] for la in target.layers() if la.block == b and la.role in ROLES["mlp"]]
        return 2 * self.rows.target * sum(map(prod, shapes))

    def _solving(self) -> int:
        """Flops of Cholesky factors and of what is solved with them, both twice where a fit is cut to a rank; every
        lambda that is tried takes a factor more."""
        source, target = self.pairs.geometries
        flops, tried = 0, 0 if self.recipe.ridge else len(GRID)
        for layer in self._fitted:
            out, inputs = target.weights()[layer.role]
            times = 1 + (self.fits[layer.name] is not None)
            flops += (times + tried) * inputs**3 // 3 + 2 * times * inputs**2 * out
            flops += 2 * inputs * source.width * target.width
        return flops

    @property
    def _fitted(self) -> list[Layer]:
        return [layer for layer in self.pairs.target.layers() if layer.name in self.fits]


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
