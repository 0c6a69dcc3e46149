"""A head that the tune trained, fitted behind all blocks to what is still missing of the change of predictions.

With z the rows that the head reads of T+, and L the logits of the four models, the update is prior + dW where
``dW = argmin |z dW^T + 1 b^T - M|^2 + lambda |dW|^2`` and ``M = (L(S+) - L(S)) - (L(T+) - L(T))``. Outputs are fitted
one by one, so that only the tile of a vocabulary that is wanted is ever made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..linalg.ridge import Normal, ridge
from ..models.tensors import row_tiles
from .verdict import Prediction

CHUNK = 1 << 20  # logits of each model that are made at a time
RHO = 1e-1  # of the ridge: a head reads all that is noise in the residual as well
Part = Callable[[slice | None], dict[str, Tensor]]


@dataclass
class HeadFit:
    """The update of one head, made when it is asked for; it stands beside the fits of writers.

    Attributes:
        wanted: S+, S and T, then T+ with the head as it is before any update.
        prior: canonical name -> what maps move of the head; shared: the first outputs, which both heads have.
        outputs: of the target's head.
    """

    wanted: Sequence[Prediction]
    prior: Part
    shared: int
    outputs: int
    with_bias: bool
    _gram: list[Tensor] = field(default_factory=list)

    def dense(self, layer: str, rows: slice | None = None) -> dict[str, Tensor]:
        """Canonical name -> the update of a tensor of the head, of ``rows`` alone where given."""
        moved = self.prior(rows)
        span = rows or slice(0, self.outputs)
        last = min(span.stop, self.shared)
        if last <= span.start:
            return moved
        weight, bias = moved[f"{layer}.weight"], moved.get(f"{layer}.bias")
        size = last - span.start
        fit = self._fit(slice(span.start, last), weight[:size], None if bias is None else bias[:size])
        weight = weight.clone()
        weight[:size] += fit[0]
        found = {**moved, f"{layer}.weight": weight}
        if bias is not None and fit[1] is not None:
            found[f"{layer}.bias"] = torch.cat([bias[:size] + fit[1], bias[size:]])
        return found

    def share(self, layer: str) -> float:
        """Share of the update's norm that the fit is; of a large head, in its first tile of outputs."""
        tile = next(iter(row_tiles((self.outputs, self.wanted[0].read.shape[1]))), None)
        before, after = self.prior(tile)[f"{layer}.weight"], self.dense(layer, tile)[f"{layer}.weight"]
        added = float((after - before).norm())
        return added / max(added + float(before.norm()), torch.finfo(torch.float64).tiny)

    def _fit(self, outputs: slice, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(dW [outputs, width], b [outputs] or None) beside what is moved already."""
        z, count = self.wanted[-1].read.double(), outputs.stop - outputs.start
        cross, total = z.new_empty(z.shape[1], count), z.new_empty(count)
        step = max(1, CHUNK // max(1, len(z)))
        for first in range(0, count, step):  # logits of all rows and of a few outputs at a time
            part = slice(first, min(first + step, count))
            span = slice(outputs.start + part.start, outputs.start + part.stop)
            tuned, source, target, updated = (one.logits(span) for one in self.wanted)
            missing = tuned - source + target - updated - z @ weight[part].to(z).T
            if bias is not None:
                missing -= bias[part].to(z)
            cross[:, part], total[part] = z.T @ missing, missing.sum(0)
        if not self._gram:
            self._gram.append(z.T @ z)
        normal = Normal(self._gram[0], cross, z.sum(0), total, len(z))
        found: Any = ridge(normal, RHO, bias=self.with_bias and bias is not None)
        return found.weight.to(weight), None if found.bias is None else found.bias.to(weight)
