"""Sums with which a layer is fitted to the effect of a tune: what it reads, what the source shows, what is there."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

import theseus_ext

from ..errors import InputRefused
from ..linalg.ridge import Normal
from .row_mixing import RowMixing


@dataclass
class EffectMoment:
    """Sums over tokens of a layer's inputs X, the effect E in the source and the change C in the target, in float64.

    E = x(S+) - x(S) [tokens, dS] is what the tune does to the source's state behind the layer; C = x(T+) - x(T)
    [tokens, dT] what the moved update does to the target's so far; X [tokens, d_in] is read in T+.

    Attributes:
        gram: X^T X [d_in, d_in]; source_cross: X^T E [d_in, dS]; target_cross: X^T C [d_in, dT].
        input_sum, source_sum, target_sum: sums of X, E and C, [d_in], [dS] and [dT].
        input_energy, source_energy, target_energy: their sums of squares per feature.
        count: number of tokens.
    """

    gram: Tensor
    source_cross: Tensor
    target_cross: Tensor
    input_sum: Tensor
    source_sum: Tensor
    target_sum: Tensor
    input_energy: Tensor
    source_energy: Tensor
    target_energy: Tensor
    count: int = 0

    @classmethod
    def zeros(cls, inputs: int, source: int, target: int, device: torch.device | str = "cpu") -> EffectMoment:
        """No tokens yet; ``inputs`` features are read, residuals are ``source`` and ``target`` wide."""

        def zero(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        def each() -> tuple[Tensor, Tensor, Tensor]:
            return zero(inputs), zero(source), zero(target)

        return cls(zero(inputs, inputs), zero(inputs, source), zero(inputs, target), *each(), *each())

    def update(
        self,
        inputs: Tensor,
        source_after: Tensor,
        source_before: Tensor,
        target_after: Tensor,
        target_before: Tensor,
        source_mixing: RowMixing | None = None,
        target_mixing: RowMixing | None = None,
    ) -> None:
        """Add tokens; differences of states are formed before they are multiplied, and never stored.

        Args:
            inputs: what the layer reads in T+, [tokens_T, d_in].
            source_after, source_before: states of S+ and S, [tokens_S, dS].
            target_after, target_before: states of T+ and T, [tokens_T, dT].
            source_mixing, target_mixing: of the rows of S and S+, and of T, T+ and the inputs.
        """
        theseus_ext.effect_moment_(
            inputs,
            source_after,
            source_before,
            target_after,
            target_before,
            **{f.name: getattr(self, f.name) for f in fields(self) if f.name != "count"},
            source_mixing=None if source_mixing is None else source_mixing.csr,
            target_mixing=None if target_mixing is None else target_mixing.csr,
        )
        self.count += len(inputs) if target_mixing is None else target_mixing.rows

    def to(self, device: torch.device | str) -> EffectMoment:
        """This moment with its sums on ``device``."""
        tensors = {f.name: getattr(self, f.name).to(device) for f in fields(self) if f.name != "count"}
        return EffectMoment(**tensors, count=self.count)

    def __add__(self, other: EffectMoment) -> EffectMoment:
        """Moments of the union of two sets of tokens."""
        own, others = ([len(m.gram), m.source_cross.shape[1], m.target_cross.shape[1]] for m in (self, other))
        if own != others:
            raise InputRefused(f"cannot add moments of widths {own} and {others} (inputs, source, target)")
        return EffectMoment(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def missing(self, scale: float, q: Tensor, *, centred: bool) -> Normal:
        """Sums of the fit of what is missing, ``M = scale E Q - C``, from X; the Gram is shared, not copied.

        Args:
            scale: of the target's residual to the source's.
            q: the map Q [dS, dT] of the residual.
            centred: the mean over features is removed from E and from M, token by token: LayerNorm does not see it.
        """

        def removed(rows: Tensor) -> Tensor:
            return rows - rows.mean(-1, keepdim=True) if centred else rows

        def of(source: Tensor, target: Tensor) -> Tensor:
            return removed(scale * (removed(source) @ q.to(source)) - target)

        cross, total = of(self.source_cross, self.target_cross), of(self.source_sum, self.target_sum)
        return Normal(self.gram, cross, self.input_sum, total, self.count)
