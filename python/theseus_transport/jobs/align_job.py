"""Aligning two bases, from files to a folder of maps; what ``theseus align`` runs."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from typing import Any

from ..alignment.alignment import RECORD, Alignment
from ..files.earlier_runs import check_room
from ..files.journal import Work
from ..files.writer import Output
from ..progress import Progress, quiet
from ..streaming.sinks import MapSink
from .bases import Bases
from .checks import check_values
from .outcome import Clock, Outcome, begun, collected_warnings, describe, told, told_in_manifest
from .provenance import content_hash
from .settings import AlignJob, options_of


class AlignSession:
    """The checked inputs of an :class:`AlignJob`; opening it refuses what cannot work, before anything heavy runs."""

    def __init__(self, job: AlignJob) -> None:
        self.job, self.bases, self.done = job, Bases(job), False
        self.bytes_out = self.bases.bytes_of_maps
        check_room([job.out], 2 * self.bytes_out, job, inputs=self.bases.inputs)  # maps not made are left out by a copy
        self.plan = self.bases.fitted()
        self.seconds = self.bases.seconds()

    def outcome(self, **known: Any) -> Outcome:
        return begun(self, kind="alignment", job=describe(self.job, *self.bases.checkpoints), **known)

    def rehearse(self) -> Outcome:
        """What :meth:`run` would do; all weights are read once, nothing is computed or written."""
        with collected_warnings() as warnings:
            data = self.bases.calibration()
            check_values(*self.bases.checkpoints)
        return self.outcome(calibration=data.description, tokens=data.tokens, warnings=warnings)

    def run(self, progress: Progress = quiet) -> Outcome:
        """Align and save, with fingerprints of both bases.

        Raises:
            InputRefused, NumericalError: nothing is left behind.
            ResourceError: what was done is kept; the same job with ``resume`` goes on.
        """
        job, clock = self.job, Clock()
        with collected_warnings() as warnings:
            data = self.bases.calibration()
            draft = self.bases.draft(data)
            clock.lap("calibration")
            made: list[Alignment] = []
            outcome = self.outcome(calibration=data.description, tokens=data.tokens, warnings=warnings)
            sink = MapSink(draft)
            files = {RECORD: lambda: json.dumps(made[0].record(sink.stamps), indent=1)}
            described = Output(job.out, sink.tensors, files, lambda: {"outcome": told_in_manifest(outcome)})
            key = self.bases.key(data, recipe=asdict(draft.recipe), **options_of(job))
            with Work.open(job.out, [described], **self.bases.writing(key, stem="maps", shard_size=2**62)) as work:
                sink.work = work
                alignment, passage = self.bases.align(data, draft, sink, work, partial(progress, "align"))
                for side, checkpoint in zip(("source", "target"), self.bases.checkpoints, strict=True):
                    alignment.provenance[side]["content_hash"] = content_hash(checkpoint)
                alignment.provenance["warnings"] = list(warnings)  # for those who apply it
                made.append(alignment)
                outcome = self.outcome(**told(alignment), warnings=warnings)
                outcome.job["recipe"] = asdict(alignment.recipe)
                work.finish()
                self.done = True
            clock.stages(passage.seconds)
        return clock.finish(outcome, job.out, *self.bases.windows)
