"""Which layers of the target will be fitted, and what becomes of them: decided before anything is computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ..alignment.alignment import Alignment
from ..models.geometry import Layer
from ..recipes.effect import fit_of, writers
from .adapter import Factors
from .computed import ComputedUpdate
from .fates import Computation, MovedFactors
from .fused_factors import module_in
from .ranks import cut

Dense = Callable[[slice | None], dict[str, Tensor]]


def plan_fits(update: ComputedUpdate, alignment: Alignment, *, only_targeted: bool) -> list[str]:
    """Plan a fit for every writer that the tune's effect can reach; returns those that the tune itself did not change.

    Args:
        only_targeted: of an adapter, only layers of the kinds that it has factors of.
    """
    recipe, adapter = alignment.recipe, update.delta.adapter
    if not recipe.fits:
        return []
    first = _first_block(update, alignment)
    added = []
    for layer in writers(recipe, alignment.target.layers()):
        if f"{layer.name}.weight" not in update.target or not _reached(alignment, layer.block, first):
            continue
        if adapter is not None and only_targeted and layer.slot not in _slots(update, alignment):
            continue
        if _plan(update, layer):
            added.append(layer.name)
    return added


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


def _slots(update: ComputedUpdate, alignment: Alignment) -> set[str]:
    adapter, family = update.delta.adapter, alignment.source.family
    assert adapter is not None
    names = {part for layer in adapter.parts for part in family.parts(family.canonical(layer))}
    return {layer.slot for layer in alignment.source.layers() if layer.name in names}


def _plan(update: ComputedUpdate, layer: Layer) -> bool:
    """Put the fit in place of what the prior moves; returns whether there was no prior."""
    weight, bias = f"{layer.name}.weight", f"{layer.name}.bias"
    planned = update.computations(update.target.slots[weight].stored)
    prior = planned.get(weight)
    needs = frozenset({fit_of(layer.name)}) | (prior.needs if prior else frozenset())
    sources = frozenset({fit_of(layer.name)}) | (prior.sources if prior else frozenset())
    update.fits.planned[layer.name] = None
    compute: Dense = partial(_dense, update, layer.name, bias in update.target, prior)
    if update.delta.adapter is not None:
        compute = _plan_factors(update, layer, needs)
    computation = Computation(compute, needs, sources)
    for name in (weight, bias) if update.delta.adapter is None else (weight,):
        if name in update.target:
            update.plan(name, computation)
    return prior is None


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


def _plan_factors(update: ComputedUpdate, layer: Layer, needs: frozenset[str]) -> Dense:
    """Factors of an adapter's layer, and the product that they stand for."""
    adapter = update.delta.adapter
    assert adapter is not None
    name, _ = module_in(update.target, layer.name)
    shape = update.target.shape(f"{layer.name}.weight")
    prior = update.factors.get(name)
    rank = update.fits.rank or (prior.rank if prior else int(adapter.config["r"]))
    dtype = prior.dtype if prior else next((f.dtype for f in update.factors.values()), torch.float32)
    update.fits.planned[layer.name] = rank

    def compute() -> Factors:
        made = update.fits.made.get(layer.name)
        if made is not None:
            assert made.factors is not None
            return made.factors
        if prior is not None:
            return prior.compute()
        a, b = torch.zeros(rank, shape[1], dtype=torch.float64), torch.zeros(shape[0], rank, dtype=torch.float64)
        return Factors(a, b, update.fits.scaling)

    scaling = prior.scaling if prior else update.fits.scaling
    update.factors[name] = MovedFactors(rank, (shape[0], shape[1]), dtype, scaling, compute, needs)

    def dense(rows: slice | None) -> dict[str, Tensor]:
        if layer.name in update.fits.made:
            return update.fits.made[layer.name].dense(layer.name, rows)
        f = compute()
        return {f"{layer.name}.weight": ((f.b if rows is None else f.b[rows]) @ f.a).mul_(f.scaling)}

    return dense


def _cut(compute: Callable[[], Factors], rank: int) -> Factors:
    found: Factors = cut(compute(), rank)
    return found


def at_rank(update: ComputedUpdate, rank: int) -> None:
    """Cut the factors of every layer that has more to ``rank``."""
    for name, moved in update.factors.items():
        if moved.rank > rank:
            update.factors[name] = replace(moved, rank=rank, compute=partial(_cut, moved.compute, rank))
