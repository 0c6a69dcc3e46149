"""Which layers of the target will be fitted, and what becomes of them: decided before anything is computed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..alignment.alignment import Alignment
from ..models.geometry import Layer
from ..recipes.effect import fit_of, writers
from .adapter import Factors
from .computed import ComputedUpdate
from .fates import Computation, MovedFactors
from .fits import AsFactors, Fitted
from .fused_factors import module_in, product
from .ranks import low_rank_of, resized

Dense = Callable[[slice | None], dict[str, Tensor]]


def plan_fits(update: ComputedUpdate, alignment: Alignment, *, only_targeted: bool) -> list[str]:
    """Plan a fit for every writer that the tune's effect can reach; returns those that an adapter has no factors of.

    Args:
        only_targeted: of an adapter, only layers of the kinds that it has factors of.
    """
    recipe, adapter = alignment.recipe, update.delta.adapter
    if not recipe.fits:
        return []
    first, trained = _first_block(update, alignment), _trained(update)
    slots = {layer.slot for layer in alignment.source.layers() if layer.name in trained}
    added = []
    for layer in writers(recipe, alignment.target.layers()):
        if f"{layer.name}.weight" not in update.target or not _reached(alignment, layer.block, first):
            continue
        if adapter is not None and only_targeted and layer.slot not in slots:
            continue
        _plan(update, layer)
        own = alignment.source.counterpart(layer, alignment.blocks[layer.block])
        if own:
            update.fits.feeds[own.name] = layer.name
        if own is None or own.name not in trained:
            added.append(layer.name)
    for layer in (layer for layer in alignment.target.layers() if layer.role == "head"):
        _plan_head(update, layer.name)
    return added


def _plan_head(update: ComputedUpdate, head: str) -> None:
    """Let a fit follow what maps move of a head, where that becomes a tensor of the target."""
    weight = f"{head}.weight"
    if weight not in update.target or weight in update.new:
        return
    prior = update.computations(update.target.slots[weight].stored).get(weight)
    factored = any(module.rpartition(".")[2] == head.rpartition(".")[2] for module in update.factors)
    if prior is None or factored:
        return
    update.fits.heads[head] = prior
    needs, sources = prior.needs | {fit_of(head)}, prior.sources | {fit_of(head)}
    compute = partial(_dense, update, head, f"{head}.bias" in update.target, prior)
    for name in (weight, f"{head}.bias"):
        if name in update.target:
            update.plan(name, Computation(compute, needs, sources, prior.tiles))


def _first_block(update: ComputedUpdate, alignment: Alignment) -> int:
    """The first block of the source that an adapter changes; 0 for a full tune, whose tensors are not compared yet."""
    adapter, family = update.delta.adapter, alignment.source.family
    if adapter is None or update.tuned:
        return 0
    blocks = [family.block_of(f"{family.canonical(layer)}.") for layer in adapter.parts]
    return min((block for block in blocks if block is not None), default=alignment.source.depth)


def _reached(alignment: Alignment, b: int, first: int) -> bool:
    """Whether what the source's block ``first`` does is to be seen in or before the target's block ``b``."""
    return first == 0 or any(own is not None and own >= first for own in alignment.blocks[: b + 1])


def _trained(update: ComputedUpdate) -> set[str]:
    """Layers of the source that an adapter has factors of."""
    adapter, family = update.delta.adapter, update.source_family
    layers = adapter.parts if adapter else ()
    return {part for layer in layers for part in family.parts(family.canonical(layer))}


def _plan(update: ComputedUpdate, layer: Layer) -> None:
    """Put the fit in place of what the prior moves."""
    weight, bias = f"{layer.name}.weight", f"{layer.name}.bias"
    planned = update.computations(update.target.slots[weight].stored)
    prior = planned.get(weight)
    needs = frozenset({fit_of(layer.name)}) | (prior.needs if prior else frozenset())
    sources = frozenset({fit_of(layer.name)}) | (prior.sources if prior else frozenset())
    if update.delta.adapter is None and update.fits.rank is None:
        update.fits.planned[layer.name] = None
        compute: Dense = partial(_dense, update, layer.name, bias in update.target, prior)
        names = [weight, bias]
    else:
        compute, names = _plan_factors(update, layer, prior, needs, sources), [weight]
    computation = Computation(compute, needs, sources)
    for name in names:
        if name in update.target:
            update.plan(name, computation)


def _dense(
    update: ComputedUpdate, layer: str, bias: bool, prior: Computation | None, rows: slice | None
) -> dict[str, Tensor]:
    """The fit of a layer where one was made, else what the prior moves, else zeros."""
    if layer in update.fits.made:
        return update.fits.made[layer].dense(layer, rows)
    if prior is not None and not prior.sources <= update.unchanged:
        return prior.compute(rows)
    zeros = torch.zeros(update.target.shape(f"{layer}.weight"), dtype=torch.float64)
    return {f"{layer}.weight": zeros} | ({f"{layer}.bias": zeros[:, 0].clone()} if bias else {})


def _plan_factors(
    update: ComputedUpdate, layer: Layer, prior: Computation | None, needs: frozenset[str], sources: frozenset[str]
) -> Dense:
    """Factors of a layer in an adapter, and the product that they stand for: of the whole prior until it is fitted."""
    fits, adapter, weight = update.fits, update.delta.adapter, f"{layer.name}.weight"
    name, _ = module_in(update.target, layer.name)
    rows, columns = update.target.shape(weight)
    moved = update.factors.get(name)
    own = moved.rank if moved else int(adapter.config["r"]) if adapter else min(rows, columns)
    rank = own if fits.rank is None else min(fits.rank, rows, columns)
    scaling = moved.scaling if moved else adapter.scaling("") if adapter else 1.0
    dtypes = [moved.dtype] if moved else [factors.dtype for factors in update.factors.values()]
    dtype = dtypes[0] if dtypes else update.dtype(update.target.slots[weight].stored)
    fits.planned[layer.name] = AsFactors(rank, scaling, prior is not None and own > rank)

    def compute() -> Factors:
        made = fits.made.get(layer.name)
        if isinstance(made, Fitted) and made.factors is not None:
            return made.factors
        if moved is not None:
            return resized(moved.compute(), rank)
        a, b, _ = low_rank_of(_dense(update, layer.name, False, prior, None)[weight], rank)
        return Factors(a, b / scaling, scaling)

    def dense(rows: slice | None) -> dict[str, Tensor]:
        if layer.name in fits.done and layer.name not in fits.made:
            return product(weight, compute, rows)
        return _dense(update, layer.name, False, prior, rows)

    update.factors[name] = MovedFactors(rank, (rows, columns), dtype, scaling, compute, needs, sources)
    return dense
