"""Whether an update is moved through maps before its effect is fitted: by how well maps of heads hold on new rows.

Between a model and a relative of it (a widened copy, trained on) maps of the attention context keep 0.45 to 1 of what
lies between chance and perfection, between models trained apart 0.16 to 0.37: the first blocks tell, by small maps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ..activations.links import Pairs
from ..models.geometry import Geometry
from ..recipes.recipe import Recipe
from ..recipes.solver import Rows, Solver
from .alignment import misfit
from .quality import quality

BLOCKS = 2  # the first that are paired
RELATED = 0.5  # mean share of what lies between chance and 1 from which two models are related


def with_prior(recipe: Recipe, source: Geometry, target: Geometry) -> Recipe:
    """A recipe whose prior is left open, with the most that the structure of two models allows."""
    if not undecided(recipe):
        return recipe
    return replace(recipe, prior="none" if misfit(source, target) else "coherent")


def undecided(recipe: Recipe) -> bool:
    """Whether the prior is still to be chosen."""
    return recipe.solver.fits and recipe.prior == "auto"


def deciding(pairs: Pairs) -> list[str]:
    """The links whose maps decide."""
    return [f"{b}.context" for b in pairs.places if b is not None][:BLOCKS]


def decided(recipe: Recipe, solver: Solver, kept: Mapping[str, Rows], samples: int) -> Recipe:
    """The recipe with the prior that the maps of a solver allow.

    Args:
        kept: link -> rows that these maps were not made from, of so many samples.
    """
    maps = solver.ruleset.maps
    found = [quality(maps[name], rows, samples) for name, rows in kept.items() if name in maps]
    shares = [(held - shifted) / (1 - shifted) for held, shifted in found if shifted < 1]
    related = bool(shares) and sum(shares) / len(shares) >= RELATED
    return replace(recipe, prior="coherent" if related else "none")
