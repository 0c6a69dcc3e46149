"""The wanted effect behind the last block, where both models share a vocabulary: by what it does to predictions.

The map Q of the residual there is made from all that both models show; what their heads read of it is a small part. The
heads' own outputs correspond exactly, though, token by token. So Q is corrected, by the least change,
until what it wants of the target's logits is what the source's logits show: with heads W_S, W_T folded with the gains
of the final norms, and outputs weighed by how often they occur,

    Q' = Q + (C - Q G) (G + mu)^-1        C = W_S^T P W_T [dS, dT]        G = W_T^T P W_T [dT, dT]

Where the two networks are one in two writings, C = Q G, and nothing is corrected. A head over a few classes reads too
little of the residual for this: on digits it costs 3 to 7 % of the ceiling's gain (one seed).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.base import Base
from ..models.pair import Pair
from ..models.tensors import PIECE
from .verdict import Head, Prediction, stored_head
from .window import Window

MU = 1e-3  # of the mean of G's diagonal
UNSEEN = 0.1  # share of all weight that outputs which do not occur have together
AGREE = 0.1  # correlation of both models' logits below which their heads have nothing in common


@dataclass(frozen=True)
class Heads:
    """What two heads of the same outputs say of each other.

    Attributes:
        cross: C [dS, dT]; gram: G [dT, dT]; float64.
    """

    cross: Tensor
    gram: Tensor

    @classmethod
    def of(cls, bases: Pair[Base], windows: Pair[Window], head: Head, weight: Tensor) -> Heads:
        """Read in tiles of outputs, each once.

        Args:
            weight: of every output [outputs], summing to 1.
        """
        gains = bases.map(lambda base: base.norm(base.geometry.family.final_norm, base.geometry.width)[0])
        names = bases.map(lambda base: str(stored_head(base, head.purpose)))
        widths = bases.map(lambda base: base.geometry.width)
        cross, gram = (torch.zeros(width, widths.target, dtype=torch.float64) for width in widths)
        means = [torch.zeros(width, dtype=torch.float64) for width in widths]
        step = max(1, PIECE // max(widths))
        for first in range(0, head.outputs, step):
            tile = slice(first, min(first + step, head.outputs))
            p = weight[tile, None]
            read = zip(windows, names, gains, strict=True)
            own, other = (window.rows(name, tile).double().cpu() * gain for window, name, gain in read)
            cross.addmm_(own.T, p * other)
            gram.addmm_(other.T, p * other)
            for mean, rows in zip(means, (own, other), strict=True):
                mean += (p * rows).sum(0)
        for sums, mean in zip((cross, gram), means, strict=True):  # softmax sees no common shift of all logits
            sums.addr_(mean, means[1], alpha=-1)
        for k, base in enumerate(bases):
            if base.geometry.family.norm == "layer":  # nor does the head see the mean over features
                cross -= cross.mean(k, keepdim=True)
                if k == 1:
                    gram -= gram.mean(0)
                    gram -= gram.mean(1, keepdim=True)
        return cls(cross, gram)

    def corrected(self, q: Tensor) -> Tensor:
        """Q' [dS, dT] of a map Q between what the final norms give."""
        lam = MU * float(self.gram.trace()) / len(self.gram)
        if lam == 0:
            return q
        missing = self.cross.to(q) - q @ self.gram.to(q)
        regular = self.gram.to(q) + lam * torch.eye(len(self.gram), dtype=q.dtype, device=q.device)
        found: Tensor = q + torch.linalg.solve(regular, missing.T).T
        return found


def agreement(head: Head, own: Prediction, other: Prediction) -> float:
    """The correlation of two models' logits on the same rows, each about its means over rows and over outputs."""
    products = torch.zeros(2, 2, dtype=torch.float64)
    totals = torch.zeros(2, len(own.read), dtype=torch.float64)
    for tile in head.tiles(own, other):
        both = torch.stack([x - x.mean(0) for x in (own.logits(tile), other.logits(tile))]).cpu()
        totals += both.sum(2)
        products += both.flatten(1) @ both.flatten(1).T
    products -= totals @ totals.T / head.outputs
    size = float(products[0, 0] * products[1, 1]) ** 0.5
    return float(products[0, 1]) / size if size > 0 else 0.0


def frequencies(ids: Tensor | None, outputs: int) -> Tensor:
    """How much every output counts, [outputs]: tokens by how often they occur, classes alike."""
    uniform = torch.full((outputs,), 1 / outputs, dtype=torch.float64)
    counts = torch.zeros(outputs) if ids is None else torch.bincount(ids.flatten(), minlength=outputs)[:outputs]
    total = float(counts.sum())
    return uniform if not total else (1 - UNSEEN) * counts.double() / total + UNSEEN * uniform
