"""A layer that writes the residual, fitted to what is missing behind it."""

from __future__ import annotations

from functools import reduce
from operator import add

import torch

from ..linalg.ridge import Fit, Normal, chosen_ridge, ridge
from ..models.geometry import Layer
from ..recipes.choices import RecipeChoices
from ..updates.computed import ComputedUpdate

NOTHING = 100.0  # times the square of the recipe's floor: share of the effect's energy below which nothing is missing


def solve(update: ComputedUpdate, layer: Layer, normals: list[Normal], recipe: RecipeChoices, *, wanted: float) -> None:
    """Solve for a writer's update, where anything is missing of an effect of energy ``wanted``.

    Args:
        normals: of the rows that are fitted and, where the penalty is chosen, of those that judge it; used up.
    """
    into = update.target
    stored = {part: into.slots[n] for part in ("weight", "bias") if (n := f"{layer.name}.{part}") in into}
    planned, rho = update.fits.planned[layer.name], recipe.ridge or None
    bias, found = planned is None and "bias" in stored, None
    if rho is None:
        rho = chosen_ridge(*normals, bias=bias) if all(one.count for one in normals) else RecipeChoices.ridge
    normal = reduce(add, normals)
    normals.clear()
    if rho is not None:
        found = ridge(normal, rho, bias=bias)
        if _explained(found, normal) <= NOTHING * recipe.floor**2 * wanted:
            found = None
    missing = found is not None
    if found is None:
        if planned is None or not planned.wider:
            return
        found = Fit(torch.zeros_like(normal.cross.mT), None)  # what the prior moved is cut as a fit is
    if layer.scale and layer.scale in into:  # a factor behind the layer: the residual gets it times that
        factor = into.need(layer.scale).to(found.weight)
        factor = torch.where(factor == 0, torch.inf, factor)
        found = Fit(found.weight / factor[:, None], None if found.bias is None else found.bias / factor)
    there = {part: slot for part, slot in stored.items() if update.there(slot.stored)}
    prior = {part: slot.view(update[slot.stored]).double() for part, slot in there.items()}
    update.forget()
    if missing or prior:
        update.fits.put(layer.name, prior, found, normal, rho or RecipeChoices.ridge)


def _explained(found: Fit, normal: Normal) -> float:
    """The energy that a fit takes away from what is missing, and its penalty."""
    energy = float((found.weight.T * normal.cross).sum())
    return energy if found.bias is None else energy + float(found.bias @ normal.output_sum)
