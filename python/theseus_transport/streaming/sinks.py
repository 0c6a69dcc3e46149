"""Where the maps of a pass go: through an update into what is written, or into an alignment's own file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from ..activations.links import Pairs
from ..alignment.alignment import Alignment
from ..alignment.stored_maps import Stamp, stamp
from ..files.journal import Work
from ..files.writer import Planned
from ..models.pair import Pair
from ..recipes.ruleset import Ruleset
from ..recipes.solver import Solver
from ..updates.available import Available
from ..updates.computed import ComputedUpdate
from ..updates.output import Kind, Written
from .schedule import Visit
from .window import Window

Step = Callable[[], object]


class UpdateSink:
    """Writes every tensor of a moved update as soon as its maps are there, and frees what it was made from.

    Attributes:
        update: what is written; what is available to it fills up as a pass goes.
    """

    def __init__(
        self,
        update: ComputedUpdate,
        outputs: Sequence[Written],
        tensors: Sequence[Planned],
        work: Work,
        tuned: Window,
        *,
        kind: Kind,
        progress: Step,
    ) -> None:
        """
        Args:
            tensors: all that is planned for the first of the outputs.
            progress: called after every tensor.
        """
        self.update, self._outputs, self._work = update, outputs, work
        self._needs = frozenset[str]().union(*(t.needs for t in tensors))
        self._tuned, self._kind, self._progress = tuned, kind, progress
        adapted = update.delta.adapted
        self._tuned_names = update.source.geometry.family.by_block(tuned if adapted is None else adapted.changed)
        self._block = {t.name: self._block_of(t) for t in tensors}
        self._visited: set[int] = set()
        for _ in tensors[len(work.pending) :]:
            progress()

    def needs(self, solver: Solver) -> set[str]:
        return solver.needed(self._needs)

    def expect(self, visit: Visit) -> None:
        if visit.source is not None:
            self._tuned.prefetch(self._tuned_names.get(visit.source, []))

    def take(self, ruleset: Ruleset, visit: Visit | None) -> None:
        with self.update.available.showing(ruleset):
            self.step(visit)

    def compare(self, visit: Visit) -> None:
        self._compare(visit.source)

    def step(self, visit: Visit | None) -> None:
        """Write what can be of the blocks visited so far; None: everything."""
        if visit is None:
            self.update.compare(set(self.update.presumed))
        else:
            if visit.target is not None:
                self._visited.add(visit.target)
            self._compare(visit.source)
        pending = set(self._work.pending)
        for name in (n for n, b in self._block.items() if n in pending and (visit is None or b in self._visited)):
            if self._outputs_drop(name):
                self._work.drop([name])
            elif visit is None or self._ready(name):
                self._work.write(name)
            else:
                continue
            self._progress()
        self.update.forget()
        self.update.fits.made.clear()
        self._tuned.release(keep=self._sources())

    def wanted(self) -> set[str]:
        keys = {key for name in self._work.pending for key in self.update.needs(name)}
        rules = map(self.update.available.rule, keys)
        return {name for rule in rules if rule is not None for name in (rule.input, rule.output)}

    def held(self) -> Pair[set[str]]:
        stored = getattr(self.update.target.tensors, "stored", str)  # the names the windows know
        return Pair({self.update.source.slots[n].stored for n in self._late()}, set(map(stored, self._waiting())))

    def state(self) -> dict[str, Any]:
        rounding = [out.rounding.sums for out in self._outputs]
        return {"update": self.update.state(), "rounding": rounding, "visited": sorted(self._visited)}

    def restore(self, state: dict[str, Any]) -> None:
        self.update.restore(state["update"])
        for out, sums in zip(self._outputs, state["rounding"], strict=True):
            out.rounding.sums.update(sums)
        self._visited = set(state["visited"])

    def _compare(self, block: int | None) -> None:
        """Which tensors of a source block the tune changed, while base and tune are in memory."""
        if block is not None and self.update.delta.tuned is not None:
            self._tuned.hold(self._tuned_names.get(block, []))
            family = self.update.source.geometry.family
            self.update.compare({name for name in self.update.presumed if family.block_of(name) == block})

    def _ready(self, name: str) -> bool:
        return all(map(self.update.ready, self.update.needs(name)))

    def _outputs_drop(self, name: str) -> bool:
        """Whether a planned tensor turned out to have no place: of a ``delta``, one that did not change."""
        return self._kind == "delta" and name not in self.update

    def _waiting(self) -> list[str]:
        """What is written late, of blocks that were visited."""
        return [name for name in self._work.pending if self._block[name] in self._visited]

    def _late(self) -> set[str]:
        """Canonical names of the source that it needs."""
        return {n for name in self._waiting() for n in self.update.sources(name) if n in self.update.source}

    def _sources(self) -> set[str]:
        slots = self.update.tuned.slots
        return {slots[name].stored for name in self._late() if name in slots}

    def _block_of(self, tensor: Planned) -> int | None:
        """The target block whose visit makes a tensor; None: the end."""
        family = self.update.family
        names = [*tensor.needs, family.canonical(tensor.name)]
        return max((block for name in names if (block := family.block_of(name)) is not None), default=None)


def map_tensors(draft: Alignment, available: Available) -> list[Planned]:
    """Every tensor of the maps that an alignment of this outline may have, read where they are available."""
    return [Planned(*planned, partial(_tensor, available, planned[0])) for planned in draft.planned_maps]


def _tensor(available: Available, name: str, rows: slice | None) -> Tensor:
    of, _, part = name.rpartition("/")
    return available.maps[of].tensors()[part]


class MapSink:
    """Writes every map of an alignment as soon as it is made.

    Attributes:
        stamps: of every map that was made, by name.
    """

    def __init__(self, available: Available, work: Work) -> None:
        """``work`` writes :func:`map_tensors` of what is ``available``."""
        self._available, self._work = available, work
        self.stamps: dict[str, Stamp] = {}

    def needs(self, solver: Solver) -> set[str]:
        return solver.every

    def expect(self, visit: Visit) -> None:
        pass

    def compare(self, visit: Visit) -> None:
        pass

    def take(self, ruleset: Ruleset, visit: Visit | None) -> None:
        with self._available.showing(ruleset):
            for name, made in ruleset.maps.items():
                if name not in self.stamps:
                    self.stamps[name] = stamp(made)
                for part in made.tensors():
                    self._work.write(f"{name}/{part}")
        if visit is None:
            self._work.drop(self._work.pending)

    def wanted(self) -> set[str]:
        return set()

    def held(self) -> Pair[set[str]]:
        return Pair(set(), set())

    def state(self) -> dict[str, Any]:
        return {"stamps": self.stamps}

    def restore(self, state: dict[str, Any]) -> None:
        self.stamps = {name: Stamp(*stamped) for name, stamped in state["stamps"].items()}


def apply(sink: UpdateSink, pairs: Pairs, windows: Pair[Window], work: Work) -> None:
    """Write all of an update whose maps are there, block by block."""
    blocks, full = pairs.blocks, sink.update.delta.tuned is not None
    stored = [geometry.family.by_block(window) if full else {} for geometry, window in pairs.geometries.zip(windows)]
    visits = [Visit(source=own, target=b) for b, own in enumerate(blocks)]
    visits += [Visit(source=own) for own in sorted(set(range(pairs.source.depth)) - set(blocks))]
    if work.state:
        sink.restore(work.state["sink"])
    for visit in visits[work.step :]:
        for window, names, b in zip(windows, stored, visit.blocks, strict=True):
            window.hold([] if b is None else names.get(b, []))
        sink.step(visit)
        for window, kept in windows.zip(sink.held()):
            window.release(keep=kept)
        work.commit({"sink": sink.state()}, {})
    sink.step(None)
