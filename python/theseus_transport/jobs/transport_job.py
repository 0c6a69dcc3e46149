"""Jobs from files to files: check everything, align or read an alignment, move, write; what the command runs."""

from __future__ import annotations

import logging
import os
import shutil
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..alignment.alignment import Alignment, outline
from ..budget.time import move_flops, move_seconds
from ..calibration.calibration import Calibration
from ..errors import AlreadyDone, InputRefused, NumericalError, ResourceError
from ..files.checkpoint import Checkpoint
from ..files.companions import has_tokenizer
from ..files.earlier_runs import check_room, tell_apart, unfinished, workplace_of
from ..files.headers import real
from ..files.journal import Work
from ..files.result_folder import differences, read_manifest, refuse_foreign
from ..files.writer import planned_bytes
from ..progress import Progress, quiet
from ..recipes.recipe import Recipe
from ..streaming.sinks import UpdateSink, apply
from ..streaming.tune import open_tune
from ..updates.alpha import chosen, folders
from ..updates.changes import first_change
from ..updates.computed import ComputedUpdate
from ..updates.output import Kind, Written, described_outputs, kind_of, planned
from ..updates.trained_on import doubt_of_base
from ..updates.transport import transport
from .align_job import AlignSession
from .bases import Bases
from .behaviour import behaviour_of
from .checks import check_dtypes, check_left, check_tune, check_values
from .model_card import model_card
from .outcome import Clock, Outcome, begun, collected_warnings, describe, told, told_in_manifest
from .settings import DTYPES, Job, options_of
from .task_classes import NewHead, config_of
from .tune_settings import warn_of_settings
from .vocabularies import check_rows, one_tokenizer

log = logging.getLogger(__name__)


class Session:
    """The checked inputs of a job; opening it refuses what cannot work, before anything heavy runs."""

    def __init__(self, job: Job, key: dict[str, Any] | None = None) -> None:
        """``key``: of what is written, where this is a part of another job."""
        self.key, self.job, self.alphas, self.done = key, job, chosen(job.alpha), False
        self.bases = Bases(job.alignment)
        source = self.bases.source
        self.tuned = Checkpoint.open(job.tuned, allow_pickle=job.allow_pickle)
        self.kind: Kind = kind_of(job.output, self.tuned)
        base, family = self.bases.windows[0], self.bases.geometries[0].family
        opened = open_tune(self.tuned, source, base, family, as_adapter=self.kind == "adapter")
        self.delta, self.window = opened
        self.dtype = DTYPES[job.out_dtype]
        self.inputs = [*self.bases.inputs, self.tuned.folder, *([Path(job.maps)] if job.maps else [])]
        check_dtypes(self.tuned)
        check_tune(source, self.tuned, self.bases.geometries[0])
        self.behaviour = behaviour_of(source, self.tuned, self.bases.target)
        self.alignment = self._opened() if job.maps else None
        self.one_tokenizer = one_tokenizer(*self.bases.checkpoints)
        draft = self.transport(self.alignment or outline(*self.bases.geometries, job.recipe))
        first_change(draft)
        self.coverage = draft.coverage
        self.head = NewHead.of(draft, self.tuned, self.bases.target)
        check_left(job.leave, self.coverage, source, self.tuned)
        self.places = folders(job.out, self.alphas)
        tensors, matched = planned(draft, self.kind, self.dtype), any(a.asked == "match" for a in self.alphas)
        self.bytes_out = len(self.places) * planned_bytes(tensors)
        self.maps_first = matched and not self.alignment
        maps = self.bases.bytes_of_maps if self.maps_first else 0
        twice = 2 if self.kind == "delta" else 1  # what did not change is left out by a copy, at the end
        check_room(self.places, max(2 * maps, maps + twice * self.bytes_out), job.alignment, inputs=self.inputs)
        full, aligned = None if self.delta.tuned is None else self.window.checkpoint, self.alignment is not None
        keys = None if self.maps_first else frozenset[str]().union(*(tensor.needs for tensor in tensors))
        self.plan = self.bases.fitted(tuned=full, aligned=aligned, keys=keys, inputs=self.inputs)
        flops = move_flops(draft)
        self.seconds = move_seconds(flops, self.bases.device) if self.alignment else self.bases.seconds(move=flops)

    def transport(self, alignment: Alignment) -> ComputedUpdate:
        job, how = self.job, {"presumed": True, "one_tokenizer": self.one_tokenizer}
        update = transport(alignment, self.delta, self.bases.windows[1], leave=job.leave, device=job.device, **how)
        return update if self.kind == "adapter" else update.as_tensors()

    def outcome(self, **known: Any) -> Outcome:
        job = describe(self.job, *self.bases.checkpoints, self.tuned) | (self.head.told if self.head else {})
        known |= {"coverage": [asdict(row) for row in self.coverage], "carried": self.behaviour.carried}
        return begun(self, kind=self.kind, job=job, **known)

    def rehearse(self) -> Outcome:
        """What :meth:`run` would do, calibration included; all weights are read, nothing is computed or written."""
        with collected_warnings() as warnings:
            self._warn(warnings)
            known = told(self.alignment) if self.alignment else {}
            if not self.alignment:
                data = self.bases.calibration()
                known = {"calibration": data.description, "tokens": data.tokens}
            check_values(*self.bases.checkpoints, self.tuned)
            draft = self.transport(self.alignment or outline(*self.bases.geometries, self.job.recipe))
            self.coverage = draft.settled()
        return self.outcome(**known, warnings=[*warnings, *draft.warnings])

    def run(self, progress: Progress = quiet) -> Outcome:
        """Align unless an alignment is applied, move and write, block by block.

        Raises:
            InputRefused, NumericalError: nothing is left behind.
            ResourceError: what was done is kept; the same job with ``resume`` goes on.
        """
        if self.maps_first:
            return self._aligned_first(progress)
        job, clock = self.job, Clock()
        with collected_warnings() as warnings:
            self._warn(warnings)
            data = None if self.alignment else self.bases.calibration()
            draft = self.alignment if data is None else self.bases.draft(data)
            assert draft is not None
            update = self.transport(draft)
            self.coverage = update.coverage
            clock.lap("calibration")
            start = told(draft) if data is None else {"calibration": data.description, "tokens": data.tokens}
            outcome = self.outcome(**start, warnings=warnings)
            outcome.job["recipe"] = asdict(draft.recipe)  # its floor follows the models' precision
            alphas = [a.resolved(update) for a in self.alphas]
            outcome.alphas = [
                {"asked": a.asked, "alpha": value, "written": str(place)}
                for a, value, place in zip(self.alphas, alphas, self.places, strict=True)
            ]
            outputs = [self._written(place, alpha) for place, alpha in zip(self.places, alphas, strict=True)]
            provenance: dict[str, Any] = {}

            def known(i: int) -> Outcome:
                """The outcome as one folder tells it, once its tensors are written."""
                outcome.alphas[i]["rounding"] = outputs[i].rounding.as_dict()
                said = [*warnings, *update.warnings, *outputs[i].rounding.warnings()]
                one = {**outcome.job, "alpha": alphas[i]}
                return replace(outcome, job=one, alphas=[outcome.alphas[i]], warnings=said)

            for i, out in enumerate(outputs):
                out.files = {**(out.files or {}), "README.md": lambda i=i: model_card(known(i))}  # type: ignore[misc]
                out.metadata = lambda i=i: {"outcome": told_in_manifest(known(i)), "provenance": provenance}
            stem, described = described_outputs(update, outputs, self.kind, dtype=self.dtype, base_name=job.target)
            key = self.key or self._key(data, draft.recipe)
            writing = self.bases.writing(key, stem=stem, inputs=self.inputs)
            with self.window, Work.open(job.out, described, **writing) as work:
                tensors = described[0].tensors
                how: dict[str, Any] = {"kind": self.kind, "progress": progress("write", len(tensors))}
                sink = UpdateSink(update, outputs, tensors, work, self.window, **how)
                if data is None:
                    began = Clock()
                    apply(sink, draft.pairs, self.bases.windows, work)
                    began.lap("move and write")
                    alignment, seconds = draft, began.seconds
                else:
                    alignment, passage = self.bases.align(data, draft, sink, work, partial(progress, "align"))
                    seconds, outcome.skipped = passage.seconds, passage.skipped
                self.coverage = update.settled()
                provenance |= alignment.provenance
                outcome = replace(outcome, coverage=[asdict(row) for row in self.coverage], **told(alignment))
                work.finish()
                self.done = True
            clock.stages(seconds)
            rounded = [text for out in outputs for text in out.rounding.warnings()]
            outcome.warnings = [*warnings, *dict.fromkeys(update.warnings), *rounded]
        return clock.finish(outcome, job.out, *self.bases.windows, self.window)

    def _aligned_first(self, progress: Progress) -> Outcome:
        """A strength that follows from all of the update needs all maps first: they lie beside the output meanwhile."""
        job, out = self.job, real(self.job.out)
        maps, key = out.with_name(f".{out.name}.maps"), self._key(self.bases.calibration(), self.bases.recipe())
        if there := os.path.lexists(maps):  # of a run that got so far
            refuse_foreign(maps)
        if job.resume and not unfinished(out):
            try:
                tell_apart(out, [*map(real, self.places)], key, overwrite=job.overwrite)
            except AlreadyDone:
                shutil.rmtree(maps, ignore_errors=True)  # a process was killed while it tidied up
                raise
        first = replace(job.alignment, out=maps, resume=job.resume or there, overwrite=job.overwrite or there)
        try:
            with suppress(AlreadyDone):
                AlignSession(first).run(progress)
            outcome = Session(replace(job, maps=str(maps)), key).run(progress)
            shutil.rmtree(maps)
            self.done = True
        except (AlreadyDone, InputRefused, NumericalError):
            if not workplace_of(out).exists():  # else that goes on with these maps
                shutil.rmtree(maps, ignore_errors=True)
            raise
        except (KeyboardInterrupt, ResourceError) as error:
            if not maps.exists():
                raise
            raise type(error)(f"{str(error) or 'interrupted'}; --resume goes on with {maps}, or remove it") from error
        return outcome

    def _key(self, data: Calibration | None, recipe: Recipe) -> dict[str, Any]:
        """All that decides what is written; see :meth:`Bases.key`."""
        job = self.job
        known = {"MAPS": read_manifest(job.maps)["files"]} if job.maps else {}  # by content
        known |= {"alphas": [alpha.asked for alpha in self.alphas], "recipe": asdict(recipe), **options_of(job)}
        return self.bases.key(data, self.tuned, whole=job.verify_inputs, **known)

    def _warn(self, said: list[str]) -> None:
        """Of what the run said that aligned the bases, where that was another; of rows, settings and what stays."""
        if self.alignment:
            said += self.alignment.provenance.get("warnings", [])
        check_rows(self.coverage, self.bases.source, self.bases.target, self.tuned)
        warn_of_settings(self.bases.source, self.tuned)
        doubt = doubt_of_base(self.tuned, self.bases.source, self.bases.geometries[0])
        said += [*([doubt] if doubt else []), *self.behaviour.warnings]

    def _opened(self) -> Alignment:
        maps, whole = str(self.job.maps), self.job.verify_inputs
        if damaged := differences(maps) if whole else []:
            raise InputRefused(f"{maps} is damaged: {'; '.join(damaged)}; align again")
        self.bases.check_identity(alignment := Alignment.load(maps), maps, whole=whole)
        return alignment

    def _written(self, place: Path, alpha: float) -> Written:
        files, whole = dict[str, Any](), self.kind != "adapter"
        if whole:
            dtype = self.job.out_dtype if self.dtype and self.kind == "checkpoint" else ""
            files["config.json"] = config_of(self.head, self.bases.target, self.tuned, self.behaviour.config, dtype)
        if whole or has_tokenizer(self.tuned.folder):
            files |= self.behaviour.beside(self.bases.target.folder, whole=whole)
        return Written(place, alpha, files)
