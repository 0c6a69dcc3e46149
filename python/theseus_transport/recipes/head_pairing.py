"""Which source head feeds which target head: similarity of context heads, assigned inside groups, then over groups."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

import theseus_ext
from theseus_ext.ops import LARGEST_ON_CUDA

from ..activations.moments import CrossMoment
from ..linalg.polar import polar_factor, remote
from ..linalg.procrustes import FLOOR


@dataclass(frozen=True)
class HeadPairing:
    """For every target head the source head it corresponds to.

    Attributes:
        query: int64 [heads_T], source query head of each target query head.
        kv: int64 [kv_heads_T], source kv head of each target kv head; query heads are paired inside these groups.
        own: bool [heads_T], whether a head was assigned inside its group; left over, it copies one that is.
        similarity: float64 [heads_T], nuc(C_ij) / sqrt(E_i E_j) of the paired heads; 1 if equal up to rotation, scale.
        lost: source query heads that feed no target head.
    """

    query: Tensor
    kv: Tensor
    own: Tensor
    similarity: Tensor
    lost: list[int]

    def plain(self) -> dict[str, Any]:
        """The pairing as JSON, to the bit; :meth:`restored` reads it."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: v.tolist() if isinstance(v, Tensor) else v for name, v in values.items()}

    @classmethod
    def restored(cls, values: Mapping[str, Any]) -> HeadPairing:
        similarity = torch.tensor(values["similarity"], dtype=torch.float64)
        query, kv, own = (torch.tensor(values[name]) for name in ("query", "kv", "own"))
        return cls(query, kv, own, similarity, values["lost"])


def pair_heads(context: CrossMoment, heads: tuple[int, int], kv_heads: tuple[int, int]) -> HeadPairing:
    """Pair heads by their outputs.

    Linear assignment of query heads inside every pair of kv groups, then of groups by the sum of their inner
    assignment; target heads and groups left over copy the most similar one.

    Args:
        context: moment of the attention's context (input of its output projection), [heads * head_dim] on each side.
        heads: query heads of (source, target).
        kv_heads: key-value heads of (source, target).
    """
    score = similarity(context, heads)
    groups = score.unflatten(1, (kv_heads[1], -1)).unflatten(0, (kv_heads[0], -1))  # [kv_S, in group, kv_T, in group]
    inner = [[_assign(groups[i, :, j]) for j in range(kv_heads[1])] for i in range(kv_heads[0])]
    quality = torch.tensor([[total for *_, total in row] for row in inner], dtype=torch.float64)
    kv, *_ = _assign(quality)
    size = heads[0] // kv_heads[0]
    query = torch.cat([inner[i][j][0] + i * size for j, i in enumerate(kv.tolist())])
    own = torch.cat([inner[i][j][1] for j, i in enumerate(kv.tolist())])
    lost = sorted(set(range(heads[0])) - set(query.tolist()))
    return HeadPairing(query, kv, own, score[query, torch.arange(heads[1])], lost)


def similarity(context: CrossMoment, heads: tuple[int, int]) -> Tensor:
    """nuc(C_ij) / sqrt(E_i E_j), float64 [heads_S, heads_T] on the CPU; 0 for a head without energy."""
    blocks = context.cross.unflatten(1, (heads[1], -1)).unflatten(0, (heads[0], -1)).transpose(1, 2)
    energies = [
        e.unflatten(0, (n, -1)).sum(1)
        for e, n in zip((context.source_energy, context.target_energy), heads, strict=True)
    ]
    norm = (energies[0][:, None] * energies[1]).sqrt()
    return torch.where(norm > 0, nuclear(blocks) / norm.clamp(min=torch.finfo(norm.dtype).tiny), 0.0).cpu()


def nuclear(c: Tensor) -> Tensor:
    """Nuclear norms [...] of C [..., dS, dT], taken where C lies.

    On a device those that its svdvals would take one by one are tr(T^T C) of the iterated T, to the floor.
    """
    if not remote(c) or max(c.shape[-2:]) <= LARGEST_ON_CUDA:
        return theseus_ext.svdvals(c).sum(-1)
    return (polar_factor(c, floor=FLOOR, eigh=False)[0] * c).sum((-2, -1))


def _assign(score: Tensor) -> tuple[Tensor, Tensor, float]:
    """Row of each column [columns], whether it was assigned, and the assigned total; columns left over take their best
    row."""
    rows, columns = linear_sum_assignment(score.numpy(), maximize=True)
    chosen, own = score.argmax(0), torch.zeros(score.shape[1], dtype=torch.bool)
    chosen[torch.from_numpy(columns)], own[torch.from_numpy(columns)] = torch.from_numpy(rows), True
    return chosen, own, float(score[rows, columns].sum())
