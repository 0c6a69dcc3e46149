"""Linear maps between the two models' features, applied to row vectors: ``x_S [..., dS] @ T [dS, dT] -> [..., dT]``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor

PlannedMap = tuple[str, tuple[int, ...], torch.dtype]  # name/part, shape, dtype of a tensor that is stored


class Map(Protocol):
    """``rows @ T``; never materialises T where it has structure."""

    def __call__(self, rows: Tensor) -> Tensor: ...

    def tensors(self) -> dict[str, Tensor]:
        """The tensors to store of the map, by name; :func:`from_tensors` makes it of them again."""
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
        if rows.ndim == 1:
            return self(rows[None])[0]
        per_head, out = rows.unflatten(-1, (self.heads, -1)), rows.new_empty(*rows.shape[:-1], *self.blocks.shape[::2])
        for head, (own, block) in enumerate(zip(self.source_head.tolist(), self.blocks.to(rows), strict=True)):
            torch.matmul(per_head[..., own, :], block, out=out[..., head, :])  # one by one: no copy of all rows
        moved: Tensor = out.flatten(-2)
        return moved

    def tensors(self) -> dict[str, Tensor]:
        return {"source_head": self.source_head, "blocks": self.blocks, "heads": torch.tensor(self.heads)}

    def unscaled(self) -> Heads:
        """These heads with every block [head_dim_S, head_dim_T] scaled to spectral norm 1; one of zeros stays."""
        size = torch.linalg.matrix_norm(self.blocks, 2).clamp(min=torch.finfo(torch.float64).tiny)
        return replace(self, blocks=self.blocks / size[:, None, None])

    def rank(self, of_groups: Tensor) -> int:
        """Directions of the source that reach the target: each head's of one group once, and no more than it has.

        Args:
            of_groups: rank of the map that consecutive target heads share, [groups].
        """
        group = torch.arange(len(self.source_head)) // (len(self.source_head) // len(of_groups))
        read = torch.stack([self.source_head.cpu(), group], 1).unique(dim=0)
        found = torch.zeros(self.heads, dtype=torch.int64)
        found.index_add_(0, read[:, 0], of_groups.cpu().long()[read[:, 1]])
        return int(found.clamp(max=self.blocks.shape[1]).sum())

    def by_head(self, features: Tensor) -> Tensor:
        """Source features [heads * head_dim_S] as each target head reads them, [heads_T, head_dim_S]."""
        per_head: Tensor = features.unflatten(0, (self.heads, -1))
        return per_head[self.source_head.to(features.device)]


def on(t: Map, device: torch.device) -> Map:
    """A map with its numbers on ``device``: itself where they lie there, else a copy."""
    of: Any = t
    found = {f.name: getattr(t, f.name) for f in fields(of)}
    there = {n: v.to(device) for n, v in found.items() if isinstance(v, Tensor) and v.is_floating_point()}
    return replace(of, **there) if any(there[n] is not found[n] for n in there) else t


def parts(kind: str) -> list[str]:
    """Names of the tensors that maps of class ``kind`` store; KeyError where the kind is unknown."""
    return [f.name for f in fields(KINDS[kind])]


def from_tensors(kind: str, tensors: dict[str, Tensor]) -> Map:
    """The map of class ``kind`` whose :meth:`Map.tensors` these are.

    Raises:
        KeyError, TypeError: the kind is unknown, or a part is missing.
    """
    if kind == "Heads":
        return Heads(tensors["source_head"], tensors["blocks"], int(tensors["heads"]))
    return KINDS[kind](**tensors)  # type: ignore[no-any-return]


KINDS: dict[str, Any] = {kind.__name__: kind for kind in (Identity, Dense, Factored, Heads)}


def doubles(shapes: Iterable[tuple[str, tuple[int, ...]]]) -> list[PlannedMap]:
    """Tensors in float64, as maps are."""
    return [(name, shape, torch.float64) for name, shape in shapes]


def cosine(t: Map, trace: Callable[[Map], float], energies: tuple[Tensor, Tensor]) -> float:
    """tr(T^T C) / sqrt(E_S E_T) in [-1, 1], scales inside T taken out; 0 where a side has no energy.

    Args:
        trace: tr(T^T C) of a map. energies: per feature, or in total, of source and target.
    """
    own, other = energies
    if isinstance(t, Heads):  # a source head counts once per copy, a target head that takes nothing does not
        own, other = t.by_head(own), other.unflatten(0, (len(t.blocks), -1))
        own, other = (e[t.blocks.to(e).flatten(1).any(1)] for e in (own, other))
        t = t.unscaled()
    energy = float(own.sum() * other.sum())
    return trace(t) / energy**0.5 if energy > 0 else 0.0
