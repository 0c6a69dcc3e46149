"""Linear maps between the two models' features, applied to row vectors: ``x_S [..., dS] @ T [dS, dT] -> [..., dT]``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Map(Protocol):
    """``rows @ T``; never materialises T where it has structure."""

    def __call__(self, rows: Tensor) -> Tensor: ...

    def tensors(self) -> dict[str, Tensor]:
        """What to store, by name."""
        ...


@dataclass(frozen=True)
class Identity:
    """Both sides share the features: vocabulary, classes, patch pixels."""

    def __call__(self, rows: Tensor) -> Tensor:
        return rows

    def tensors(self) -> dict[str, Tensor]:
        return {}


@dataclass(frozen=True)
class Dense:
    """T [dS, dT] itself."""

    matrix: Tensor

    def __call__(self, rows: Tensor) -> Tensor:
        return rows @ self.matrix.to(rows)

    def tensors(self) -> dict[str, Tensor]:
        return {"matrix": self.matrix}


@dataclass(frozen=True)
class Factored:
    """T = left [dS, k] right [k, dT], k far below dS and dT."""

    left: Tensor
    right: Tensor

    def __call__(self, rows: Tensor) -> Tensor:
        return (rows @ self.left.to(rows)) @ self.right.to(rows)

    def tensors(self) -> dict[str, Tensor]:
        return {"left": self.left, "right": self.right}


@dataclass(frozen=True)
class Heads:
    """Each target head reads one source head through its own small map, any scale included.

    Attributes:
        source_head: int64 [heads_T], which source head feeds each target head.
        blocks: [heads_T, head_dim_S, head_dim_T].
        heads: number of source heads.
    """

    source_head: Tensor
    blocks: Tensor
    heads: int

    def __call__(self, rows: Tensor) -> Tensor:
        per_head = rows.unflatten(-1, (self.heads, -1))[..., self.source_head.to(rows.device), :]
        return torch.einsum("...hs,hst->...ht", per_head, self.blocks.to(rows)).flatten(-2)

    def tensors(self) -> dict[str, Tensor]:
        return {"source_head": self.source_head, "blocks": self.blocks, "heads": torch.tensor(self.heads)}


def from_tensors(kind: str, tensors: dict[str, Tensor]) -> Map:
    """The map of class ``kind`` whose :meth:`Map.tensors` these are.

    Raises:
        KeyError, TypeError: the kind is unknown, or a part is missing.
    """
    if kind == "Heads":
        return Heads(tensors["source_head"], tensors["blocks"], int(tensors["heads"]))
    classes: dict[str, type[Identity | Dense | Factored]] = {"Identity": Identity, "Dense": Dense, "Factored": Factored}
    return classes[kind](**tensors)
