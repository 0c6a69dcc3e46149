"""Transport between models in memory: maps move what they can, and where the recipe fits, the models run once more."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..alignment.alignment import Alignment
from ..calibration.calibration import Calibration
from ..errors import InputRefused
from ..machine import find_device
from ..models.base import Base
from ..models.pair import Pair
from ..models.tensors import Tensors, device_of, tensors_of
from ..recipes.ruleset import Ruleset
from ..recipes.solver import Solver
from ..updates import transport as updates
from ..updates.delta import Delta
from ..updates.update import Update
from .passage import Passage
from .resident import Resident
from .schedule import Visit
from .window import Window


def transport(
    alignment: Alignment,
    delta: Delta,
    target: nn.Module | Tensors,
    *,
    alpha: float = 1.0,
    leave: Sequence[str] = (),
    presumed: bool = False,
    one_tokenizer: bool = False,
    rank: int | None = None,
    only_targeted: bool = False,
    device: torch.device | str | None = None,
) -> Update:
    """Move an update of the source to the target.

    Args:
        alignment: of the two bases, by :func:`align`, or loaded.
        delta: the update, with the source base it belongs to.
        target: the target base; alpha: the strength of the update.
        leave: glob patterns of canonical tensor names to leave behind.
        presumed: count every tensor of a full tune as changed, unread, until :meth:`Update.compare` finds otherwise;
            only what has no rule is compared at once.
        one_tokenizer: rows of one index are one token in both vocabularies, though one is padded further: the rows
            they share move. Else embeddings and heads of another number of rows stay.
        rank: the most directions of every layer of a moved adapter; None: its own. A full tune becomes factors of this
            rank where it is given; what no factors hold stays.
        only_targeted: where the recipe fits layers, of an adapter only those of the kinds it has factors of.
        device: where it is computed; None: the GPU the target lies on, else the CPU. Values are handed out on the CPU.

    Returns:
        The update, its values computed when they are asked for; fits, which need both models to run on the batches they
        were aligned on, are made at once.

    Raises:
        InputRefused: a changed tensor has no rule, nothing changed at all, an argument does not fit the others, or the
            recipe fits and the alignment is a loaded one, which holds no batches.

    Source: arXiv 2602.12952 (the map of an update), and the fields of ``Recipe`` for gains, biases and scales.
    """
    how: dict[str, Any] = {
        "leave": leave,
        "presumed": presumed,
        "one_tokenizer": one_tokenizer,
        "rank": rank,
        "device": device,
    }
    update = updates.transport(alignment, delta, target, alpha=alpha, only_targeted=only_targeted, **how)
    if alignment.recipe.fits:
        if alignment.running is None:
            raise InputRefused(
                "the recipe fits the effect of a tune, for which the models have to run, and a loaded alignment holds "
                "no batches; align in this process, or use the command: theseus apply"
            )
        _fit(alignment, update, delta, tensors_of(target), device)
        if not presumed:
            update.settled()
    return update


def _fit(
    alignment: Alignment, update: Update, delta: Delta, target: Tensors, device: torch.device | str | None
) -> None:
    """Make the fits of an update, which keeps them."""
    running = alignment.running
    assert running is not None
    both = Pair(delta.base, target).zip(running.models).map(lambda each: Window(Resident(*each)))
    bases = both.zip((alignment.source, alignment.target)).map(lambda each: Base.of(*each))
    recipe = alignment.recipe
    solver = recipe.solver.of_maps(*bases, alignment.blocks, recipe, alignment.ruleset)
    place = device_of(target) if device is None else find_device(device)
    batches: Any = running.batches
    data, geometries = Calibration(batches, 0, "", ""), bases.map(lambda base: base.geometry)
    strength, update.alpha = update.alpha, 1.0
    try:
        passage = Passage(both, geometries, data, solver, Nowhere(), Unrecorded(), place, update=update)
        passage.run(lambda steps: lambda: None)
    finally:
        update.alpha = strength


class Nowhere:
    """A sink of a pass whose maps were there before: everything stays in the update."""

    def needs(self, solver: Solver) -> set[str]:
        return set()

    def expect(self, visit: Visit) -> None: ...

    def compare(self, visit: Visit) -> None: ...

    def take(self, ruleset: Ruleset, visit: Visit | None) -> None: ...

    def wanted(self) -> set[str]:
        return set()

    def held(self) -> Pair[set[str]]:
        return Pair(set(), set())

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None: ...


class Unrecorded:
    """In the place of a journal: counts steps, and forgets."""

    records = False

    def __init__(self) -> None:
        self.step, self.state, self.tensors = 0, dict[str, Any](), dict[str, torch.Tensor]()
        self.home = self.folder = Path(os.devnull)  # where nothing can lie

    def commit(self, state: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], files: Iterable[Path] = ()) -> None:
        """A step is done."""
        self.step += 1

    def note(self, state: Mapping[str, Any]) -> None: ...
