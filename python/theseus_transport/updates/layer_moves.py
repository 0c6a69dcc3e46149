"""The arithmetic of a move: one layer's update through its maps, norms folded in at the source, out at the target.

With z the norm's output before gain and bias, a layer that reads ``z * gain + bias_norm`` has effective weight
``W~ = diag(scale) W diag(gain)`` and bias ``b~ = scale * (b + W bias_norm)``, ``scale`` the per-feature factor behind
it where a family has one; updates of these move, then unfold at the target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf, prod, sqrt

import torch
from torch import Tensor

from ..errors import InputRefused
from ..models.base import Base
from ..models.geometry import Layer
from ..models.tensors import Tensors, double, fresh, rows_of, squares
from ..recipes.maps import Heads, Map, on
from ..recipes.ruleset import Rule
from .adapter import Factors
from .available import Available

AMPLIFIED = 1.0  # a bias correction larger than the update that carries it is worth a warning
BESIDE_NOTHING = 1e4  # times as much as the rest: the rest is nothing, or rounding


def move_bytes(source: Sequence[int], target: Sequence[int]) -> int:
    """Peak bytes of :meth:`Move.dense` between weights of these shapes [out, in], the result included, float64.

    At most two large matrices are alive at once: tuned and base [out_S, in_S]; their difference and the half product
    [out_S, in_T]; the half product and the result [out_T, in_T], with the inner product [in_T, in_S + 1] of a factored
    map where the layer expands. On a GPU all of them lie there. Beside them: the source's weight as stored, one of
    tuned and base at a time, and of maps that lie elsewhere one at a time, float64.
    """
    change, half, inner = prod(source), source[0] * target[1], target[1] * (source[1] + 1)
    return 8 * max(2 * change, change + half, half + prod(target) + (inner if source[0] > source[1] + 1 else 0))


@dataclass
class Carried:
    """What became of bias changes that no bias of the target takes, told once a layer however often it is computed.

    Attributes:
        sums: layer of the target -> first row of a tile -> sums of squares of the change, of the weight that carries
            it and of the layer's own update, and the sum of bias / gain of the norm, 0 where it is lost. JSON.
    """

    sums: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def add(self, layer: str, rows: slice | None, *sums: float) -> None:
        self.sums.setdefault(layer, {})[str(rows.start if rows else 0)] = list(sums)

    def warnings(self) -> list[str]:
        return [text for layer, tiles in self.sums.items() for text in self._told(layer, list(tiles.values()))]

    def _told(self, layer: str, tiles: list[list[float]]) -> list[str]:
        (rest, added, weight), total = (sum(part) for part in list(zip(*tiles, strict=True))[:3]), tiles[0][3]
        if total == 0:
            return [f"{layer}: a bias change of norm {sqrt(rest):.3g} is lost, the target has no bias to take it"]
        if added <= AMPLIFIED**2 * weight:
            return []
        times = sqrt(added / weight) if weight > 0 else inf
        share = f"{times:.1f} times the rest" if times < BESIDE_NOTHING else "all"
        return [
            f"{layer}: the tune shifts the output of this layer by a constant, for which the target has no bias: its "
            f"weight carries it, which is {share} of its update; 16 bits may round that away, --out-dtype float32 "
            "keeps it"
        ]


@dataclass(frozen=True)
class Move:
    """One target layer, the source layer that feeds it, and the rule between them.

    Rule and maps are looked up when they are used: an outline's rule names the source, the rest comes later. It is
    computed on the device of the bases; maps that lie elsewhere are copied there for the time of their use.
    """

    own: Layer
    into: Layer
    available: Available
    source: Base
    target: Base
    carried: Carried

    @property
    def rule(self) -> Rule:
        return self.available.rules[self.into.name]

    def read(self, rows: Tensor) -> Tensor:
        """``rows @ T_in``; a layer that reads the norm's output several times over reads each by the same map."""
        width, t = self.source.geometry.width, self.available.maps[self.rule.input]
        if self.into.norm is None or rows.shape[-1] == width:
            return t(rows)
        return t(rows.unflatten(-1, (-1, width))).flatten(-2)

    @property
    def write(self) -> Map:
        """The map T_out of the layer's outputs, on the device of the bases."""
        return on(self.available.maps[self.rule.output], self.source.device)

    def dense(self, tuned: Tensors, rows: slice | None = None) -> dict[str, Tensor]:
        """Update of the layer: ``weight`` [out_T, in_T] and, where the target has one, ``bias`` [out_T], float64.

        Of a head, whose outputs both sides share, also of ``rows`` alone. :func:`move_bytes` says what it takes.
        """
        change, before = self._effective(tuned, rows), self._effective({}, rows)
        change[0].sub_(before[0])
        bias = change[1] - before[1]
        del before
        half = self.read(change[0])
        del change
        write = self.write  # once: it may be read from a file
        d_bias = self.rule.scale_out * write(bias)
        d_weight = write(half.T).T
        del half, write
        d_weight *= self.rule.scale_out / self.rule.scale_in
        gain, shift, scale = self._unfolding(*d_weight.shape)
        if f"{self.into.name}.bias" in self.target:
            d_weight.div_(gain).div_(scale[:, None])
            return {"weight": d_weight, "bias": d_bias / scale - d_weight @ shift}
        rest = d_bias - d_weight @ (shift / gain)
        if bool(rest.any()):
            self._into_mean(rest, d_weight, shift / gain, rows)
        return {"weight": d_weight.div_(gain).div_(scale[:, None])}

    def factors(self, factors: Factors) -> Factors:
        """LoRA update of the layer, of the same rank: A' [r, in_T], B' [out_T, r], in float64.

        ``A' = A diag(gain_S) T_in diag(1 / gain_T)``, ``B' = (s_out / s_in) T_out^T B``; the norm's bias, for which a
        factor has no place, goes where LayerNorm never looks.
        """
        a, b = (double(factor, self.source.device) for factor in (factors.a, factors.b))
        gain_s, shift_s = self._norm(self.source, self.own, a.shape[1])
        scale_s = self._scale(self.source, self.own, len(b))
        moved_a = self.read(a * gain_s)
        moved_b = self.rule.scale_out / self.rule.scale_in * self.write((scale_s[:, None] * b).T).T
        gain, shift, scale = self._unfolding(len(moved_b), moved_a.shape[1])
        rest = self.rule.scale_in * (a @ shift_s) - moved_a @ (shift / gain)
        if self.rule.fold and bool(rest.any()):
            self._into_mean(rest, moved_a, shift / gain)
        return Factors(moved_a / gain, moved_b / scale[:, None], factors.scaling)

    def _effective(self, tuned: Tensors, rows: slice | None) -> tuple[Tensor, Tensor]:
        """Effective weight [out, in] and bias [out] of the source's layer, from ``tuned`` where that has it; both new.

        Args:
            rows: of the output features, only these.
        """

        def part(name: str, size: int, default: float, rows: slice | None = None) -> Tensor:
            if name in tuned:
                return fresh(rows_of(tuned, name, rows), source.device)
            return source.vector(name, size, default, rows)

        source, fold = self.source, self.rule.fold
        name, norm, factor = self.own.name, self.own.norm if fold else None, self.own.scale if fold else None
        w = part(f"{name}.weight", 0, 0.0, rows)
        b = part(f"{name}.bias", len(w), 0.0, rows)
        width = source.geometry.width if norm else w.shape[1]
        gain, shift = part(f"{norm}.weight", width, 1.0), part(f"{norm}.bias", width, 0.0)
        gain, shift = (v.repeat(w.shape[1] // width) for v in (gain, shift))
        scale = part(f"{factor}", len(w), 1.0)
        b = scale * (b + w @ shift)
        return w.mul_(scale[:, None]).mul_(gain), b

    def _norm(self, base: Base, layer: Layer, width: int) -> tuple[Tensor, Tensor]:
        """(gain, bias) [width] of the norm in front, repeated where the layer reads its output several times over."""
        if not self.rule.fold or layer.norm is None:
            return base.norm(None, width)
        gain, shift = base.norm(layer.norm, base.geometry.width)
        copies = width // base.geometry.width
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

    def _into_mean(self, rest: Tensor, weight: Tensor, zeta: Tensor, rows: slice | None = None) -> None:
        """Add a bias change ``rest`` [rows] to a weight [rows, width] along the ones direction, 0 in z of a LayerNorm.

        ``zeta = bias / gain`` of the norm is what that direction then reads; where it reads nothing, the change is
        lost, and a warning says so.
        """
        reads = self.target.geometry.family.norm == "layer" and self.into.norm is not None
        total, change = float(zeta.sum()) if reads else 0.0, squares(rest)
        if total == 0:
            return self.carried.add(self.into.name, rows, change, 0.0, 0.0, total)
        added = weight.shape[1] * change / total**2
        self.carried.add(self.into.name, rows, change, added, squares(weight), total)
        weight += (rest / total)[:, None]


def move_gain(weight: Tensor, source: Tensor, target: Tensor, delta: Tensor) -> Tensor:
    """Update of a gain that no linear layer takes up: gain_T diag(T^T diag(dgain / gain_S) T) / diag(T^T T).

    Args:
        weight: squares of T, [dS, dT].
    """
    share = weight.sum(0)
    mixed = (delta / source) @ weight
    return target * torch.where(share > 0, mixed / torch.where(share > 0, share, 1.0), 0.0)


def shared_map(t: Map, width: int, device: torch.device) -> Tensor:
    """T [dS, dT] as a matrix; of a map per head the root mean square over heads, which share their norm's gain."""
    if isinstance(t, Heads):
        return t.blocks.to(device).square().mean(0).sqrt()
    return t(torch.eye(width, dtype=torch.float64, device=device))
