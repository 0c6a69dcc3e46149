"""Moves of what is no linear layer: embeddings, and gains and biases of norms that no linear layer takes up."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..activations import row_mixing as tokens
from ..models.base import Base
from ..models.family import Embedding
from ..models.pair import Pair
from ..models.tensors import Tensors, fresh, row_tiles, rows_of
from ..recipes.maps import Map
from ..recipes.ruleset import Rule
from .available import Available
from .layer_moves import move_gain, shared_map


@dataclass
class VectorMove:
    """One embedding, gain or bias of the target, and the source's that feeds it.

    Rule and map are looked up when they are used: an outline's rule names the source and kind, the scales come later.
    """

    into: str
    available: Available
    source: Base
    target: Base
    note: str = field(init=False, default="")

    def __post_init__(self) -> None:
        bases = Pair(self.source, self.target)
        named = bases.zip((self.rule.source, self.into))
        self._shapes = named.map(lambda of: of[0].shape(of[1]))
        self._kinds = named.map(lambda of: _embedding(*of))
        self._axes = self._kinds.map(lambda kind: kind.axis if kind else 0)
        self._rows = self._shapes.zip(self._axes).map(lambda of: (*of[0][: of[1]], *of[0][of[1] + 1 :]))
        geometries = bases.map(lambda base: base.geometry)
        own, other = ((la.grid, la.ahead[0]) if la.image else count for la, count in geometries.zip(self._counts))
        self._mixed = self._slot == "position" and own != other
        if self._mixed:
            self.note = f"{self._counts.source} positions onto {self._counts.target}"

    @property
    def rule(self) -> Rule:
        return self.available.vectors[self.into]

    @property
    def map(self) -> Map:
        return self.available.maps[self.rule.output]

    @property
    def tiles(self) -> tuple[slice, ...]:
        """The target's row tiles where each row comes from the source's of the same index; else none."""
        tables = self._axes == (1, 1) and len(self._shapes.source) == 2 and not self._mixed
        return row_tiles(self._shapes.target) if tables else ()

    @property
    def _slot(self) -> str | None:
        return self._kinds.source.slot if self._kinds.source else None

    @property
    def _counts(self) -> Pair[int]:
        return self._rows.map(math.prod)

    def unfit(self) -> str | None:
        """Why the rows of the two do not correspond, or None."""
        own, other = self._rows if self._slot == "patch" else self._counts
        if own == other or self._mixed:
            return None
        shapes = self._shapes.map(list)
        return f"the source's is {shapes.source}, the target's {shapes.target}: rows do not correspond"

    def __call__(self, tuned: Tensors, rows: slice | None = None) -> Tensor:
        """The target's update, or one of its :attr:`tiles`, float64, given the tuned source's tensors."""
        name = self.rule.source
        delta = fresh(rows_of(tuned, name, rows), self.source.device)
        delta = delta.sub_(self.source.need(name, rows)).movedim(self._axes.source, -1)
        if rows is not None:
            return self.map(delta).mul_(self.rule.scale_out)
        if self.rule.kind != "linear":
            return self._norm(delta)
        flat = delta.reshape(self._counts.source, -1)
        moved = self.map(self._positions().to(flat) @ flat if self._mixed else flat).mul_(self.rule.scale_out)
        return moved.reshape(*self._rows.target, -1).movedim(-1, self._axes.target)

    def _norm(self, delta: Tensor) -> Tensor:
        own, other = (f"{name.rpartition('.')[0]}.weight" for name in (self.rule.source, self.into))
        gains = Pair(self.source.need(own), self.target.need(other))
        t = shared_map(self.map, len(delta), delta.device)
        if self.target.geometry.family.norm == "layer":  # z has no mean, but a gain and a bias do: mean goes to mean
            t = t + 1 / math.sqrt(t.shape[0] * t.shape[1])
        if self.rule.kind == "gain":
            return move_gain(t.square(), *gains, delta)
        return gains.target * self.rule.scale_out * ((delta / gains.source) @ t)

    def _positions(self) -> Tensor:
        """Source positions onto the target's [rows_T, rows_S]: by the patch grid, in text by index."""
        source, target = self.source.geometry, self.target.geometry
        mixed = torch.eye(self._counts.target, self._counts.source, dtype=torch.float64)
        if target.family.modality == "vision":
            own, into = source.ahead[0], target.ahead[0]
            grid = tokens.bilinear(source.grid, target.grid, prefix=0)
            mixed[:, own:], mixed[into:] = 0, 0
            mixed[into:, own:] = grid(torch.eye(grid.tokens, dtype=torch.float64))
        return mixed


def _embedding(base: Base, name: str) -> Embedding | None:
    return next((e for e in base.geometry.family.embeddings if e.name == name), None)
