"""The arithmetic of a move: one layer's update through its maps, norms folded in at the source, out at the target.

With z the norm's output before gain and bias, a layer that reads ``z * gain + bias_norm`` has effective weight
``W~ = diag(scale) W diag(gain)`` and bias ``b~ = scale * (b + W bias_norm)``, ``scale`` the per-feature factor behind
it where a family has one; updates of these move, then unfold at the target.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .delta import Factors
from .errors import InputRefused
from .maps import Heads, Map
from .models import Base, Tensors, double
from .recipes import Rule
from .spaces import Layer

AMPLIFIED = 1.0  # a bias correction larger than the update that carries it is worth a warning


@dataclass(frozen=True)
class Move:
    """One target layer, the source layer that feeds it, and the rule between them."""

    own: Layer
    into: Layer
    rule: Rule
    maps: Mapping[str, Map]
    source: Base
    target: Base
    warnings: list[str]

    def read(self, rows: Tensor) -> Tensor:
        """``rows @ T_in``; a layer that reads the norm's output several times over reads each by the same map."""
        width = self.source.layout.width
        if self.into.norm is None or rows.shape[-1] == width:
            return self.maps[self.rule.input](rows)
        return self.maps[self.rule.input](rows.unflatten(-1, (-1, width))).flatten(-2)

    def write(self, rows: Tensor) -> Tensor:
        """``rows @ T_out``."""
        return self.maps[self.rule.output](rows)

    def dense(self, tuned: Tensors) -> dict[str, Tensor]:
        """Update of the layer: ``weight`` [out_T, in_T] and, where the target has one, ``bias`` [out_T], float64."""
        (w1, b1), (w0, b0) = self._effective(tuned), self._effective({})
        d_weight = self.rule.scale_out / self.rule.scale_in * self.write(self.read(w1 - w0).T).T
        d_bias = self.rule.scale_out * self.write(b1 - b0)
        gain, shift, scale = self._unfolding(*d_weight.shape)
        if f"{self.into.name}.bias" in self.target:
            moved = d_weight / gain / scale[:, None]
            return {"weight": moved, "bias": d_bias / scale - moved @ shift}
        rest = d_bias - d_weight @ (shift / gain)
        if bool(rest.any()):
            d_weight = d_weight + self._into_mean(rest, d_weight, shift / gain)
        return {"weight": d_weight / gain / scale[:, None]}

    def factors(self, factors: Factors) -> Factors:
        """LoRA update of the layer, of the same rank: A' [r, in_T], B' [out_T, r], in float64.

        ``A' = A diag(gain_S) T_in diag(1 / gain_T)``, ``B' = (s_out / s_in) T_out^T B``; the norm's bias, for which a
        factor has no place, goes where LayerNorm never looks.
        """
        a, b = double(factors.a), double(factors.b)
        gain_s, shift_s = self._norm(self.source, self.own, a.shape[1])
        scale_s = self._scale(self.source, self.own, len(b))
        moved_a = self.read(a * gain_s)
        moved_b = self.rule.scale_out / self.rule.scale_in * self.write((scale_s[:, None] * b).T).T
        gain, shift, scale = self._unfolding(len(moved_b), moved_a.shape[1])
        rest = self.rule.scale_in * (a @ shift_s) - moved_a @ (shift / gain)
        if self.rule.fold and bool(rest.any()):
            moved_a = moved_a + self._into_mean(rest, moved_a, shift / gain)
        return Factors(moved_a / gain, moved_b / scale[:, None], factors.scaling)

    def _effective(self, tuned: Tensors) -> tuple[Tensor, Tensor]:
        """Effective weight [out, in] and bias [out] of the source's layer, from ``tuned`` where that has it."""

        def part(name: str, default: Tensor) -> Tensor:
            return double(tuned[name]) if name in tuned else default

        name, norm, factor = self.own.name, self.own.norm if self.rule.fold else None, self.own.scale
        w = part(f"{name}.weight", self.source.vector(f"{name}.weight", 0, 0.0))
        b = part(f"{name}.bias", self.source.vector(f"{name}.bias", len(w), 0.0))
        gain, shift = self._norm(self.source, self.own, w.shape[1])
        copies = w.shape[1] // self.source.layout.width if norm else 1
        gain = part(f"{norm}.weight", gain).repeat(copies) if f"{norm}.weight" in tuned else gain
        shift = part(f"{norm}.bias", shift).repeat(copies) if f"{norm}.bias" in tuned else shift
        scale = self._scale(self.source, self.own, len(w))
        if self.rule.fold and factor is not None:
            scale = part(factor, scale)
        return scale[:, None] * w * gain, scale * (b + w @ shift)

    def _norm(self, base: Base, layer: Layer, width: int) -> tuple[Tensor, Tensor]:
        """(gain, bias) [width] of the norm in front, repeated where the layer reads its output several times over."""
        if not self.rule.fold or layer.norm is None:
            return base.norm(None, width)
        gain, shift = base.norm(layer.norm, base.layout.width)
        copies = width // base.layout.width
        return gain.repeat(copies), shift.repeat(copies)

    def _scale(self, base: Base, layer: Layer, width: int) -> Tensor:
        """The factor behind the layer, [width]; 1 where there is none."""
        return base.vector(layer.scale if self.rule.fold and layer.scale else "", width, 1.0)

    def _unfolding(self, out: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """(gain [width], bias [width], factor behind [out]) of the target's layer; no gain or factor may be zero."""
        gain, shift = self._norm(self.target, self.into, width)
        scale = self._scale(self.target, self.into, out)
        for name, values in ((self.into.norm, gain), (self.into.scale, scale)):
            if bool((values == 0).any()):
                feature = int((values == 0).nonzero()[0])
                raise InputRefused(f"{name} of the target has gain 0 at feature {feature}; nothing passes there")
        return gain, shift, scale

    def _into_mean(self, rest: Tensor, weight: Tensor, zeta: Tensor) -> Tensor:
        """A bias change ``rest`` [rows] as a weight [rows, width] along the ones direction, 0 in z of a LayerNorm.

        ``zeta = bias / gain`` of the norm is what that direction then reads; where it reads nothing, the change is
        lost, and a warning says so.
        """
        total, name = float(zeta.sum()), self.into.name
        if self.target.layout.family.norm != "layer" or self.into.norm is None or total == 0:
            self.warnings.append(
                f"{name}: a bias change of norm {float(rest.norm()):.3g} is lost, the target has no bias to take it"
            )
            return torch.zeros_like(weight)
        added = (rest / total)[:, None].expand_as(weight)
        if float(added.norm()) > AMPLIFIED * float(weight.norm()):
            factor = float(added.norm() / weight.norm().clamp(min=1e-300))
            self.warnings.append(
                f"{name}: the norm's bias hardly reaches the mean (sum {total:.3g}), so carrying a bias change "
                f"through it makes the update {factor:.1f} times larger than its own norm; float32 output keeps it"
            )
        return added


def move_gain(weight: Tensor, source: Tensor, target: Tensor, delta: Tensor) -> Tensor:
    """Update of a gain that no linear layer takes up: gain_T diag(T^T diag(dgain / gain_S) T) / diag(T^T T).

    Args:
        weight: squares of T, [dS, dT].
    """
    share = weight.sum(0)
    mixed = (delta / source) @ weight
    return target * torch.where(share > 0, mixed / torch.where(share > 0, share, 1.0), 0.0)


def shared_map(t: Map, width: int) -> Tensor:
    """T [dS, dT] as a matrix; of a map per head the root mean square over heads, which share their norm's gain."""
    if isinstance(t, Heads):
        return t.blocks.square().mean(0).sqrt()
    return t(torch.eye(width, dtype=torch.float64))
