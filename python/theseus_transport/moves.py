"""The arithmetic of a move: one layer's update through its maps, norms folded in at the source, out at the target.

With z the norm's output before gain and bias, a layer that reads ``z * gain + bias_norm`` has effective weight
``W~ = W diag(gain)`` and bias ``b~ = b + W bias_norm``; updates of these move, then unfold at the target.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .delta import Factors
from .errors import InputRefused
from .maps import Map
from .models import Base, Tensors, double
from .recipes import Rule
from .spaces import Layer

AMPLIFIED = 1.0  # a bias correction larger than the update that carries it is worth a warning


def move_dense(
    layer: Layer,
    rule: Rule,
    maps: Mapping[str, Map],
    source: Base,
    tuned: Tensors,
    target: Base,
    warnings: list[str],
) -> dict[str, Tensor]:
    """Update of a linear layer: ``weight`` [out_T, in_T] and, where the target has one, ``bias`` [out_T], float64."""
    t_in, t_out, ratio = maps[rule.input], maps[rule.output], rule.scale_out / rule.scale_in
    width = source.shape(f"{layer.name}.weight")[1]
    norm = layer.norm if rule.fold else None

    def effective(after: bool) -> tuple[Tensor, Tensor]:
        def part(name: str, size: int, default: float) -> Tensor:
            return double(tuned[name]) if after and name in tuned else source.vector(name, size, default)

        w = part(f"{layer.name}.weight", 0, 0.0)
        b = part(f"{layer.name}.bias", len(w), 0.0)
        gain, shift = part(f"{norm}.weight", width, 1.0), part(f"{norm}.bias", width, 0.0)
        return w * gain, b + w @ shift

    (w1, b1), (w0, b0) = effective(after=True), effective(after=False)
    d_weight = ratio * t_out(t_in(w1 - w0).T).T
    d_bias = rule.scale_out * t_out(b1 - b0)
    gain, shift = _target_norm(layer, rule, target, d_weight.shape[1])
    if f"{layer.name}.bias" in target:
        moved = d_weight / gain
        return {"weight": moved, "bias": d_bias - moved @ shift}
    rest = d_bias - d_weight @ (shift / gain)
    if bool(rest.any()):
        d_weight = d_weight + _into_mean(rest, d_weight, shift / gain, layer, target, warnings)
    return {"weight": d_weight / gain}


def move_factors(
    layer: Layer, rule: Rule, maps: Mapping[str, Map], factors: Factors, source: Base, target: Base, warnings: list[str]
) -> Factors:
    """LoRA update of a linear layer, of the same rank: A' [r, in_T], B' [out_T, r], in float64.

    ``A' = A diag(gain_S) T_in diag(1 / gain_T)``, ``B' = (s_out / s_in) T_out^T B``; the norm's bias, for which a
    factor has no place, goes where LayerNorm never looks.
    """
    a, b = double(factors.a), double(factors.b)
    width = source.shape(f"{layer.name}.weight")[1]
    gain_s, shift_s = source.norm(layer.norm if rule.fold else None, width)
    moved_a = maps[rule.input](a * gain_s)
    moved_b = rule.scale_out / rule.scale_in * maps[rule.output](b.T).T
    gain, shift = _target_norm(layer, rule, target, moved_a.shape[1])
    rest = rule.scale_in * (a @ shift_s) - moved_a @ (shift / gain)
    if rule.fold and bool(rest.any()):
        moved_a = moved_a + _into_mean(rest, moved_a, shift / gain, layer, target, warnings)
    return Factors(moved_a / gain, moved_b, factors.scaling)


def move_vector(output: Map, rule: Rule, axis: int, delta: Tensor) -> Tensor:
    """Update of a tensor whose ``axis`` runs over the width: an embedding, or a norm's own vector in ``paper``."""
    return rule.scale_out * output(delta.movedim(axis, -1)).movedim(-1, axis)


def move_gain(t: Tensor, source: Tensor, target: Tensor, delta: Tensor) -> Tensor:
    """Update of a gain that no linear layer takes up: gain_T diag(T^T diag(dgain / gain_S) T) / diag(T^T T)."""
    weight = t.square()
    share = weight.sum(0)
    mixed = (delta / source) @ weight
    return target * torch.where(share > 0, mixed / torch.where(share > 0, share, 1.0), 0.0)


def _target_norm(layer: Layer, rule: Rule, target: Base, width: int) -> tuple[Tensor, Tensor]:
    norm = layer.norm if rule.fold else None
    gain, shift = target.norm(norm, width)
    if bool((gain == 0).any()):
        raise InputRefused(
            f"{norm} of the target has gain 0 at feature {int((gain == 0).nonzero()[0])}; nothing passes there"
        )
    return gain, shift


def _into_mean(rest: Tensor, weight: Tensor, zeta: Tensor, layer: Layer, target: Base, warnings: list[str]) -> Tensor:
    """A bias change ``rest`` [rows] as a weight [rows, width] along the ones direction, 0 in z of a LayerNorm.

    ``zeta = bias / gain`` of the norm is what that direction then reads; where it reads nothing, the change is lost,
    and a warning says so.
    """
    total = float(zeta.sum())
    if target.layout.family.norm != "layer" or layer.norm is None or total == 0:
        warnings.append(
            f"{layer.name}: a bias change of norm {float(rest.norm()):.3g} is lost, the target has no bias to take it"
        )
        return torch.zeros_like(weight)
    added = (rest / total)[:, None].expand_as(weight)
    if float(added.norm()) > AMPLIFIED * float(weight.norm()):
        factor = float(added.norm() / weight.norm().clamp(min=1e-300))
        warnings.append(
            f"{layer.name}: the norm's bias hardly reaches the mean (sum {total:.3g}), so carrying a bias change "
            f"through it makes the update {factor:.1f} times larger than its own norm; float32 output keeps it exact"
        )
    return added
