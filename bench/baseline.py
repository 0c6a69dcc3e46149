"""The honest baseline: what one writes in plain torch for the same moments at the same accuracy."""

import warnings

import torch
from torch import Tensor

CHUNK = 4096  # rows per float32 product; the sums over chunks are float64


def mix(tokens: Tensor, mixing: tuple | None, dtype: torch.dtype) -> Tensor:
    """Rows X = P tokens [rows, width]: index for a selection, a sparse product for a weighted mixing."""
    if mixing is None:
        return tokens.to(dtype)
    row_ptr, column, weight = mixing
    if row_ptr is None and weight is None:
        return tokens.index_select(0, column).to(dtype)
    if row_ptr is None:
        row_ptr = torch.arange(len(column) + 1, device=column.device)
    weight = torch.ones(len(column), device=column.device) if weight is None else weight
    warnings.filterwarnings("ignore", message="Sparse")  # torch announces a beta and its unchecked invariants
    matrix = torch.sparse_csr_tensor(row_ptr, column, weight.to(dtype), (len(row_ptr) - 1, len(tokens)))
    return matrix @ tokens.to(dtype)


def _selects(mixing: tuple | None) -> bool:
    return mixing is None or (mixing[0] is None and mixing[2] is None)


def _product(x: Tensor, y: Tensor, heads: int | None) -> Tensor:
    """x^T y, or head by head, in float32 where the inputs are halves."""
    wide = dict(out_dtype=torch.float32) if x.dtype in (torch.bfloat16, torch.float16) else {}
    if heads is None:
        return torch.mm(x.T, y, **wide)
    x, y = (z.view(len(z), heads, z.shape[1] // heads).transpose(0, 1) for z in (x, y))
    return torch.bmm(x.mT, y, **wide)


def cross_moment_(
    source: Tensor,
    target: Tensor,
    *,
    cross: Tensor,
    source_sum: Tensor,
    target_sum: Tensor,
    source_energy: Tensor,
    target_energy: Tensor,
    source_mixing: tuple | None = None,
    target_mixing: tuple | None = None,
) -> None:
    """The same contract as `theseus_ext.cross_moment_`."""
    dtype = torch.float64 if torch.float64 in (source.dtype, target.dtype) else torch.float32
    if source.is_cuda and source.dtype == target.dtype and _selects(source_mixing) and _selects(target_mixing):
        dtype = source.dtype  # tensor cores take halves as they are, with sums in float32
    x, y = mix(source, source_mixing, dtype), mix(target, target_mixing, dtype)
    heads = cross.shape[0] if cross.dim() == 3 else None
    for x_chunk, y_chunk in zip(x.split(CHUNK), y.split(CHUNK), strict=True):
        cross += _product(x_chunk, y_chunk, heads)
        for rows, total, energy in ((x_chunk, source_sum, source_energy), (y_chunk, target_sum, target_energy)):
            wide = rows.to(torch.float64, copy=True)  # faster than sum(dtype=...) and vector_norm(dtype=...)
            total += wide.sum(0)
            energy += wide.square_().sum(0)


def effect_moment_(
    inputs: Tensor,
    source_after: Tensor,
    source_before: Tensor,
    target_after: Tensor,
    target_before: Tensor,
    *,
    source_mixing: tuple | None = None,
    target_mixing: tuple | None = None,
    **masters: Tensor,
) -> None:
    """The same contract as `theseus_ext.effect_moment_`: differences in float32, then as :func:`cross_moment_`."""
    nothing = torch.zeros(1, dtype=inputs.dtype, device=inputs.device)
    sides = {
        "input": (inputs, nothing, target_mixing, "gram"),
        "source": (source_after, source_before, source_mixing, "source_cross"),
        "target": (target_after, target_before, target_mixing, "target_cross"),
    }
    for name, (after, before, mixing, cross) in sides.items():
        dtype = torch.float64 if torch.float64 in (inputs.dtype, after.dtype) else torch.float32
        x, y = mix(inputs, target_mixing, dtype), mix(after.to(dtype) - before.to(dtype), mixing, dtype)
        for x_chunk, y_chunk in zip(x.split(CHUNK), y.split(CHUNK), strict=True):
            masters[cross].add_(_product(x_chunk, y_chunk, None))
            wide = y_chunk.to(torch.float64, copy=True)
            masters[f"{name}_sum"].add_(wide.sum(0))
            masters[f"{name}_energy"].add_(wide.square_().sum(0))


def move(tuned: Tensor, base: Tensor, t_out: Tensor, t_in: Tensor) -> Tensor:
    """T_out^T (tuned - base) T_in [out_T, in_T] in float64, products in the order that takes fewer flops."""
    return torch.linalg.multi_dot([t_out.mT, tuned.double() - base.double(), t_in])


def move_factors(a: Tensor, b: Tensor, t_out: Tensor, t_in: Tensor) -> tuple[Tensor, Tensor]:
    """(A T_in [rank, in_T], T_out^T B [out_T, rank]) in float64."""
    return a.double() @ t_in, t_out.mT @ b.double()
