"""What the four models predict, where both bases have a head over the same outputs: to correct, fit and judge by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..models.base import Base
from ..models.pair import Pair
from ..recipes.solver import Solver
from ..updates.computed import ComputedUpdate
from .changed_weights import TunedWeights
from .head_fit import HeadFit
from .last_point import AGREE, Heads, agreement, frequencies
from .loop import Loop
from .skeleton import Weights
from .stream import Stream, WritePoint
from .verdict import Head, Prediction, comes_apart, prediction, removed, shared_head, stored_head


class Predictions:
    """Predictions of a loop's two models and of both as changed, once they are behind their last blocks."""

    def __init__(
        self, loop: Loop, solver: Solver, update: ComputedUpdate, streams: tuple[Stream, Stream], batches: Sequence[int]
    ) -> None:
        """
        Args:
            streams: of S+ and of T+. batches: the numbers of those that run through them.
        """
        self._loop, self._update, self._batches = loop, update, batches
        self._tuned, self._updated = streams
        self._bases: Pair[Base] = Pair(solver.source, solver.target)

    @property
    def head(self) -> Head | None:
        """The head that both bases have over the same outputs: of a vocabulary those that the tune has too."""
        rows, tuned = self._loop.rows[self._batches[0]], self._tuned.weights
        head = shared_head(self._bases, rows, one_tokenizer=self._update.one_tokenizer)
        if head is None or head.purpose != "vocabulary" or not isinstance(tuned, TunedWeights):
            return head
        return replace(head, outputs=min(head.outputs, tuned.outputs))

    def corrected(self, point: WritePoint) -> WritePoint:
        """What is wanted behind the last block, corrected by the heads where these share a vocabulary."""
        head = self.head
        if head is None or head.purpose != "vocabulary":  # of classes heads read too little, which costs points
            return point
        if not self._agree(head):
            return point
        target, windows = self._loop.sides.target, self._loop.sides.map(lambda side: side.window)
        ids = [batch["input_ids"] for batch in target.batches if "input_ids" in batch]
        weight = frequencies(torch.cat([x.flatten() for x in ids]) if ids else None, head.outputs)
        own, other = point.q.shape
        z = (other / own) ** 0.5  # z, unlike the residual, has the energy of its width
        heads = Heads.of(self._bases, windows, head, weight)
        return WritePoint(heads.corrected(z * point.q), point.scale / z)

    def fit_head(self, tuned: TunedWeights) -> None:
        """Fit a head that the tune trained to what is missing of its change of predictions.

        :attr:`ComputedUpdate.fits` has it afterwards, if the two bases' heads have anything in common.
        """
        planned, head = self._update.fits.heads, self.head
        if head is None:
            return
        name = self._bases.target.geometry.family.heads[head.purpose]
        trained = tuned.changes([str(stored_head(self._bases.source, head.purpose))])
        if name not in planned or not trained or not self._agree(head):
            return
        each = [self._four(head, i) for i in self._batches if i != self._loop.held]
        read = [torch.cat([batch[k].read for batch in each]) for k in range(4)]
        joined = [replace(one, read=rows) for one, rows in zip(each[0], read, strict=True)]
        outputs = self._update.target.shape(f"{name}.weight")[0]
        bias = f"{name}.bias" in self._update.target
        fit = HeadFit(joined, planned[name].compute, head.outputs, outputs, bias)
        self._update.fits.share[name] = fit.share(name)
        self._update.fits.made[name] = fit
        self._update.forget()

    def removed(self, states: Mapping[float, tuple[Tensor, Weights]], held: int) -> dict[float, float]:
        """By strength the share of divergence that is removed on the batch that is held out; {} where no head tells.

        Args:
            states: strength -> hidden states of the target behind its last block, and weights of its head.
        """
        if (head := self.head) is None or (head.purpose == "vocabulary" and comes_apart(self._update)):
            return {}
        source, target = self._loop.sides
        before = self._of(1, head, target.hidden[held], target.window, held)
        base = self._of(0, head, source.hidden[held], source.window, held)
        effect = Pair(base, self._of(0, head, self._tuned[held], self._tuned.weights, held))
        return removed(head, before, effect, {a: self._of(1, head, *states[a], held) for a in sorted(states)})

    def _agree(self, head: Head) -> bool:
        """Whether the heads of both bases have something in common, on the first batch."""
        i = self._batches[0]
        seen = [self._of(k, head, s.hidden[i], s.window, i) for k, s in enumerate(self._loop.sides)]
        return agreement(head, *seen) >= AGREE

    def _four(self, head: Head, i: int) -> list[Prediction]:
        """What S+, S, T, and T+ with the head of its base predict of batch ``i``."""
        source, target = self._loop.sides
        updated = self._of(1, head, self._updated[i], self._updated.weights, i)
        return [
            self._of(0, head, self._tuned[i], self._tuned.weights, i),
            self._of(0, head, source.hidden[i], source.window, i),
            self._of(1, head, target.hidden[i], target.window, i),
            replace(updated, weights=target.window),
        ]

    def _of(self, k: int, head: Head, state: Tensor, weights: Weights, i: int) -> Prediction:
        """What one side's head makes of hidden states behind its last block, on batch ``i``."""
        side = self._loop.sides[k]
        mask = side.batches[i].get("attention_mask")
        return prediction(side, self._bases[k], head, state.to(side.device), weights, self._loop.rows[i][k], mask)
