"""Cross-moments between two models' activations: they add, and follow linear layers and norms without the data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import theseus_ext

from ..errors import InputRefused
from .row_mixing import RowMixing


@dataclass
class CrossMoment:
    """Sums over tokens of two activations x_S [tokens, dS] and x_T [tokens, dT], in float64.

    Attributes:
        cross: [dS, dT], sum of x_S^T x_T.
        source_sum, target_sum: [dS] and [dT].
        source_energy, target_energy: [dS] and [dT], sums of squares per feature; NaN where they were not observed
            (moments derived through a linear layer).
        count: number of tokens.
    """

    cross: Tensor
    source_sum: Tensor
    target_sum: Tensor
    source_energy: Tensor
    target_energy: Tensor
    count: int = 0

    @classmethod
    def zeros(cls, source: int, target: int, device: torch.device | str = "cpu") -> CrossMoment:
        def zero(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        return cls(zero(source, target), zero(source), zero(target), zero(source), zero(target))

    def update(
        self,
        source: Tensor,
        target: Tensor,
        source_mixing: RowMixing | None = None,
        target_mixing: RowMixing | None = None,
    ) -> None:
        """Add tokens: ``source`` [tokens_S, dS] and ``target`` [tokens_T, dT], each through its row mixing if any."""
        theseus_ext.cross_moment_(
            source,
            target,
            cross=self.cross,
            source_sum=self.source_sum,
            target_sum=self.target_sum,
            source_energy=self.source_energy,
            target_energy=self.target_energy,
            source_mixing=None if source_mixing is None else source_mixing.csr,
            target_mixing=None if target_mixing is None else target_mixing.csr,
        )
        self.count += len(target) if target_mixing is None else target_mixing.rows

    def to(self, device: torch.device | str) -> CrossMoment:
        """This moment with its sums on ``device``."""
        tensors = {f.name: getattr(self, f.name).to(device) for f in fields(self) if f.name != "count"}
        return CrossMoment(**tensors, count=self.count)

    @classmethod
    def joined(cls, tiles: Sequence[CrossMoment]) -> CrossMoment:
        """The moment whose target features are those of all tiles, one after the other, of the same tokens."""
        own = tiles[0]
        cross, sums, energies = (
            torch.cat([getattr(t, part) for t in tiles], -1) for part in ("cross", "target_sum", "target_energy")
        )
        return cls(cross, own.source_sum, sums, own.source_energy, energies, own.count)

    def __add__(self, other: CrossMoment) -> CrossMoment:
        """Moments of the union of two sets of tokens."""
        if self.cross.shape != other.cross.shape:
            raise InputRefused(f"cannot merge a moment {list(self.cross.shape)} with {list(other.cross.shape)}")
        return CrossMoment(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def augmented(self) -> Tensor:
        """[dS + 1, dT + 1]: the cross-moment of [x 1]; sums in the last column and row, the count in the corner."""
        top = torch.cat([self.cross, self.source_sum[:, None]], 1)
        bottom = torch.cat([self.target_sum, self.target_sum.new_tensor([float(self.count)])])
        return torch.cat([top, bottom[None]])

    @classmethod
    def _from_augmented(cls, m: Tensor, count: int) -> CrossMoment:
        nan_source, nan_target = (torch.full_like(v, torch.nan) for v in (m[:-1, -1], m[-1, :-1]))
        return cls(m[:-1, :-1], m[:-1, -1], m[-1, :-1], nan_source, nan_target, count)

    def derive(self, source: Tensor, target: Tensor) -> CrossMoment:
        """Moment of the outputs of ``y = W x + b``, without the data: M_out = W^_S M W^_T^T (energies unknown).

        Args:
            source: [out_S, dS + 1], the augmented weight [W b] of the source layer.
            target: [out_T, dT + 1], the augmented weight of the target layer.
        """
        return self._from_augmented(
            affine(source.to(self.cross)) @ self.augmented @ affine(target.to(self.cross)).T, self.count
        )

    def unfold(
        self, source: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor], norm: str | None = None
    ) -> CrossMoment:
        """Moment of ``z`` where this one is of ``x = z * gain + bias``.

        Args:
            source, target: (gain, bias) of each side, both [d]; norm: its name, for errors.

        Raises:
            InputRefused: a gain is zero, so z cannot be read back from x.
        """
        n = float(self.count)
        (gain_s, bias_s), (gain_t, bias_t) = (tuple(v.to(self.cross) for v in side) for side in (source, target))
        for side, gain in (("source", gain_s), ("target", gain_t)):
            if bool((gain == 0).any()):
                feature = int((gain == 0).nonzero()[0])
                raise InputRefused(
                    f"{norm or 'a norm'} of the {side} has gain 0 at feature {feature}; nothing passes there"
                )
        sum_s, sum_t = self.source_sum - n * bias_s, self.target_sum - n * bias_t
        cross = self.cross - bias_s[:, None] * self.target_sum - sum_s[:, None] * bias_t
        energy_s = self.source_energy - 2 * bias_s * self.source_sum + n * bias_s**2
        energy_t = self.target_energy - 2 * bias_t * self.target_sum + n * bias_t**2
        return CrossMoment(
            cross / gain_s[:, None] / gain_t,
            sum_s / gain_s,
            sum_t / gain_t,
            energy_s / gain_s**2,
            energy_t / gain_t**2,
            self.count,
        )

    def centred(self) -> CrossMoment:
        """The moment about both means; its sums are zero."""
        n = max(self.count, 1)
        return CrossMoment(
            self.cross - self.source_sum[:, None] * (self.target_sum / n),
            torch.zeros_like(self.source_sum),
            torch.zeros_like(self.target_sum),
            self.source_energy - self.source_sum**2 / n,
            self.target_energy - self.target_sum**2 / n,
            self.count,
        )

    def save(self, path: Path) -> None:
        tensors = {f.name: getattr(self, f.name).contiguous() for f in fields(self) if f.name != "count"}
        save_file({**tensors, "count": torch.tensor(self.count)}, path)

    @classmethod
    def load(cls, path: Path) -> CrossMoment:
        tensors = load_file(path)
        return cls(**{**tensors, "count": int(tensors["count"])})  # type: ignore[arg-type]


@dataclass
class Energy:
    """Energies of a layer's output on both sides, float64: per feature, and in total with each token's mean removed.

    Attributes:
        source, target: [out_S] and [out_T], sums of squares over tokens.
        totals: [2], of source and target after removing the mean over features of every token; what a LayerNorm reads.
    """

    source: Tensor
    target: Tensor
    totals: Tensor

    @classmethod
    def zeros(cls, source: int, target: int, device: torch.device | str = "cpu") -> Energy:
        return cls(*(torch.zeros(size, dtype=torch.float64, device=device) for size in (source, target, 2)))

    def to(self, device: torch.device | str) -> Energy:
        """These energies with their sums on ``device``."""
        return Energy(self.source.to(device), self.target.to(device), self.totals.to(device))

    @property
    def centred(self) -> tuple[float, float]:
        """The two :attr:`totals`, source first, as numbers: waits for the device."""
        own, other = self.totals.tolist()
        return own, other

    def update(
        self,
        source: Tensor,
        target: Tensor,
        source_mixing: RowMixing | None = None,
        target_mixing: RowMixing | None = None,
    ) -> None:
        """Add tokens: ``source`` [tokens_S, out_S], ``target`` [tokens_T, out_T], each through its mixing if any."""
        self.add(0, source, source_mixing)
        self.add(1, target, target_mixing)

    def add(self, side: int, rows: Tensor, mixing: RowMixing | None = None) -> None:
        """Add ``rows`` [tokens, out] of one side, 0 for the source, through a mixing if any: no energy needs both."""
        add_energies([self], side, [rows], mixing)

    def __add__(self, other: Energy) -> Energy:
        return Energy(self.source + other.source, self.target + other.target, self.totals + other.totals)


def add_energies(energies: Sequence[Energy], side: int, rows: Sequence[Tensor], mixing: RowMixing | None) -> None:
    """:meth:`Energy.add` of several outputs at once; nothing waits for the device."""
    sums = [x.sum(1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32)) for x in rows]
    moments = [CrossMoment.zeros(x.shape[1], 1, x.device) for x in rows]
    update_together(moments, list(zip(rows, sums, strict=True)), (mixing, mixing))
    for energy, x, moment in zip(energies, rows, moments, strict=True):
        (energy.source, energy.target)[side].add_(moment.source_energy)
        energy.totals[side : side + 1] += moment.source_energy.sum() - moment.target_energy / x.shape[1]


def update_together(
    moments: Sequence[CrossMoment], rows: Sequence[tuple[Tensor, Tensor]], mixings: Sequence[RowMixing | None]
) -> None:
    """:meth:`CrossMoment.update` of several spaces at once, as of a block: on a GPU one launch serves all of them.

    Args:
        rows: (source, target) of each; mixings: of both sides, the same for all.
    """
    parts = ("cross", "source_sum", "target_sum", "source_energy", "target_energy")
    source, target = (None if mixing is None else mixing.csr for mixing in mixings)
    theseus_ext.cross_moments_(
        [own for own, _ in rows],
        [other for _, other in rows],
        **{part: [getattr(moment, part) for moment in moments] for part in parts},
        source_mixing=source,
        target_mixing=target,
    )
    for moment, (_, other) in zip(moments, rows, strict=True):
        moment.count += len(other) if mixings[1] is None else mixings[1].rows


Grams = dict[int, CrossMoment]
"""Of a pair of activations: by side, 0 for the source, its moment with itself."""


def affine(weight: Tensor) -> Tensor:
    """W^ = [W b; 0 1] from the augmented weight [W b] [out, in + 1]."""
    last = weight.new_zeros(1, weight.shape[1])
    last[0, -1] = 1
    return torch.cat([weight, last])
