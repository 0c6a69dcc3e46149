"""What memory depends on: both models, the tune, the calibration, the recipe; all known before anything is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Literal

import torch

from ..activations.links import Blocks, Pairs, block_of, of_class
from ..calibration.extent import Extent
from ..files.checkpoint import Checkpoint
from ..models.geometry import Geometry, Role
from ..models.pair import Pair
from ..recipes.recipe import Recipe
from ..streaming.half_blocks import HALVES, Half, of_half
from ..updates.merged import Merged

Widths = Pair[int]
State = Literal["stored", "converted", "running"]  # as it is read; what changes dtype to run; all as it runs


@dataclass(frozen=True)
class Sizes:
    """What memory depends on, and what follows from it: in bytes where not said otherwise.

    Attributes:
        tuned: a full tune of the source, or None.
        extent: of the calibration.
        aligned: the maps are there already.
        wanted: links and layers of the target that something moves through; None: all.
        fits: layers of the target that will be fitted to the effect -> rank of the factors they get; None: whole.
        told: an update is moved meanwhile, and of rows that are held out it is told how much of its effect arrives.
        blocks: for every target block the source block that feeds it; None: compared where depths differ.
    """

    checkpoints: Pair[Checkpoint]
    geometries: Pair[Geometry]
    recipe: Recipe
    tuned: Checkpoint | Merged | None
    extent: Extent
    device: torch.device
    aligned: bool = False
    wanted: frozenset[str] | None = None
    fits: Mapping[str, int | None] = field(default_factory=dict)
    told: bool = False
    blocks: Blocks | None = None

    @property
    def compares(self) -> bool:
        """Whether blocks are compared first."""
        return self.blocks is None and not self.aligned and self.geometries.source.depth != self.geometries.target.depth

    @property
    def streams(self) -> bool:
        """Whether both models run: maps are made, or the effect is to be seen."""
        return not self.aligned or self.recipe.fits

    @property
    def elementwise(self) -> Pair[int]:
        """Bytes of a number in each model's forward pass."""
        return self.checkpoints.map(lambda checkpoint: checkpoint.compute_dtype.itemsize)

    @cached_property
    def stored(self) -> list[int]:
        """Bytes of the largest block of each model as stored, source first."""
        return [_largest(*side) for side in self.checkpoints.zip(self.geometries)]

    @cached_property
    def cast(self) -> int:
        """Bytes of what is converted of both models' largest blocks before they run, in the dtype they run in."""
        return sum(_largest(*side, "converted") for side in self.checkpoints.zip(self.geometries))

    @cached_property
    def cast_half(self) -> int:
        """As :attr:`cast`, of the larger half of each block: what is converted where halves run one after the other."""
        sides = self.checkpoints.zip(self.geometries)
        return sum(max(_largest(*side, "converted", half) for half in HALVES) for side in sides)

    @cached_property
    def tune(self) -> int:
        """Bytes of the largest block of a full tune as stored; 0 for an adapter, or where none moves."""
        return _largest(self.tuned, self.geometries.source) if self.tuned else 0

    @cached_property
    def running(self) -> Pair[int]:
        """Bytes of the largest block of each model in the dtype it runs in."""
        return self.checkpoints.zip(self.geometries).map(lambda side: _largest(*side, "running"))

    @cached_property
    def tuned_made(self) -> int:
        """Bytes of what is made of the tuned source's largest block before it runs: all, where an adapter is added."""
        own = self.running.source
        return own if self.tuned is None else min(own, _largest(self.tuned, self.geometries.source, "converted"))

    @cached_property
    def updated_made(self) -> int:
        """Bytes of what is made of the largest block of the target as updated: all of it, or the layers that are fitted
        and what is converted."""
        whole = self.running.target
        if not self.recipe.solver.alone:
            return whole
        made = sum(prod(self.geometries.target.weights()[role]) for role in self.writers)
        converted = _largest(self.checkpoints.target, self.geometries.target, "converted")
        return min(whole, converted + self.elementwise.target * made)

    @cached_property
    def writers(self) -> dict[Role, int | None]:
        """Roles of the layers that are fitted -> rank of their factors; None: whole."""
        roles = {layer.name: layer.role for layer in self.geometries.target.layers()}
        return {roles[name]: rank for name, rank in self.fits.items()}

    @cached_property
    def table(self) -> int:
        """Bytes of the largest matrix in float64: what moves row tile by row tile is no larger."""
        return 8 * max(prod(shape) for checkpoint in self.checkpoints for shape in checkpoint.shapes.values())

    @property
    def spaces(self) -> list[Widths]:
        """Features (source, target) of the spaces that a pair of blocks compares, and of the final one.

        Where the class token alone is read those of the last block come twice, of all tokens and of that one.
        """
        return list(self._links.values())

    @property
    def whole(self) -> list[Widths]:
        """Of :attr:`spaces` those compared by all tokens."""
        return [widths for name, widths in self._links.items() if name not in self._pairs.class_rows]

    @cached_property
    def grams(self) -> list[int]:
        """Features of every space that is compared with itself as well, as ``heads`` or whitening asks."""
        sides = self.recipe.solver.gram_sides(self._pairs, self.recipe, self._links)
        return [self._links[name][side] for name, own in sides.items() for side in own]

    @cached_property
    def _pairs(self) -> Pairs:
        """What corresponds, by blocks as told, or as their depths let guess."""
        return Pairs.by_position(*self.geometries) if self.blocks is None else Pairs(*self.geometries, self.blocks)

    @cached_property
    def _links(self) -> dict[str, Widths]:
        found: dict[int | None, dict[str, Widths]] = {}
        rows = self._pairs.class_rows if self.recipe.solver.reads_class_rows else {}
        widths = {name: link.widths for name, link in {**self._pairs.moments, **rows}.items()}
        for name in filter(self._uses, widths):
            found.setdefault(block_of(name), {})[name] = widths[name]
        inside = [spaces for b, spaces in found.items() if b is not None]
        areas = [sum(own * other for own, other in spaces.values()) for spaces in inside]
        outside = {name: widths[name] for name in ("final", of_class("final")) if name in widths}
        return {**(inside[areas.index(max(areas))] if inside else {}), **outside}

    @cached_property
    def maps(self) -> int:
        """Bytes of the largest block's maps and of those outside all blocks, in float64."""
        blocks = {layer.name: layer.block for layer in self.geometries.target.layers()}
        found: dict[int | None, int] = {}
        for part, shape, dtype in self.recipe.solver.planned_maps(self._pairs, self.recipe):
            name = part.rpartition("/")[0]
            if self._uses(name):
                b = blocks.get(name, block_of(name))
                found[b] = found.get(b, 0) + dtype.itemsize * prod(shape)
        outside = found.pop(None, 0)
        return outside + max(found.values(), default=0)

    @property
    def matrices(self) -> list[Pair[tuple[int, int]]]:
        """(source, target) shapes [out, in] of the weights of a block."""
        source, target = (geometry.weights() for geometry in self.geometries)
        return [Pair(source[role], target[role]) for role in source]

    def _uses(self, name: str) -> bool:
        """Whether a link or a layer is wanted; heads' maps go by their block's context."""
        if self.wanted is None:
            return True
        part = name.rpartition(".")[2]
        if part in ("query", "key", "value"):
            name = f"{name.removesuffix(part)}context"
        return name.removesuffix(".completed") in self.wanted


def _largest(
    checkpoint: Checkpoint | Merged, geometry: Geometry, state: State = "stored", half: Half | None = None
) -> int:
    """Bytes of a model's largest block, or of one half."""
    runs = checkpoint.compute_dtype

    def bytes_of(name: str) -> int:
        dtype = checkpoint.dtypes[name]
        size = dtype.itemsize if state == "stored" else runs.itemsize
        return 0 if state == "converted" and dtype == runs else size * prod(checkpoint.shapes[name])

    blocks = geometry.family.by_block(checkpoint).values()
    return max((sum(map(bytes_of, of_half(geometry, names, half))) for names in blocks), default=0)
