"""The operations with every check a user can trip: shapes, types and devices, with values and the cure."""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from theseus_ext.devices import cuda_problem

#: A sparse row mixing P in CSR: (row_ptr int64 [rows + 1] or None, column int64 [entries], weight float64 [entries] or
#: None). Without row_ptr every row has exactly one entry (a selection); without weight all weights are 1.
Mixing: TypeAlias = tuple[Tensor | None, Tensor, Tensor | None]

TOKEN_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


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
    """Add the moments of X = P_S source and Y = P_T target, which have equally many rows, into float64 masters.

    In place: ``cross += X^T Y``, ``source_sum += sum(X)``, ``source_energy += sum(X ** 2)``, sums over rows, and so for
    the target. Products are taken in float32 (float64 if either input is) and added to the masters at least every
    4096 rows (CUDA: 1024). Same inputs, device and thread count give the same bytes. NaN and Inf pass through. No
    gradient flows.

    Args:
        source: tokens [tokens_S, d_S], float64, float32, bfloat16 or float16; strides are free.
        target: tokens [tokens_T, d_T]; may differ from source in length and dtype.
        cross: [d_S, d_T]; source_sum, source_energy: [d_S]; target_sum, target_energy: [d_T]; float64, contiguous.
        source_mixing, target_mixing: the row mixing of each side, or None: row i is token i.

    Raises:
        ValueError: shapes, devices, strides or gradients that do not fit.
        TypeError: a dtype that does not fit.
        NotImplementedError: tensors on a CUDA device that no compiled kernel runs on.
        RuntimeError: an entry of row_ptr or column out of range (CPU; on CUDA such a row becomes NaN instead).
    """
    outputs = dict(
        cross=cross,
        source_sum=source_sum,
        target_sum=target_sum,
        source_energy=source_energy,
        target_energy=target_energy,
    )
    _check(source, target, source_mixing, target_mixing, **outputs)
    for name, tensor in outputs.items():
        if tensor.requires_grad:
            raise ValueError(f"{name} requires grad, but cross_moment_ is not differentiable; pass {name}.detach()")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tuple(tensor.stride())}; it is written in place, make it contiguous")
    if source.is_cuda and (problem := cuda_problem(source.device)):
        raise NotImplementedError(f"source is on {source.device}: {problem}, or move the tensors to the CPU")
    with torch.no_grad():
        torch.ops.theseus_ext.cross_moment_(
            _dense_columns(source),
            _dense_columns(target),
            *_contiguous(source_mixing),
            *_contiguous(target_mixing),
            **outputs,
        )
    torch.autograd.graph.increment_version(tuple(outputs.values()))  # the stable ABI does not


def svd(matrices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin singular value decompositions ``matrices = U diag(S) Vh`` of a batch, largest singular value first.

    On the CPU the matrices are shared out over torch's threads and each is decomposed on one: bit for bit what
    ``torch.linalg.svd`` gives it on one thread, whatever the batch and the thread count. Torch itself takes them one
    after the other, which leaves the other threads waiting while they are small (heads, LoRA cores; up to some hundred
    rows). On other devices it is ``torch.linalg.svd``. No gradient flows.

    Args:
        matrices: [..., m, n], float64 or float32; strides are free.

    Returns:
        U [..., m, k], S [..., k] and Vh [..., k, n] with k = min(m, n), contiguous on the CPU.

    Raises:
        ValueError, TypeError: a shape or dtype that does not fit.
        torch.linalg.LinAlgError: a matrix holds NaN or Inf, or LAPACK's divide and conquer did not converge.
    """
    if _elsewhere(matrices):
        u, s, vh = torch.linalg.svd(matrices.detach(), full_matrices=False)
        return u, s, vh
    u, s, vh = _shared_out(torch.ops.theseus_ext.svd, matrices)
    batch = matrices.shape[:-2]
    return u.reshape(*batch, *u.shape[1:]), s.reshape(*batch, *s.shape[1:]), vh.reshape(*batch, *vh.shape[1:])


def svdvals(matrices: Tensor) -> Tensor:
    """Singular values [..., k] of a batch, largest first: :func:`svd` without vectors, at a third of the work."""
    if _elsewhere(matrices):
        values: Tensor = torch.linalg.svdvals(matrices.detach())
        return values
    s = _shared_out(torch.ops.theseus_ext.svdvals, matrices)
    batched: Tensor = s.reshape(*matrices.shape[:-2], *s.shape[1:])
    return batched


def _elsewhere(matrices: Tensor) -> bool:
    if matrices.dim() < 2:
        raise ValueError(f"matrices is {list(matrices.shape)}, expected [..., m, n]")
    if matrices.dtype not in (torch.float64, torch.float32):
        raise TypeError(f"matrices is {matrices.dtype}, expected float64 or float32")
    return matrices.device.type != "cpu"


def _shared_out(op: Callable[[Tensor], Any], matrices: Tensor) -> Any:
    batch, size = matrices.shape[:-2], matrices.shape[-2:]
    try:
        return op(matrices.detach().reshape(batch.numel(), *size).contiguous())
    except RuntimeError as error:
        if "allocate memory" in str(error):
            raise
        if "aten::empty" in str(error):  # the stable ABI tells which call failed, not why
            raise MemoryError(f"svd of {list(matrices.shape)}: no memory for its results") from error
        told = str(error).splitlines()[0].rpartition(".cpp:")[2].partition(", ")[2]
        why = told or "LAPACK did not converge, or found no memory to work in"
        raise torch.linalg.LinAlgError(f"svd of {list(matrices.shape)}: {why}") from error


def _dense_columns(tokens: Tensor) -> Tensor:
    tokens = tokens.detach()
    return tokens if tokens.shape[1] <= 1 or tokens.stride(1) == 1 else tokens.contiguous()


def _contiguous(mixing: Mixing | None) -> list[Tensor | None]:
    return [None if part is None else part.contiguous() for part in mixing or (None, None, None)]


def _row_count(name: str, tokens: Tensor, mixing: Mixing | None) -> int:
    if mixing is None:
        return tokens.shape[0]
    row_ptr, column, weight = mixing
    if column is None:
        raise ValueError(f"{name} mixing has no column; pass None instead of the tuple to take the tokens as they are")
    for part, tensor, dtype in (
        ("row_ptr", row_ptr, torch.int64),
        ("column", column, torch.int64),
        ("weight", weight, torch.float64),
    ):
        if tensor is None:
            continue
        if tensor.dtype != dtype:
            raise TypeError(f"{name} {part} is {tensor.dtype}, expected {dtype}")
        if tensor.dim() != 1:
            raise ValueError(f"{name} {part} is {list(tensor.shape)}, expected a vector")
        if tensor.device != tokens.device:
            raise ValueError(f"{name} {part} is on {tensor.device} but {name} is on {tokens.device}")
    if weight is not None and weight.shape != column.shape:
        raise ValueError(f"{name} weight has {len(weight)} entries but column has {len(column)}")
    if row_ptr is None:
        return column.shape[0]
    if row_ptr.shape[0] == 0:
        raise ValueError(f"{name} row_ptr is empty, expected rows + 1 elements")
    return row_ptr.shape[0] - 1


def _check(
    source: Tensor,
    target: Tensor,
    source_mixing: Mixing | None,
    target_mixing: Mixing | None,
    *,
    cross: Tensor,
    source_sum: Tensor,
    target_sum: Tensor,
    source_energy: Tensor,
    target_energy: Tensor,
) -> None:
    for name, tokens in (("source", source), ("target", target)):
        if tokens.dim() != 2:
            raise ValueError(f"{name} is {list(tokens.shape)}, expected [tokens, width]; flatten leading dimensions")
        if tokens.dtype not in TOKEN_DTYPES:
            raise TypeError(f"{name} is {tokens.dtype}, expected float64, float32, bfloat16 or float16")
    rows_source, rows_target = _row_count("source", source, source_mixing), _row_count("target", target, target_mixing)
    if rows_source != rows_target:
        raise ValueError(f"source has {rows_source} rows but target has {rows_target}; mix one side to match the other")
    width_source, width_target = source.shape[1], target.shape[1]
    if cross.shape != (width_source, width_target):
        raise ValueError(
            f"cross is {list(cross.shape)} but source has width {width_source} and target width {width_target}"
        )
    vectors = (
        ("source_sum", source_sum, "source", width_source),
        ("target_sum", target_sum, "target", width_target),
        ("source_energy", source_energy, "source", width_source),
        ("target_energy", target_energy, "target", width_target),
    )
    for name, vector, side, width in vectors:
        if vector.shape != (width,):
            raise ValueError(f"{name} is {list(vector.shape)} but {side} has width {width}")
    for name, tensor in (("target", target), ("cross", cross), *(vector[:2] for vector in vectors)):
        if name != "target" and tensor.dtype != torch.float64:
            raise TypeError(f"{name} is {tensor.dtype}, expected torch.float64: moments accumulate in float64")
        if tensor.device != source.device:
            raise ValueError(f"{name} is on {tensor.device} but source is on {source.device}")


@torch.library.register_fake("theseus_ext::cross_moment_")
def _cross_moment_fake(
    source: Tensor,
    target: Tensor,
    source_row_ptr: Tensor | None,
    source_column: Tensor | None,
    source_weight: Tensor | None,
    target_row_ptr: Tensor | None,
    target_column: Tensor | None,
    target_weight: Tensor | None,
    cross: Tensor,
    source_sum: Tensor,
    target_sum: Tensor,
    source_energy: Tensor,
    target_energy: Tensor,
) -> None:
    _check(
        source,
        target,
        _mixing(source_row_ptr, source_column, source_weight),
        _mixing(target_row_ptr, target_column, target_weight),
        cross=cross,
        source_sum=source_sum,
        target_sum=target_sum,
        source_energy=source_energy,
        target_energy=target_energy,
    )


def _mixing(row_ptr: Tensor | None, column: Tensor | None, weight: Tensor | None) -> Mixing | None:
    if row_ptr is None and column is None and weight is None:
        return None
    return row_ptr, column, weight  # type: ignore[return-value]  # _check refuses a missing column


@torch.library.register_fake("theseus_ext::svdvals")
def _svdvals_fake(matrices: Tensor) -> Tensor:
    return matrices.new_empty(matrices.shape[0], min(matrices.shape[1:]))


@torch.library.register_fake("theseus_ext::svd")
def _svd_fake(matrices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    batch, m, n = matrices.shape
    k = min(m, n)
    return matrices.new_empty(batch, m, k), matrices.new_empty(batch, k), matrices.new_empty(batch, k, n)


# No gradient flows: autograd looks through the ops, and cross_moment_'s wrapper refuses masters that ask for one.
_library = torch.library.Library("theseus_ext", "IMPL")
for _op in ("cross_moment_", "svd", "svdvals"):
    _library.impl(_op, torch.library.fallthrough_kernel, "Autograd")
