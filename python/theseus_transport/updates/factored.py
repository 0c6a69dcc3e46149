"""An update as factors of at most a rank: those of an adapter cut, or of a full tune made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ..models.family import Slot
from .adapter import Factors
from .computed import ComputedUpdate
from .fates import Computation, MovedFactors
from .fused_factors import module_in
from .ranks import cut, kept, low_rank_of

RANK = 16  # of an adapter made of a full tune, unless another is asked for


def held_by_adapters(update: ComputedUpdate, name: str) -> bool:
    """Whether an adapter made of a full tune holds a canonical tensor of the target.

    It has factors of the weights of a block's linear layers, and saves heads whole, but for that over the vocabulary:
    with its embedding it may be larger than all blocks, and tied.
    """
    layer, _, part = name.rpartition(".")
    heads = {own for purpose, own in update.family.heads.items() if purpose != "vocabulary"}
    linear = {own.name for own in update.target.geometry.layers() if own.role != "head"}
    return layer in heads or (part == "weight" and layer in linear)


def at_rank(update: ComputedUpdate, rank: int) -> None:
    """Have every module of the target at most ``rank`` directions: factors that have more are cut; what a full tune
    changes gets factors. The dense update of what was cut is the product of what is left.

    What is to be fitted is left as it is: it was planned for this rank.
    """
    full = update.delta.adapter is None
    modules: dict[str, dict[str, Slot]] = {}
    for layer in update.target.geometry.layers():
        weight = f"{layer.name}.weight"
        if weight in update.into and not (full and layer.role == "head"):
            name, place = module_in(update.target, layer.name)
            modules.setdefault(name, {})[weight] = place
    for name in {**modules, **update.factors}:
        parts, moved = modules.get(name, {}), update.factors.get(name)
        if moved is None:
            moved = _made(update, parts, rank)
        elif moved.rank > rank:
            layers = [weight.removesuffix(".weight") for weight in parts] or [name]
            moved = replace(moved, rank=rank, compute=partial(_cut, update, layers, moved.compute, rank))
        else:
            continue
        update.factors[name] = moved
        computations = _computations(update, parts)
        tiles = next((one.tiles for one in computations.values()), ())
        sources = frozenset[str]().union(*(one.sources for one in computations.values()))
        shared = Computation(partial(_products, parts, moved.compute), moved.needs, sources, tiles)
        for weight in parts:
            update.plan(weight, shared)


def _computations(update: ComputedUpdate, parts: Mapping[str, Slot]) -> dict[str, Computation]:
    return {weight: update.computations(update.target.slots[weight].stored)[weight] for weight in parts}


def _made(update: ComputedUpdate, parts: Mapping[str, Slot], rank: int) -> MovedFactors:
    """Factors of a module of which a full tune changes these weights."""
    (weight, place), computations = next(iter(parts.items())), _computations(update, parts)
    rows, columns = update.target.shape(weight)
    rank = min(rank, rows * place.parts, columns)

    def compute() -> Factors:
        found = [torch.zeros(rows, columns, dtype=torch.float64)] * place.parts
        changed = {part: one for part, one in computations.items() if not one.sources <= update.unchanged}
        for part, one in changed.items():
            found[parts[part].part] = one.compute(None)[part]
        device = next((value.device for value in found if value.is_cuda), found[0].device)
        dense = found[0] if len(found) == 1 else torch.cat([value.to(device) for value in found])
        a, b, share = low_rank_of(dense, rank)
        update.fits.kept |= {part.removesuffix(".weight"): share for part in changed}
        return Factors(a, b, 1.0)

    needs, sources = (
        frozenset[str]().union(*(getattr(one, what) for one in computations.values())) for what in ("needs", "sources")
    )
    dtype = update.dtype(update.target.slots[weight].stored)
    return MovedFactors(rank, (rows * place.parts, columns), dtype, 1.0, compute, needs, sources)


def _cut(update: ComputedUpdate, layers: list[str], compute: Callable[[], Factors], rank: int) -> Factors:
    whole = compute()
    found = cut(whole, rank)
    update.fits.kept |= dict.fromkeys(layers, kept(whole, found))
    return found


def _products(parts: Mapping[str, Slot], compute: Callable[[], Factors], rows: slice | None) -> dict[str, Tensor]:
    """The update that a module's factors stand for, of every part, of ``rows`` of them where given."""
    f, found = compute(), {}
    for weight, place in parts.items():
        b = f.b.chunk(place.parts)[place.part]
        found[weight] = ((b if rows is None else b[rows]) @ f.a).mul_(f.scaling)
    return found
