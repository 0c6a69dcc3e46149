"""The operations as users call them; every check a user can trip comes first, from ``checks``."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from theseus_ext.checks import EFFECT_MASTERS, MASTERS, TOKEN_DTYPES, Mixing, check_effect, check_lists, check_space
from theseus_ext.devices import cuda_problem

__all__ = ["TOKEN_DTYPES", "Mixing", "cross_moment_", "cross_moments_", "effect_moment_", "polar", "svd", "svdvals"]

LARGEST_ON_CUDA = 128  # rows and columns, as csrc/cuda/small_svd.h


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
    4096 rows (CUDA: to a float32 second accumulator every 1024, to the masters every 32768). Same inputs, device and
    thread count give the same bytes. NaN and Inf pass through; on CUDA an Inf in float32 tokens may be NaN in cross. No
    gradient flows.

    Args:
        source: tokens [tokens_S, d_S], float64, float32, bfloat16 or float16; strides are free.
        target: tokens [tokens_T, d_T]; may differ from source in length and dtype.
        cross: [d_S, d_T], or [heads, d_S / heads, d_T / heads]: head by head; float64, contiguous, as the others.
        source_sum, source_energy: [d_S]; target_sum, target_energy: [d_T].
        source_mixing, target_mixing: the row mixing of each side, or None: row i is token i.

    Raises:
        ValueError: shapes, devices, strides or gradients that do not fit.
        TypeError: a dtype that does not fit.
        NotImplementedError: tensors on a CUDA device that no compiled kernel runs on.
        RuntimeError: an entry of row_ptr or column out of range (CPU; on CUDA such a row becomes NaN instead).
        torch.OutOfMemoryError: no memory for the kernels' workspace on the device.
    """
    masters = dict(
        cross=cross,
        source_sum=source_sum,
        target_sum=target_sum,
        source_energy=source_energy,
        target_energy=target_energy,
    )
    check_space(source, target, source_mixing, target_mixing, masters)
    _check_written(masters)
    _check_runs(source)
    _run_moments(
        torch.ops.theseus_ext.cross_moment_,
        source.device,
        _dense_columns(source),
        _dense_columns(target),
        *_contiguous(source_mixing),
        *_contiguous(target_mixing),
        **masters,
    )
    torch.autograd.graph.increment_version(tuple(masters.values()))  # the stable ABI does not


def cross_moments_(
    source: Sequence[Tensor],
    target: Sequence[Tensor],
    *,
    cross: Sequence[Tensor],
    source_sum: Sequence[Tensor],
    target_sum: Sequence[Tensor],
    source_energy: Sequence[Tensor],
    target_energy: Sequence[Tensor],
    source_mixing: Mixing | None = None,
    target_mixing: Mixing | None = None,
) -> None:
    """:func:`cross_moment_` of several spaces, as of a block: ``source[i]`` and ``target[i]`` into the i-th masters.

    On CUDA all spaces share a launch, up to 15 of them, of those that tensor cores serve; on the CPU they follow each
    other. Same arguments and errors, in lists; the row mixings are every space's, and no two masters share memory.
    """
    masters = dict(
        cross=cross,
        source_sum=source_sum,
        target_sum=target_sum,
        source_energy=source_energy,
        target_energy=target_energy,
    )
    check_lists(source, target, source_mixing, target_mixing, masters)
    if not source:
        return
    for i in range(len(source)):
        _check_written({f"{name}[{i}]": tensors[i] for name, tensors in masters.items()})
    _check_runs(source[0])
    _run_moments(
        torch.ops.theseus_ext.cross_moments_,
        source[0].device,
        [_dense_columns(tokens) for tokens in source],
        [_dense_columns(tokens) for tokens in target],
        *_contiguous(source_mixing),
        *_contiguous(target_mixing),
        **{name: list(tensors) for name, tensors in masters.items()},
    )
    torch.autograd.graph.increment_version([tensor for tensors in masters.values() for tensor in tensors])


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
    """Add the moments with which a linear layer is fitted to the effect of a tune, into float64 masters.

    With X = P_T inputs, E = P_S (source_after - source_before) and C = P_T (target_after - target_before), which have
    equally many rows, in place: ``gram += X^T X``, ``source_cross += X^T E``, ``target_cross += X^T C``; sums and sums
    of squares over rows of X (``input_...``), E (``source_...``) and C (``target_...``). Differences are formed in
    float32 (float64 where a state is) while rows are read and are never stored whole. Products, bytes and errors are
    those of :func:`cross_moment_`; no gradient flows.

    Args:
        inputs: what the layer reads, [tokens_T, d_in], float64, float32, bfloat16 or float16; strides are free.
        source_after, source_before: states of the source with and without its tune, [tokens_S, d_S], of one dtype.
        target_after, target_before: the target with and without what moved so far, [tokens_T, d_T], of one dtype.
        gram: [d_in, d_in]; source_cross: [d_in, d_S]; target_cross: [d_in, d_T]; float64, contiguous, as the others.
        input_sum, input_energy: [d_in]; source_sum, source_energy: [d_S]; target_sum, target_energy: [d_T].
        source_mixing: of the source's states; target_mixing: of the inputs and the target's states; None: row i is
            token i.

    Raises:
        ValueError, TypeError, NotImplementedError, RuntimeError, torch.OutOfMemoryError: as :func:`cross_moment_`.
    """
    masters = dict(
        gram=gram,
        source_cross=source_cross,
        target_cross=target_cross,
        input_sum=input_sum,
        source_sum=source_sum,
        target_sum=target_sum,
        input_energy=input_energy,
        source_energy=source_energy,
        target_energy=target_energy,
    )
    states = {"source": (source_after, source_before), "target": (target_after, target_before)}
    check_effect(inputs, states, {"source": source_mixing, "target": target_mixing}, masters)
    _check_written(masters)
    _check_runs(inputs)
    _run_moments(
        torch.ops.theseus_ext.effect_moment_,
        inputs.device,
        _dense_columns(inputs),
        *_alike(source_after, source_before),
        *_alike(target_after, target_before),
        *_contiguous(source_mixing),
        *_contiguous(target_mixing),
        **masters,
    )
    torch.autograd.graph.increment_version(tuple(masters.values()))  # the stable ABI does not


def svd(matrices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin singular value decompositions ``matrices = U diag(S) Vh`` of a batch, largest singular value first.

    On the CPU the matrices are shared out over torch's threads, and each is decomposed on one. Torch itself takes them
    one after the other, which leaves the other threads waiting while they are small (heads, LoRA cores; up to some
    hundred rows). Same inputs and thread count give the same bytes, wherever in memory the inputs lie; on one thread
    they are those that ``torch.linalg.svd`` gives each matrix alone, on several LAPACK may round otherwise. On CUDA
    matrices of up to 128 rows and columns go to a kernel of one-sided Jacobi rotations, a block each. Elsewhere it is
    ``torch.linalg.svd``. No gradient flows.

    Args:
        matrices: [..., m, n], float64 or float32; strides are free.

    Returns:
        U [..., m, k], S [..., k] and Vh [..., k, n] with k = min(m, n), contiguous where they are not torch's own.

    Raises:
        ValueError, TypeError: a shape or dtype that does not fit.
        torch.linalg.LinAlgError: a matrix holds NaN or Inf, or its decomposition did not converge.
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


def polar(matrices: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """Partial polar factors ``U Vh`` of a batch over singular values above ``floor`` times the largest; and all values.

    Where :func:`svd` shares out or has a kernel, so does this; on CUDA the kernel writes no vectors. Nothing is waited
    for there: what holds NaN or Inf, or did not converge, has NaN values and a map that is no partial isometry. No
    gradient flows.

    Args:
        matrices: [..., m, n], float64 or float32; strides are free.

    Returns:
        [..., m, n] and [..., min(m, n)], largest value first.

    Raises:
        ValueError, TypeError: a shape or dtype that does not fit.
        torch.linalg.LinAlgError: a matrix holds NaN or Inf, or its decomposition did not converge (not on CUDA).
    """
    if _elsewhere(matrices):
        u, s, vh = svd(matrices)
        return (u * (s > floor * s[..., :1])[..., None, :]) @ vh, s
    factors, s = _shared_out(partial(torch.ops.theseus_ext.polar, floor=floor), matrices, converged=False)
    return factors.reshape(matrices.shape), s.reshape(*matrices.shape[:-2], *s.shape[1:])


def _elsewhere(matrices: Tensor) -> bool:
    if matrices.dim() < 2:
        raise ValueError(f"matrices is {list(matrices.shape)}, expected [..., m, n]")
    if matrices.dtype not in (torch.float64, torch.float32):
        raise TypeError(f"matrices is {matrices.dtype}, expected float64 or float32")
    if matrices.is_cuda:
        return max(matrices.shape[-2:]) > LARGEST_ON_CUDA or cuda_problem(matrices.device) is not None
    return matrices.device.type != "cpu"


def _shared_out(op: Callable[[Tensor], Any], matrices: Tensor, *, converged: bool = True) -> Any:
    """``op`` of the batch, and whether it ``converged`` is asked where the op does not tell."""
    batch, size = matrices.shape[:-2], matrices.shape[-2:]
    flat = matrices.detach().reshape(batch.numel(), *size).contiguous()
    try:
        found = op(flat)
    except RuntimeError as error:
        if "allocate memory" in str(error):
            raise
        if "aten::empty" in str(error):  # the stable ABI tells which call failed, not why
            raise MemoryError(f"svd of {list(matrices.shape)}: no memory for its results") from error
        if matrices.is_cuda:
            raise
        told = str(error).splitlines()[0].rpartition(".cpp:")[2].partition(", ")[2]
        why = told or "LAPACK did not converge, or found no memory to work in"
        raise torch.linalg.LinAlgError(f"svd of {list(matrices.shape)}: {why}") from error
    if matrices.is_cuda and converged:
        _check_converged(flat, found if isinstance(found, Tensor) else found[1], matrices.shape)
    return found


def _check_converged(matrices: Tensor, s: Tensor, shape: torch.Size) -> None:
    """The kernel cannot say it otherwise: values that are not finite. Waits for it, as torch.linalg.svd does."""
    if bool(s.isfinite().all()):
        return
    first = int((~s.isfinite()).any(-1).nonzero()[0])
    finite = bool(matrices[first].isfinite().all())
    why = "did not converge, or has values beyond its dtype" if finite else "holds NaN or Inf"
    raise torch.linalg.LinAlgError(f"svd of {list(shape)}: matrix {first} of {len(matrices)} {why}")


def _run_moments(op: Callable[..., None], device: torch.device, *args: Any, **masters: Any) -> None:
    try:
        with torch.no_grad():
            op(*args, **masters)
    except RuntimeError as error:
        if device.type != "cuda" or "aten::empty" not in str(error):
            raise
        raise torch.OutOfMemoryError(f"no memory on {device} for the workspace of cross-moments") from error


def _check_written(masters: Mapping[str, Tensor]) -> None:
    for name, tensor in masters.items():
        if tensor.requires_grad:
            raise ValueError(f"{name} requires grad, but cross-moments are not differentiable; pass {name}.detach()")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tuple(tensor.stride())}; it is written in place, make it contiguous")


def _check_runs(source: Tensor) -> None:
    if source.is_cuda and (problem := cuda_problem(source.device)):
        raise NotImplementedError(f"source is on {source.device}: {problem}, or move the tensors to the CPU")


def _dense_columns(tokens: Tensor) -> Tensor:
    tokens = tokens.detach()
    return tokens if tokens.shape[1] <= 1 or tokens.stride(1) == 1 else tokens.contiguous()


def _alike(after: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """Both with unit column stride and the same row stride."""
    after, before = _dense_columns(after), _dense_columns(before)
    return (after, before) if after.stride() == before.stride() else (after.contiguous(), before.contiguous())


def _contiguous(mixing: Mixing | None) -> list[Tensor | None]:
    return [None if part is None else part.contiguous() for part in mixing or (None, None, None)]


def _mixing(row_ptr: Tensor | None, column: Tensor | None, weight: Tensor | None) -> Mixing | None:
    if row_ptr is None and column is None and weight is None:
        return None
    return row_ptr, column, weight  # type: ignore[return-value]  # checks refuse a missing column


@torch.library.register_fake("theseus_ext::cross_moment_")
def _cross_moment_fake(source: Tensor, target: Tensor, *args: Any, **masters: Tensor) -> None:
    mixings, values = _mixing(*args[:3]), dict(zip(MASTERS, args[6:], strict=False)) | masters
    check_space(source, target, mixings, _mixing(*args[3:6]), values)


@torch.library.register_fake("theseus_ext::cross_moments_")
def _cross_moments_fake(source: Sequence[Tensor], target: Sequence[Tensor], *args: Any, **masters: Any) -> None:
    mixings, values = _mixing(*args[:3]), dict(zip(MASTERS, args[6:], strict=False)) | masters
    check_lists(source, target, mixings, _mixing(*args[3:6]), values)


@torch.library.register_fake("theseus_ext::effect_moment_")
def _effect_moment_fake(inputs: Tensor, *args: Any, **masters: Tensor) -> None:
    states = {"source": (args[0], args[1]), "target": (args[2], args[3])}
    mixings = {"source": _mixing(*args[4:7]), "target": _mixing(*args[7:10])}
    check_effect(inputs, states, mixings, dict(zip(EFFECT_MASTERS, args[10:], strict=False)) | masters)


@torch.library.register_fake("theseus_ext::svdvals")
def _svdvals_fake(matrices: Tensor) -> Tensor:
    return matrices.new_empty(matrices.shape[0], min(matrices.shape[1:]))


@torch.library.register_fake("theseus_ext::svd")
def _svd_fake(matrices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    batch, m, n = matrices.shape
    k = min(m, n)
    return matrices.new_empty(batch, m, k), matrices.new_empty(batch, k), matrices.new_empty(batch, k, n)


@torch.library.register_fake("theseus_ext::polar")
def _polar_fake(matrices: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    batch, m, n = matrices.shape
    return matrices.new_empty(batch, m, n), matrices.new_empty(batch, min(m, n))


# No gradient flows: autograd looks through the ops, and the wrappers refuse masters that ask for one.
_library = torch.library.Library("theseus_ext", "IMPL")
for _op in ("cross_moment_", "cross_moments_", "effect_moment_", "svd", "svdvals", "polar"):
    _library.impl(_op, torch.library.fallthrough_kernel, "Autograd")
