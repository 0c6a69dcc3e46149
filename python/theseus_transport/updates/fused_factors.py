"""Moved LoRA factors of layers that the target keeps in one fused layer, put together as factors of that layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel

from ..models.base import Base
from ..models.families import FAMILIES
from ..models.family import Slot
from .adapter import Factors
from .fates import MovedFactors


@dataclass(frozen=True)
class Piece:
    """The moved factors of one layer of the target.

    Attributes:
        spelled: the adapter's layer it comes from; pieces of one layer share their A.
        place: which part of the target's module it is.
        rank, dtype, scaling: of the adapter's factors.
        shape: [out, in] of the target's layer.
        compute: the moved factors.
        needs: the rule they move by.
    """

    spelled: str
    place: Slot
    rank: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    scaling: float
    compute: Callable[[], Factors]
    needs: str = ""


def fused(pieces: Sequence[Piece]) -> MovedFactors:
    """One module's factors, its pieces one below the other in B.

    Pieces of one layer of the adapter have one A, and the rank stays; pieces of several (separate q and v that become
    parts of a fused qkv) stack their A, and ranks add.
    """
    groups: dict[str, list[Piece]] = {}
    for piece in pieces:
        groups.setdefault(piece.spelled, []).append(piece)
    first, parts = pieces[0], pieces[0].place.parts
    rank = sum(group[0].rank for group in groups.values())
    rows, columns = first.shape

    def compute() -> Factors:
        a, b, start = torch.zeros(rank, columns, dtype=torch.float64), torch.zeros(rows * parts, rank).double(), 0
        for group in groups.values():
            span = slice(start, start + group[0].rank)
            for piece in group:
                moved, top = piece.compute(), piece.place.part * rows
                a[span] = moved.a
                b[top : top + rows, span] = moved.b * (piece.scaling / first.scaling)
            start = span.stop
        return Factors(a, b, first.scaling)

    needs = frozenset(piece.needs for piece in pieces)
    return MovedFactors(rank, (rows * parts, columns), first.dtype, first.scaling, compute, needs)


def product(into: str, compute: Callable[[], Factors], rows: slice | None) -> dict[str, Tensor]:
    """The update that factors stand for, of ``rows`` alone where given, under the canonical name ``into``."""
    f = compute()
    return {into: ((f.b if rows is None else f.b[rows]) @ f.a).mul_(f.scaling)}


def module_in(target: Base, layer: str) -> tuple[str, Slot]:
    """The module that computes a layer, and which part of its output the layer is.

    Named as transformers' class with its head names it, if the target is of such a class; so PEFT will look for it.
    """
    family = target.geometry.family
    module, place = family.home(layer)
    block = family.block_of(layer)
    if block is None:  # a head
        return module, place
    if family.aliases and _plain(family.model_type) in CONFIG_MAPPING:
        own = layer.removeprefix(f"{family.blocks}.{block}.")
        found = _first_block(family.model_type)[f"{family.blocks}.0.{own}"]
        module = found.stored.replace(".0.", f".{block}.", 1)
        place = replace(found, stored=module)
    prefix = f"{family.prefix}." if any(name.startswith(f"{family.prefix}.") for name in target.tensors) else ""
    return prefix + module, place


@lru_cache
def _first_block(kind: str) -> dict[str, Slot]:
    """Canonical layers of a first block -> their modules, which versions of transformers spell in several ways."""
    options = {"use_swiglu_ffn": True} if kind != _plain(kind) else {}
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.for_model(_plain(kind), num_hidden_layers=1, **options))
    return FAMILIES[kind].modules(name for name, _ in model.named_modules() if name)


def _plain(kind: str) -> str:
    """The ``model_type`` as transformers calls it."""
    return kind.removesuffix("_swiglu")
