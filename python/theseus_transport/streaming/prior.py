"""Whether two models are related, found by running their first blocks; see `alignment/prior.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..activations.links import Pairs
from ..alignment.prior import decided, deciding
from ..calibration.calibration import Calibration
from ..models.base import Base
from ..models.forward import samples_of
from ..models.pair import Pair
from ..recipes.recipe import Recipe
from .hidden_states import temporary
from .loop import Loop
from .schedule import schedule
from .window import Window


def decided_streamed(
    recipe: Recipe,
    bases: Pair[Base],
    windows: Pair[Window],
    pairs: Pairs,
    data: Calibration,
    device: torch.device,
    *,
    folder: Path | None = None,
    halves: bool = False,
) -> Recipe:
    """The recipe with its prior chosen, by a pass over the first blocks before any map of the run is made.

    Where no batch can be held out it stays as it is.

    Args:
        folder: for files of hidden states; None: they stay in memory.
        halves: attention and MLP of a block run one after the other.
    """
    held = data.held or (data.batches[-1] if len(data.batches) > 1 else None)
    if held is None:  # nothing to tell by; fits repair a prior that is wrong
        return recipe
    batches = [*(batch for batch in data.batches if batch is not held), held]
    wanted, solver = deciding(pairs), recipe.solver(*bases, pairs.blocks, recipe)
    grams, kept = recipe.solver.gram_sides(pairs, recipe, wanted), dict[str, Any]()
    with temporary(folder) as place:
        how: dict[str, Any] = {"held": len(batches) - 1, "grams": grams, "device": device, "halves": halves}
        loop = Loop(windows, pairs.geometries, batches, **how, folder=place or Path(), resident=place is None)
        for k, visit in enumerate(schedule(pairs, wanted)):
            with torch.no_grad():
                seen = loop.visit(visit, first=k == 0)
            kept |= {name: rows for name, rows in (seen.kept or {}).items() if name in wanted}
            solver.add(seen.moments, seen.energies, seen.grams)
            if None not in visit.blocks:
                assert visit.target is not None
                solver.block(visit.target)
            for window in windows:
                window.release()
    return decided(recipe, solver, kept, samples_of(held.target))
