"""Aligning two running models: evidence from batches, maps by a recipe."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..activations.capture import capture
from ..activations.inputs import checked_batches
from ..activations.links import Pairs
from ..errors import InputRefused
from ..linalg.procrustes import Null
from ..machine import find_device
from ..models.arguments import check_models, sample_of
from ..models.base import Base
from ..models.emptied import emptied
from ..models.forward import Batch, samples_of
from ..models.pair import Pair
from ..models.precision import in_float32
from ..recipes.behind_norms import together
from ..recipes.recipe import Recipe
from ..recipes.registry import DEFAULT
from .alignment import Alignment, Running, check_pair, outline
from .block_pairing import pair_blocks
from .depth import SIMILARITY, Depth, blocks_asked
from .prior import decided, deciding, undecided, with_prior


def align(
    source: nn.Module,
    target: nn.Module,
    batches: Iterable[Batch | tuple[Batch, Batch]],
    *,
    recipe: str | Recipe = DEFAULT,
    null: Null | None = None,
    floor: float | None = None,
    depth: Depth = SIMILARITY,
    device: torch.device | str | None = None,
    progress: Callable[[], object] | None = None,
    provenance: dict[str, Any] | None = None,
) -> Alignment:
    """Align two base models on a few unlabelled batches.

    Args:
        source, target: models of transformers, or of a registered family, with or without their heads. Those in 16
            bits run in float32, as the command runs them, and are as they were afterwards.
        batches: keyword arguments of the forward pass (``input_ids`` and ``attention_mask``, or ``pixel_values``), the
            same for both models or a pair (source, target).
        recipe: its name (``effect``), or a :class:`Recipe`; ``null`` and ``floor`` override its fields. The default
            floor is 1e-6, and 1e-12 where both models are in float64.
        depth: which source block feeds which target block: ``similarity``, where depths differ, of what blocks add to
            the residual; ``relative``, evenly spread; or for each target block a source block, increasing, or None.
        device: where to run, or None to leave the models where they are.
        progress: called after every batch.

    Raises:
        InputRefused: families, depths or batches do not fit each other.
        NumericalError: activations are not finite, or a map fails its certificate.

    Source: arXiv 2602.12952, section 3 (with the corrections this project documents in its README).
    """
    options = {k: v for k, v in (("null", null), ("floor", floor)) if v is not None}
    chosen = Recipe.named(recipe, **options)
    check_models(source=source, target=target)
    double = all(p.dtype == torch.float64 for model in (source, target) for p in model.parameters())
    if floor is None and double:
        chosen = chosen.in_float64()
    bases = Pair(source, target).map(Base.of)
    geometries = bases.map(lambda base: base.geometry)
    to_decide, chosen = undecided(chosen), with_prior(chosen, *geometries)
    check_pair(*geometries, chosen)
    blocks = blocks_asked(depth, geometries)
    both = checked_batches(batches, geometries)
    if device is not None:
        source.to(place := find_device(device)), target.to(place)
    with in_float32(source, target):
        if blocks is None and geometries.source.depth != geometries.target.depth:
            blocks = pair_blocks(source, target, geometries, both)
        pairs = Pairs.by_position(*geometries) if blocks is None else Pairs(*geometries, blocks)
        if to_decide and not chosen.solver.alone and len(both) > 1:
            chosen = _decided(chosen, Pair(source, target), bases, pairs, both)
        grams = chosen.solver.gram_sides(pairs, chosen, pairs.moments)
        models = Pair(source, target).zip(geometries).map(lambda each: emptied(*each)) if chosen.fits else None
        solver = chosen.solver(*bases, pairs.blocks, chosen)
        with capture(source, target, pairs, grams=grams, wanted=solver.every) as seen:
            for pair in both:
                seen.run(*pair)
                if progress:
                    progress()
    tokens = next(iter(seen.moments.values())).count
    if not tokens:
        raise InputRefused("the calibration holds no token that is not masked, or (by offsets) none both models have")
    solver.toward = together(*bases, pairs.moments, seen.moments) if chosen.solver.leans_on_depth(chosen) else None
    made = solver.whole(seen.moments, seen.energies, seen.grams)
    known = {**sample_of(bases.source), **(provenance or {})}
    alignment = outline(*geometries, chosen, pairs.blocks).filled(made, tokens=tokens, provenance=known)
    return replace(alignment, running=models and Running(models, both))


def _decided(
    recipe: Recipe, models: Pair[nn.Module], bases: Pair[Base], pairs: Pairs, batches: Sequence[Pair[Batch]]
) -> Recipe:
    """The recipe with its prior chosen, by maps of the first blocks on the last batch, from which they are not made."""
    wanted, solver = deciding(pairs), recipe.solver(*bases, pairs.blocks, recipe)
    grams = recipe.solver.gram_sides(pairs, recipe, wanted)
    with capture(*models, pairs, energies=False, grams=grams, wanted=wanted) as seen:
        for i, pair in enumerate(batches):
            if i + 1 == len(batches):
                seen.kept = {}
            seen.run(*pair)
    solver.add(seen.moments, {}, seen.grams)
    for name in wanted:
        solver.block(int(name.split(".")[0]))
    return decided(recipe, solver, seen.kept or {}, samples_of(batches[-1].target))
