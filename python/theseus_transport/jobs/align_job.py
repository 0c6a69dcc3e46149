"""Aligning two bases, from files to a folder of maps; what ``theseus align`` runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

from ..alignment.alignment import RECORD
from ..budget.plan import Plan
from ..files.earlier_runs import check_room
from ..files.journal import Work
from ..files.writer import Ending, Output
from ..models.pair import SIDES
from ..progress import Progress, quiet
from ..streaming.sinks import MapSink, map_tensors
from ..updates.available import Available
from .bases import Bases, Fit
from .checks import check_values
from .outcome import Clock, Outcome, begun, collected_warnings, describe, told, told_in_manifest
from .provenance import content_hash
from .settings import AlignJob, options_of


def check(bases: Bases) -> None:
    """Refuse a folder that cannot be written, or has no room for all that an alignment may hold."""
    room = 2 * bases.bytes_of_maps  # maps not made are left out by a copy
    check_room([bases.job.out], room, bases.job, inputs=bases.inputs)


def rehearse(fitted: Fit) -> Outcome:
    """What :func:`carry_out` would do; all weights are read once, nothing is computed or written."""
    with collected_warnings() as warnings:
        data = fitted.calibration()
        check_values(*fitted.bases.checkpoints)
    return _outcome(fitted, calibration=data.description, tokens=data.tokens, warnings=warnings)


def carry_out(fitted: Fit, progress: Progress = quiet, *, finished: Callable[[], None] = lambda: None) -> Outcome:
    """Align and save, with fingerprints of both bases.

    Args:
        finished: called once all is written.

    Raises:
        InputRefused, NumericalError: nothing is left behind.
        ResourceError: what was done is kept; the same job with ``resume`` goes on.
    """
    bases, job, clock = fitted.bases, fitted.bases.job, Clock()
    with collected_warnings() as warnings:
        data = fitted.calibration()
        draft = fitted.draft(data)
        clock.lap("calibration")
        made = Available()
        key = fitted.key(data, recipe=asdict(draft.recipe), **options_of(job))
        writing = bases.writing(key, stem="maps", shard_size=2**62)
        with Work.open(job.out, [Output(job.out, map_tensors(draft, made))], **writing) as work:
            sink = MapSink(made, work)
            alignment, passage = fitted.align(data, draft, sink, work, partial(progress, "align"))
            for side, checkpoint in SIDES.zip(bases.checkpoints):
                alignment.provenance[side]["content_hash"] = content_hash(checkpoint)
            alignment.provenance["warnings"] = list(warnings)  # for those who apply it
            outcome = _outcome(fitted, **told(alignment), warnings=warnings)
            outcome.job["recipe"] = asdict(alignment.recipe)
            record = json.dumps(alignment.record(sink.stamps), indent=1)
            work.finish([Ending({RECORD: record}, {"outcome": told_in_manifest(outcome)})])
            finished()
        clock.stages(passage.seconds)
    return clock.finish(outcome, job.out, *bases.windows)


class AlignSession:
    """Two bases that are opened, checked and fitted; that refuses what cannot work, before anything heavy runs.

    Attributes:
        done: all is written.
    """

    def __init__(self, job: AlignJob) -> None:
        self.job, self.bases, self.done = job, Bases.open(job), False
        check(self.bases)
        self.fitted = self.bases.fit()

    @property
    def plan(self) -> Plan:
        """How it fits the memory it may take."""
        return self.fitted.plan

    def rehearse(self) -> Outcome:
        """What :meth:`run` would do; all weights are read once, nothing is computed or written."""
        return rehearse(self.fitted)

    def run(self, progress: Progress = quiet) -> Outcome:
        """Align and save, with fingerprints of both bases; errors are those of :func:`carry_out`."""
        return carry_out(self.fitted, progress, finished=self._finish)

    def _finish(self) -> None:
        self.done = True


def _outcome(fitted: Fit, **known: Any) -> Outcome:
    bases = fitted.bases
    job = describe(bases.job, *bases.checkpoints)
    return begun(fitted, kind="alignment", job=job, bytes_out=bases.bytes_of_maps, **known)
