"""One pass over both models: what is seen goes to the solver, its maps to where they are wanted, block by block."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..activations.capture import Capture
from ..activations.links import Pairs, of_class
from ..alignment.quality import Quality, quality, warn
from ..calibration.calibration import Calibration
from ..errors import InputRefused, NumericalError
from ..files.result_folder import refuse_foreign
from ..models.base import Base
from ..models.forward import samples_of
from ..models.geometry import Geometry
from ..models.pair import Pair
from ..recipes.behind_norms import together
from ..recipes.ruleset import Ruleset
from ..recipes.solver import Solver
from ..updates.computed import ComputedUpdate
from .changed_weights import TunedWeights, UpdatedWeights
from .hidden_states import own_folder, temporary
from .loop import Loop
from .schedule import Visit, schedule
from .stream import Arrived
from .streams import Streams
from .window import Window

Steps = Callable[[int], Callable[[], object]]  # number of steps -> call after every step


class Sink(Protocol):
    """Where the maps of a pass go."""

    def needs(self, solver: Solver) -> set[str]:
        """The links that are wanted."""

    def expect(self, visit: Visit) -> None:
        """A visit begins: what will be wanted at its end may be read meanwhile."""

    def compare(self, visit: Visit) -> None:
        """Find out what changed of a visit's blocks, while both models' weights are there."""

    def take(self, ruleset: Ruleset, visit: Visit | None) -> None:
        """Use what maps and rules there are, up to this visit's blocks; None: all are there."""

    def wanted(self) -> set[str]:
        """Maps that are still to be used."""

    def held(self) -> Pair[set[str]]:
        """Stored tensors of source and target that are still to be used, of blocks that were visited."""

    def state(self) -> dict[str, Any]:
        """What the sink knows, as JSON, for :meth:`restore` in another process."""

    def restore(self, state: dict[str, Any]) -> None: ...


class Journal(Protocol):
    """What a pass tells after every visit; see :class:`~..files.journal.Work`, which records it."""

    home: Path
    folder: Path

    @property
    def records(self) -> bool:
        """Whether another process could go on from a commit."""

    @property
    def step(self) -> int: ...

    @property
    def state(self) -> dict[str, Any]: ...

    @property
    def tensors(self) -> Mapping[str, Tensor]: ...

    def commit(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor], files: Iterable[Path] = ()) -> None: ...

    def note(self, state: Mapping[str, Any]) -> None: ...


@dataclass
class Passage:
    """One pass over both models, block by block: what it needs, and how it is carried out.

    Attributes:
        windows, geometries: of source and target.
        data: calibration batches for both; solver: makes maps and rules; sink: takes them.
        work: commits every visit; a pass that was interrupted goes on behind the last one.
        ahead: read the next blocks while these run.
        decompose: where maps are made of moments, if not on ``device``.
        tiles: of columns in which moments are added up, each by a pass of its own through the blocks.
        halves: attention and MLP of a block run one after the other.
        update: that is moved: the two models run as changed by it too, and what writes the residual is fitted.
        strengths: others than 1 at which the update is tried on the rows that are held out.
        arrived, removed: how much of the effect arrived, once the pass is over; see :class:`Streams`.
        resident: keep hidden states in memory; folder: for their files, of this run alone, by default the work's.
        qualities, visits: how well maps fit, and what was visited, once the pass is over; seconds: by stage.
    """

    windows: Pair[Window]
    geometries: Pair[Geometry]
    data: Calibration
    solver: Solver
    sink: Sink
    work: Journal
    device: torch.device
    decompose: torch.device | None = None
    ahead: bool = True
    resident: bool = True
    tiles: int = 1
    halves: bool = False
    folder: Path | None = None
    update: ComputedUpdate | None = None
    qualities: list[Quality] = field(default_factory=list)
    visits: list[Visit] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    strengths: Sequence[float] = ()
    arrived: list[Arrived] = field(default_factory=list)
    removed: dict[float, float] = field(default_factory=dict)

    def run(self, steps: Steps) -> list[Quality]:
        """Visit all blocks; returns how well maps fit the batch that was held out, if one was."""
        try:
            found = self._run(steps)
        except BaseException as error:
            # Hidden states stay for a run that goes on; after an error that would come again there is none.
            if isinstance(error, (InputRefused, NumericalError)) or not self.work.step:
                shutil.rmtree(self._folder, ignore_errors=True)
            raise
        finally:
            for window in self.windows:
                window.close()
        shutil.rmtree(self._folder, ignore_errors=True)
        return found

    def _run(self, steps: Steps) -> list[Quality]:
        batches = [*self.data.batches, *([self.data.held] if self.data.held else [])]
        self._streams = self._beside()
        if self.work.state:
            self._restore(self.work.state)
        # The loop is made late: a run whose last visit was committed needs no models any more.
        visits, loop = self._visits(), None
        done = steps(len(visits) * len(batches))
        for _ in range(min(self.work.step, len(visits)) * len(batches)):  # what an earlier process did counts as done
            done()
        while self.work.step < len(visits):
            loop = loop or self._loop(batches)
            self._visit(loop, visits, done)
            visits = self._visits()  # longer, once the first map turned out to need deeper spaces
        self.visits = visits
        # What lies outside all blocks comes last: its maps may have been completed from the deepest spaces.
        with self._timed("maps"):
            self.solver.finish()
        last = self.geometries.map(lambda geometry: geometry.depth - 1)
        reached = last.source in {v.source for v in visits} and last.target in {v.target for v in visits}
        if self._streams and reached:  # else something that moves nothing was not run
            if self.update is not None and self.update.fits.heads and self.work.step <= len(visits):
                loop = loop or self._loop(batches)
                with self._timed("fits"), self.update.available.showing(self.solver.ruleset):
                    self._streams.fit_heads()
            if self.data.held and not self._streams.judged:
                self._judge(self._streams, loop or self._loop(batches))
            self.arrived, self.removed = self._streams.arrived, self._streams.removed
        with self._timed("moves and writing"):
            self.sink.take(self.solver.ruleset, None)
        if self.update is not None and self.update.fits.heads and self.work.records and self.work.step == len(visits):
            # A head's fit is gone with the hidden states it was made from: what it wrote is not to be made again.
            self.work.commit({**self.work.state, "sink": self.sink.state()}, dict(self.work.tensors))
        self.seconds["of these waiting for reads"] = sum(window.seconds_waiting for window in self.windows)
        warn(self.qualities)
        return self.qualities

    def _judge(self, streams: Streams, loop: Loop) -> None:
        """What the hidden states tell that are there now; they are gone before the run has ended."""
        assert self.update is not None
        with self._timed(self._effect), self.update.available.showing(self.solver.ruleset):
            streams.judge()
        if self.work.records:
            self.work.note({**self.work.state, "streams": streams.state()[0]})

    def _beside(self) -> Streams | None:
        """The two models as changed, where there is anything to fit, or rows to tell by what arrives."""
        if self.update is None or not (self.update.fits.planned or self.data.held):
            return None
        tuned = TunedWeights(self.windows.source, self.update.delta, self.geometries.source.family, self.update.left)
        weights = tuned, UpdatedWeights(self.windows.target, self.update)
        how: dict[str, Any] = {"folder": self._folder, "resident": self.resident, "strengths": self.strengths}
        return Streams(self.update, self.solver, weights, **how)

    @property
    def _effect(self) -> str:
        """The stage in which both models run as changed."""
        return "fits" if self.update is not None and self.update.fits.planned else "effect"

    @property
    def skipped(self) -> str:
        """How many blocks and spaces nothing that moves needed, in words; "" where all were visited."""
        visits, links = self.visits, self.solver.pairs.moments
        compared = {name for visit in visits for name in visit.moments if name in links}
        read = {visit.target for visit in visits} - {None}
        if compared == links.keys():
            return ""
        depth, spaces = self.geometries.target.depth, len(links)
        unmapped = f"{spaces - len(compared)} of {spaces} spaces not mapped"
        return f"{depth - len(read)} of {depth} blocks were not run, {unmapped}"

    @property
    def _folder(self) -> Path:
        """Where hidden states are kept: of this run alone; a run goes on where it began."""
        if self.work.state:
            return self._recorded(Path(self.work.state["folder"]))
        if self.folder is None:
            return self.work.folder / "hidden"
        return self.folder

    def _recorded(self, folder: Path) -> Path:
        """The folder that a journal names, if such a run has one of this name: all in it will be removed.

        Raises:
            InputRefused: it is another, or not of this user.
        """
        own = folder == self.work.folder / "hidden" or folder.name == own_folder(folder.parent, self.work.home).name
        if not own:
            raise InputRefused(f"{self.work.folder} keeps its files in {folder}, which is not its own; remove it")
        if os.path.lexists(folder):
            refuse_foreign(folder)
        return folder

    def _visits(self) -> list[Visit]:
        """The schedule; once the first map turns out to lack directions, deeper spaces are wanted as well."""
        wanted = self.sink.needs(self.solver)
        if self.solver.wants_together:
            wanted |= {name for name, link in self.solver.links.items() if link.target.norm}
        return schedule(self.solver.pairs, wanted, whole=self.update is not None and bool(self.update.fits.planned))

    def _loop(self, batches: Sequence[Any]) -> Loop:
        held = len(self.data.batches) if self.data.held else None
        solver = self.solver
        grams = solver.gram_sides(solver.pairs, solver.recipe, solver.links)
        options: dict[str, Any] = {"held": held, "grams": grams, "device": self.device}
        options |= {"resident": self.resident, "tiles": self.tiles, "halves": self.halves}
        loop = Loop(self.windows, self.geometries, batches, **options, folder=self._folder)
        if self._streams:
            self._streams.beside(loop)
        if self.work.step:
            with self._damage_refused():
                loop.resume(self.work.state["hidden"])
                if self._streams:
                    self._streams.resume(self.work.state["streams"])
        return loop

    def _visit(self, loop: Loop, visits: Sequence[Visit], done: Callable[[], object]) -> None:
        k, solver = self.work.step, self.solver
        visit = visits[k]
        # Weights: of this visit in memory, of the next on their way while this one computes; of the tune as well.
        self.sink.expect(visit)
        for side, b in loop.sides.zip(visit.blocks):
            side.window.hold(side.names(b))
        if self.ahead and k + 1 < len(visits):
            for side, b in loop.sides.zip(visits[k + 1].blocks):
                side.window.prefetch(side.names(b))
        if self._streams:
            self.sink.compare(visit)
            self._streams.prepare(visit)
        # All batches through the blocks: sums of what is seen, and the rows of the batch that is held out.
        with self._timed("forward and moments"):
            seen = loop.visit(visit, first=k == 0, done=done)
        # Maps of what arrived, then the rules of the block, which need what lies behind it: it was seen just now.
        with self._timed("maps"):
            if self.decompose is not None:
                seen.to(self.decompose)
            solver.add(seen.moments, seen.energies, seen.grams)
            seen.moments, seen.energies, seen.grams = {}, {}, {}  # the solver alone holds them, and frees them
            if None not in visit.blocks:
                assert visit.target is not None
                solver.block(visit.target)
        with self._timed("held-out quality"):
            self._measure(seen)
            del seen  # the held-out rows, before moves need memory
        if self._streams:
            assert self.update is not None
            with self._timed(self._effect), self.update.available.showing(solver.ruleset, provisional=True):
                self._streams.follow(visit, first=k == 0)
        # Written as soon as it can be, so that maps and weights go which nothing later needs.
        with self._timed("moves and writing"):
            self.sink.take(solver.ruleset, visit)
            gone = solver.ruleset.maps.keys() - self.sink.wanted() - solver.keep - {"identity"}
            for name in () if solver.given else gone:
                del solver.ruleset.maps[name]
            for window, kept in self.windows.zip(self.sink.held()):
                window.release(keep=kept)
        with self._timed("commits"):
            self._commit(loop)  # counts the step: the next visit is the next in the list

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - began

    def _measure(self, seen: Capture) -> None:
        if seen.kept is None or self.data.held is None:
            return
        samples = samples_of(self.data.held.source)
        for name in (n for n in seen.links if n in seen.kept):
            if (t := self.solver.ruleset.maps.get(name)) is not None:
                rows = seen.kept.get(of_class(name), seen.kept[name])  # those that matter
                mapped = self.solver.as_mapped(rows, seen.links[name])
                self.qualities.append(Quality(name, *quality(t, mapped, samples)))

    def _commit(self, loop: Loop) -> None:
        if not self.work.records:
            return self.work.commit({}, {})
        state, tensors = self.solver.state()
        quality = [(one.space, one.held, one.shifted) for one in self.qualities]
        files = loop.files()
        record = {"solver": state, "sink": self.sink.state(), "hidden": loop.record(), "quality": quality}
        if self._streams:
            files += self._streams.files()
            record["streams"], more = self._streams.state()
            tensors |= more
        self.work.commit({"folder": str(self._folder), **record}, tensors, files)
        loop.committed()
        if self._streams:
            self._streams.committed()

    @contextmanager
    def _damage_refused(self) -> Iterator[None]:
        """A state that is not what :meth:`_commit` writes is refused."""
        try:
            yield
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            said = f"{type(error).__name__}: {error}"
            raise InputRefused(f"the unfinished run in {self.work.folder} is damaged ({said}); remove it") from error

    def _restore(self, state: dict[str, Any]) -> None:
        with self._damage_refused():
            self.solver.restore(state["solver"], self.work.tensors, device=self.decompose or self.device)
            self.sink.restore(state["sink"])
            self.qualities = [Quality(*row) for row in state["quality"]]
            if self._streams:
                self._streams.restore(state["streams"], self.work.tensors)


def all_together(
    bases: Pair[Base],
    windows: Pair[Window],
    pairs: Pairs,
    data: Calibration,
    device: torch.device,
    *,
    folder: Path | None = None,
    halves: bool = False,
) -> Tensor | None:
    """The sum of z's crosses over depth, for maps completed toward it: a pass by itself, before any map is made.

    Args:
        folder: for files of hidden states; None: they stay in memory.
        halves: attention and MLP of a block run one after the other.

    Returns:
        [width_S, width_T] in float64; None where no space behind a norm is compared.
    """
    found = None
    behind_norms = {name for name, link in pairs.moments.items() if link.target.norm}
    visits = schedule(pairs, behind_norms)
    with temporary(folder) as place:
        how: dict[str, Any] = {"held": None, "grams": {}, "device": device, "halves": halves}
        loop = Loop(windows, pairs.geometries, data.batches, **how, folder=place or Path(), resident=place is None)
        for k, visit in enumerate(visits):
            seen = loop.visit(visit, first=k == 0)
            found = together(*bases, pairs.moments, seen.moments, found)
            for window in windows:
                window.release()
    return found
