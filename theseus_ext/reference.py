"""The same operations in plain torch and float64: what the C++ and CUDA versions are tested against."""

from collections.abc import Sequence

import torch
from torch import Tensor

from theseus_ext.checks import Mixing


def mix(tokens: Tensor, mixing: Mixing | None) -> Tensor:
    """Rows X = P tokens [rows, width] in float64."""
    tokens = tokens.detach().double()
    if mixing is None:
        return tokens
    row_ptr, column, weight = mixing
    entries = tokens[column] if weight is None else tokens[column] * weight[:, None]
    if row_ptr is None:
        return entries
    rows = len(row_ptr) - 1
    row = torch.repeat_interleave(torch.arange(rows, device=tokens.device), row_ptr.diff())
    return tokens.new_zeros(rows, tokens.shape[1]).index_add_(0, row, entries)


def cross_moment_(
    source: Tensor,
    target: Tensor,
    *,
    cross: Tensor,
    source_sum: Tensor,
    target_sum: Tensor,
    source_energy: Tensor,
    target_energy: Tensor,
    source_mixing: Mixing | None = None,
    target_mixing: Mixing | None = None,
) -> None:
    """What `theseus_ext.cross_moment_` computes; see there for shapes."""
    x, y = mix(source, source_mixing), mix(target, target_mixing)
    heads = cross.shape[0] if cross.dim() == 3 else 1
    cross += (
        x.unflatten(1, (heads, cross.shape[-2])).permute(1, 2, 0)
        @ y.unflatten(1, (heads, cross.shape[-1])).transpose(0, 1)
    ).view_as(cross)
    source_sum += x.sum(0)
    target_sum += y.sum(0)
    source_energy += x.square().sum(0)
    target_energy += y.square().sum(0)


def cross_moments_(
    source: Sequence[Tensor],
    target: Sequence[Tensor],
    *,
    source_mixing: Mixing | None = None,
    target_mixing: Mixing | None = None,
    **masters: Sequence[Tensor],
) -> None:
    """What `theseus_ext.cross_moments_` computes; ``masters`` are its five lists."""
    for i, (x, y) in enumerate(zip(source, target, strict=True)):
        own = {name: tensors[i] for name, tensors in masters.items()}
        cross_moment_(x, y, **own, source_mixing=source_mixing, target_mixing=target_mixing)


def effect_moment_(
    inputs: Tensor,
    source_after: Tensor,
    source_before: Tensor,
    target_after: Tensor,
    target_before: Tensor,
    *,
    gram: Tensor,
    source_cross: Tensor,
    target_cross: Tensor,
    input_sum: Tensor,
    source_sum: Tensor,
    target_sum: Tensor,
    input_energy: Tensor,
    source_energy: Tensor,
    target_energy: Tensor,
    source_mixing: Mixing | None = None,
    target_mixing: Mixing | None = None,
) -> None:
    """What `theseus_ext.effect_moment_` computes; see there for shapes."""
    x = mix(inputs, target_mixing)
    effect = mix(source_after.double() - source_before.double(), source_mixing)
    carried = mix(target_after.double() - target_before.double(), target_mixing)
    crosses, sums = (gram, source_cross, target_cross), (input_sum, source_sum, target_sum)
    energies = (input_energy, source_energy, target_energy)
    for cross, total, energy, rows in zip(crosses, sums, energies, (x, effect, carried), strict=True):
        cross += x.T @ rows
        total += rows.sum(0)
        energy += rows.square().sum(0)


def svd(matrices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What `theseus_ext.svd` computes; see there for shapes."""
    u, s, vh = torch.linalg.svd(matrices.detach().double(), full_matrices=False)
    return u, s, vh


def svdvals(matrices: Tensor) -> Tensor:
    """What `theseus_ext.svdvals` computes; see there for shapes."""
    values: Tensor = torch.linalg.svdvals(matrices.detach().double())
    return values


def polar(matrices: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """What `theseus_ext.polar` computes; see there for shapes."""
    u, s, vh = svd(matrices)
    return (u * (s > floor * s[..., :1])[..., None, :]) @ vh, s
