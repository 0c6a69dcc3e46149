"""Moves of what is no linear layer: embeddings, and gains and biases of norms that no linear layer takes up."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..activations import row_mixing as tokens
from ..models.base import Base
from ..models.family import Embedding
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
        self._shapes = self.source.shape(self.rule.source), self.target.shape(self.into)
        self._kinds = _embedding(self.source, self.rule.source), _embedding(self.target, self.into)
        axes = tuple(kind.axis if kind else 0 for kind in self._kinds)
        self._rows = tuple((*s[:a], *s[a + 1 :]) for s, a in zip(self._shapes, axes, strict=True))
        self._axes = axes
        geometries = self.source.geometry, self.target.geometry
        places = [
            (la.grid, la.ahead[0]) if la.image else count for la, count in zip(geometries, self._counts, strict=True)
        ]
        self._mixed = self._slot == "position" and places[0] != places[1]
        if self._mixed:
            self.note = f"{self._counts[0]} positions onto {self._counts[1]}"

    @property
    def rule(self) -> Rule:
        return self.available.vectors[self.into]

    @property
    def map(self) -> Map:
        return self.available.maps[self.rule.output]

    @property
    def tiles(self) -> tuple[slice, ...]:
        """The target's row tiles where each row comes from the source's of the same index; else none."""
        tables = self._axes == (1, 1) and len(self._shapes[0]) == 2 and not self._mixed
        return row_tiles(self._shapes[1]) if tables else ()

    @property
    def _slot(self) -> str | None:
        return self._kinds[0].slot if self._kinds[0] else None

    @property
    def _counts(self) -> tuple[int, int]:
        return math.prod(self._rows[0]), math.prod(self._rows[1])

    def unfit(self) -> str | None:
        """Why the rows of the two do not correspond, or None."""
        same = self._rows[0] == self._rows[1] if self._slot == "patch" else self._counts[0] == self._counts[1]
        if same or self._mixed:
            return None
        shapes = [list(shape) for shape in self._shapes]
        return f"the source's is {shapes[0]}, the target's {shapes[1]}: rows do not correspond"

    def __call__(self, tuned: Tensors, rows: slice | None = None) -> Tensor:
        """The target's update, or one of its :attr:`tiles`, float64, given the tuned source's tensors."""
        name = self.rule.source
        delta = fresh(rows_of(tuned, name, rows), self.source.device)
        delta = delta.sub_(self.source.need(name, rows)).movedim(self._axes[0], -1)
        if rows is not None:
            return self.map(delta).mul_(self.rule.scale_out)
        if self.rule.kind != "linear":
            return self._norm(delta)
        flat = delta.reshape(self._counts[0], -1)
        moved = self.map(self._positions().to(flat) @ flat if self._mixed else flat).mul_(self.rule.scale_out)
        return moved.reshape(*self._rows[1], -1).movedim(-1, self._axes[1])

    def _norm(self, delta: Tensor) -> Tensor:
        norms = self.rule.source.rpartition(".")[0], self.into.rpartition(".")[0]
        gains = self.source.need(f"{norms[0]}.weight"), self.target.need(f"{norms[1]}.weight")
        t = shared_map(self.map, len(delta), delta.device)
        if self.target.geometry.family.norm == "layer":  # z has no mean, but a gain and a bias do: mean goes to mean
            t = t + 1 / math.sqrt(t.shape[0] * t.shape[1])
        if self.rule.kind == "gain":
            return move_gain(t.square(), *gains, delta)
        return gains[1] * self.rule.scale_out * ((delta / gains[0]) @ t)

    def _positions(self) -> Tensor:
        """Source positions onto the target's [rows_T, rows_S]: by the patch grid, in text by index."""
        source, target = self.source.geometry, self.target.geometry
        mixed = torch.eye(self._counts[1], self._counts[0], dtype=torch.float64)
        if target.family.modality == "vision":
            own, into = source.ahead[0], target.ahead[0]
            grid = tokens.bilinear(source.grid, target.grid, prefix=0)
            mixed[:, own:], mixed[into:] = 0, 0
            mixed[into:, own:] = grid(torch.eye(grid.tokens, dtype=torch.float64))
        return mixed


def _embedding(base: Base, name: str) -> Embedding | None:
    return next((e for e in base.geometry.family.embeddings if e.name == name), None)
