"""Which source block feeds which target block, where the two models have not the same number of them.

Blocks are compared by what they add to the residual, u = output - input, on a few tokens: nuc(U_S^T U_T) / (|U_S|
|U_T|) is 1 where two updates are equal up to a rotation and a scale. The increasing pairing with the largest sum of it
is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..activations.pairing_tokens import mixings
from ..activations.row_mixing import RowMixing
from ..errors import InputRefused, NumericalError
from ..models.forward import Batch, backbone, hidden_of, in_evaluation, run_model, state_of
from ..models.geometry import Geometry
from ..models.pair import Pair

TOKENS = 256  # rows compared, spread over all batches: 2 x depth x width x 1 KiB are kept


def pair_blocks(
    source: nn.Module, target: nn.Module, geometries: Pair[Geometry], batches: Sequence[Pair[Batch]]
) -> list[int | None]:
    """For every target block the source block that feeds it, or None; blocks that add nothing are never paired.

    Args:
        batches: calibration batches (source, target); every one is run once.
    """
    updates: list[list[list[Tensor]]] = [[[] for _ in range(la.depth)] for la in geometries]
    with in_evaluation(source, target):
        for pair in batches:
            rows = mixings(geometries, *pair)
            share = -(-TOKENS // len(batches))
            for model, geometry, batch, mixing, kept in zip(
                (source, target), geometries, pair, rows, updates, strict=True
            ):
                for b, update in enumerate(block_updates(model, geometry, batch, partial(_spread, mixing, share))):
                    kept[b].append(update)
    return _paired(updates)


def _paired(updates: Sequence[Sequence[Sequence[Tensor]]]) -> list[int | None]:
    joined = [[torch.cat(list(parts)) for parts in side] for side in updates]
    if not all(bool(u.isfinite().all()) for side in joined for u in side):
        raise NumericalError("blocks put NaN or Inf into the residual; check both bases and the calibration")
    return increasing(similarities(*joined))


def block_updates(model: nn.Module, geometry: Geometry, batch: Batch, keep: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """What each block adds to the residual in one forward pass, one tensor a block, first to last.

    Args:
        keep: is given each update [samples * tokens, width] and returns what of it is kept.
    """
    inside = backbone(model, geometry)
    found: dict[int, Tensor] = {}

    def add(b: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        found[b] = keep((state_of(result) - hidden_of(args, kwargs)).detach().flatten(0, -2))

    spelled = geometry.family.spelled(name for name, _ in inside.named_modules())
    with ExitStack() as stack, torch.no_grad():
        for b in range(geometry.depth):
            module = inside.get_submodule(spelled[f"{geometry.family.blocks}.{b}"])
            stack.callback(module.register_forward_hook(partial(add, b), with_kwargs=True).remove)
        run_model(inside, geometry, batch, next(inside.parameters()).device)
    if unseen := set(range(geometry.depth)) - found.keys():
        raise InputRefused(f"block {min(unseen)} of {type(model).__name__} did not run; is its depth the config's?")
    return [found[b] for b in range(geometry.depth)]


def similarities(source: Sequence[Tensor], target: Sequence[Tensor]) -> Tensor:
    """nuc(U_S^T U_T) / (|U_S| |U_T|) of all pairs, float64 [depth_S, depth_T]; 0 for an update without energy."""
    small = [[_triangle(u.double()) for u in side] for side in (source, target)]
    norms = [torch.stack([u.norm() for u in side]) for side in small]
    nuclear = torch.stack([torch.stack([torch.linalg.matrix_norm(s @ t.T, "nuc") for t in small[1]]) for s in small[0]])
    size = norms[0][:, None] * norms[1]
    return torch.where(size > 0, nuclear / size.clamp(min=torch.finfo(size.dtype).tiny), 0.0)


def increasing(scores: Tensor) -> list[int | None]:
    """The increasing pairing of rows with columns that maximises the sum of scores: each column's row, or None."""
    rows, columns = scores.shape
    best = torch.zeros(rows + 1, columns + 1, dtype=torch.float64)
    for i in range(rows):
        for j in range(columns):
            best[i + 1, j + 1] = max(best[i, j] + scores[i, j], best[i, j + 1], best[i + 1, j])
    found: list[int | None] = [None] * columns
    i, j = rows, columns
    while i and j:
        if best[i, j] == best[i, j - 1]:
            j -= 1
        elif best[i, j] == best[i - 1, j]:
            i -= 1
        else:
            i, j = i - 1, j - 1
            found[j] = i
    return found


def _spread(mixing: RowMixing | None, count: int, update: Tensor) -> Tensor:
    """``count`` rows from first to last, of those both models have."""
    mixed = update if mixing is None else mixing.to(update.device)(update)
    return mixed[torch.linspace(0, len(mixed) - 1, min(len(mixed), count)).long()].cpu()


def _triangle(update: Tensor) -> Tensor:
    """U^T [width, tokens], or R [tokens, tokens] of U^T = Q R where that is smaller: products keep their norms."""
    return torch.linalg.qr(update.T).R if update.shape[1] > len(update) else update.T
