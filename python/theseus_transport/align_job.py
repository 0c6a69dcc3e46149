"""Aligning two bases, from files to a folder of maps; what ``theseus align`` runs."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from .alignment import RECORD, Alignment
from .bases import Bases, Progress, options_of, quiet
from .checks import check_values
from .earlier import check_room
from .identity import content_hash
from .journal import Work
from .outcome import Clock, Outcome, begun, collected_warnings, describe, told, told_in_manifest
from .recipes import Recipe
from .sinks import Maps
from .writer import Output


@dataclass(frozen=True)
class AlignJob:
    """Which two bases to align, on what.

    Attributes:
        source, target: folders or hub ids of the base models.
        out: folder to write.
        calibration: a file, a folder of images, or ``builtin``.
        tokens: calibration tokens, or None for four times the widest space.
        held_out: measure the alignment on rows it has not seen, a third of all and a batch at most.
        skip_bad_inputs: leave out images and lines that cannot be read, rather than refusing them.
        max_ram, max_memory: bytes the run may take of the host's memory and of the device's; None: what is there.
        offload_folder: keep hidden states in files there, not in memory.
        resume: go on with a run that was interrupted.
        tuned: a tune of the source, if its chat template is to tell the calibration's chats.
    """

    source: str
    target: str
    out: Path
    calibration: str = "builtin"
    recipe: Recipe = field(default_factory=Recipe)
    device: str = "cpu"
    tokens: int | None = None
    batch_size: int = 8
    seed: int = 0
    held_out: bool = True
    skip_bad_inputs: bool = False
    overwrite: bool = False
    allow_pickle: bool = False
    max_ram: int | None = None
    max_memory: int | None = None
    offload_folder: Path | None = None
    resume: bool = False
    tuned: str | None = None


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
            sink = Maps(draft)
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
