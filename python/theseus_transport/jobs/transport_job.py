"""Jobs from files to files: check everything, align or read an alignment, move, write; what the command runs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..alignment.alignment import Alignment
from ..budget.plan import Plan
from ..calibration.calibration import Calibration
from ..errors import AlreadyDone, InputRefused, NumericalError, ResourceError
from ..files.companions import has_tokenizer
from ..files.earlier_runs import tell_apart, unfinished, workplace_of
from ..files.headers import real
from ..files.journal import Work
from ..files.result_folder import read_manifest, refuse_foreign
from ..files.writer import Ending
from ..progress import Progress, quiet
from ..recipes.recipe import Recipe
from ..streaming.sinks import UpdateSink, apply
from ..updates.alpha import Strength
from ..updates.fates import TensorFate
from ..updates.output import Written, described_outputs
from ..updates.trained_on import doubt_of_base
from .align_job import AlignSession
from .bases import Fit
from .checks import check_values
from .model_card import model_card
from .outcome import Clock, Outcome, begun, collected_warnings, describe, told, told_in_manifest
from .prepared import Inputs, Prepared, check, open_inputs, prepare
from .settings import DTYPES, Job, options_of
from .task_classes import config_of
from .tune_settings import warn_of_settings
from .vocabularies import check_rows


def fit(prepared: Prepared) -> Fit:
    """How it fits the memory it may take; see :meth:`Bases.fit`."""
    inputs = prepared.inputs
    return inputs.bases.fit(
        tuned=None if inputs.delta.tuned is None else inputs.tune,
        aligned=prepared.alignment is not None and not prepared.alignment.recipe.fits,
        keys=prepared.needs,
        inputs=inputs.folders,
        flops=prepared.flops,
    )


def rehearse(prepared: Prepared, fitted: Fit) -> Outcome:
    """What :func:`carry_out` would do, calibration included; all weights are read, nothing is computed or written."""
    inputs = prepared.inputs
    with collected_warnings() as warnings:
        _warn(prepared, warnings)
        if prepared.alignment:
            known = told(prepared.alignment)
        else:
            data = fitted.calibration()
            known = {"calibration": data.description, "tokens": data.tokens}
        check_values(*inputs.bases.checkpoints, inputs.tuned)
        draft = inputs.transport(prepared.alignment or inputs.outline())
        fates = draft.settled()
    return _outcome(prepared, fitted, fates, **known, warnings=[*warnings, *draft.warnings])


def carry_out(
    prepared: Prepared,
    fitted: Fit,
    progress: Progress = quiet,
    *,
    finished: Callable[[], None] = lambda: None,
    key: dict[str, Any] | None = None,
) -> Outcome:
    """Align unless an alignment is applied, move and write, block by block.

    Args:
        finished: called once all is written.
        key: of what is written, where this is a part of another job.

    Raises:
        InputRefused, NumericalError: nothing is left behind.
        ResourceError: what was done is kept; the same job with ``resume`` goes on.
    """
    if prepared.maps_first:
        return _aligned_first(prepared, fitted, progress, finished)
    inputs, job, clock = prepared.inputs, prepared.inputs.job, Clock()
    with collected_warnings() as warnings:
        _warn(prepared, warnings)
        draft, data = _draft(prepared, fitted)
        update = inputs.transport(draft)
        clock.lap("calibration")
        outputs = [
            _written(prepared, place, alpha.resolved(update))
            for place, alpha in zip(prepared.places, inputs.alphas, strict=True)
        ]
        stem, described = described_outputs(
            update, outputs, inputs.kind, dtype=DTYPES[job.out_dtype], base_name=job.target
        )
        key = key or _key(inputs, fitted, data, draft.recipe)
        writing = inputs.bases.writing(key, stem=stem, inputs=inputs.folders)
        with inputs.window, Work.open(job.out, described, **writing) as work:
            tensors = described[0].tensors
            how: dict[str, Any] = {"kind": inputs.kind, "progress": progress("write", len(tensors))}
            sink = UpdateSink(update, outputs, tensors, work, inputs.window, **how)
            alignment, seconds, skipped = _moved(
                fitted, draft, data, sink, work, progress, given=prepared.alignment is not None
            )
            outcome = _outcome(prepared, fitted, update.settled(), **told(alignment), skipped=skipped)
            outcome.job["recipe"] = asdict(draft.recipe)  # its floor follows the models' precision
            outcome.alphas = [_strength(*each) for each in zip(inputs.alphas, outputs, strict=True)]
            said = [*warnings, *update.warnings]
            each = [_told_of(outcome, i, output, said) for i, output in enumerate(outputs)]
            work.finish([_ending(one, alignment) for one in each])
            finished()
        clock.stages(seconds)
        rounded = [text for out in outputs for text in out.rounding.warnings()]
        outcome.warnings = [*warnings, *dict.fromkeys(update.warnings), *rounded]
    return clock.finish(outcome, job.out, *inputs.bases.windows, inputs.window)


class Session:
    """A job that is opened, checked, prepared and fitted; that refuses what cannot work, before anything heavy runs.

    Attributes:
        done: all is written.
    """

    def __init__(self, job: Job) -> None:
        self.job, self.inputs, self.done = job, open_inputs(job), False
        check(self.inputs)
        self.prepared = prepare(self.inputs)
        self.fitted = fit(self.prepared)

    @property
    def plan(self) -> Plan:
        """How it fits the memory it may take."""
        return self.fitted.plan

    @property
    def seconds(self) -> dict[str, float]:
        """Predicted, by stage."""
        return self.fitted.seconds

    def rehearse(self) -> Outcome:
        """What :meth:`run` would do, calibration included; all weights are read, nothing is computed or written."""
        return rehearse(self.prepared, self.fitted)

    def run(self, progress: Progress = quiet) -> Outcome:
        """Align unless an alignment is applied, move and write; errors are those of :func:`carry_out`."""
        return carry_out(self.prepared, self.fitted, progress, finished=self._finish)

    def _finish(self) -> None:
        self.done = True


def _draft(prepared: Prepared, fitted: Fit) -> tuple[Alignment, Calibration | None]:
    """What is applied, or the outline of what is to be made and what it is made on."""
    alignment = prepared.alignment
    if alignment and not alignment.recipe.fits:
        return alignment, None
    data = fitted.calibration()
    return alignment or fitted.draft(data), data


def _moved(
    fitted: Fit,
    draft: Alignment,
    data: Calibration | None,
    sink: UpdateSink,
    work: Work,
    progress: Progress,
    *,
    given: bool,
) -> tuple[Alignment, dict[str, float], str]:
    """The alignment once all is moved through it, seconds by stage, and what was not run."""
    if data is None:
        began = Clock()
        apply(sink, draft.pairs, fitted.bases.windows, work)
        began.lap("move and write")
        return draft, began.seconds, ""
    how: dict[str, Any] = {"update": sink.update, "given": given}
    alignment, passage = fitted.align(data, draft, sink, work, partial(progress, "align"), **how)
    return alignment, passage.seconds, passage.skipped


def _aligned_first(prepared: Prepared, fitted: Fit, progress: Progress, finished: Callable[[], None]) -> Outcome:
    """A strength that follows from all of the update needs all maps first: they lie beside the output meanwhile."""
    inputs, job, out = prepared.inputs, prepared.inputs.job, real(prepared.inputs.job.out)
    maps = out.with_name(f".{out.name}.maps")
    key = _key(inputs, fitted, fitted.calibration(), inputs.bases.recipe())
    if there := os.path.lexists(maps):  # of a run that got so far
        refuse_foreign(maps)
    if job.resume and not unfinished(out):
        try:
            tell_apart(out, [*map(real, prepared.places)], key, overwrite=job.overwrite)
        except AlreadyDone:
            shutil.rmtree(maps, ignore_errors=True)  # a process was killed while it tidied up
            raise
    first = replace(job.alignment, out=maps, resume=job.resume or there, overwrite=job.overwrite or there)
    try:
        with suppress(AlreadyDone):
            AlignSession(first).run(progress)
        second = Session(replace(job, maps=str(maps)))
        outcome = carry_out(second.prepared, second.fitted, progress, key=key)
        shutil.rmtree(maps)
        finished()
    except (AlreadyDone, InputRefused, NumericalError):
        if not workplace_of(out).exists():  # else that goes on with these maps
            shutil.rmtree(maps, ignore_errors=True)
        raise
    except (KeyboardInterrupt, ResourceError) as error:
        if not maps.exists():
            raise
        raise type(error)(f"{str(error) or 'interrupted'}; --resume goes on with {maps}, or remove it") from error
    return outcome


def _key(inputs: Inputs, fitted: Fit, data: Calibration | None, recipe: Recipe) -> dict[str, Any]:
    """All that decides what is written; see :meth:`Fit.key`."""
    job = inputs.job
    known = {"MAPS": read_manifest(job.maps)["files"]} if job.maps else {}  # by content
    known |= {"alphas": [alpha.asked for alpha in inputs.alphas], "recipe": asdict(recipe), **options_of(job)}
    return fitted.key(data, inputs.tuned, whole=job.verify_inputs, **known)


def _warn(prepared: Prepared, said: list[str]) -> None:
    """Of what the run said that aligned the bases, where that was another; of rows, settings and what stays."""
    inputs, bases = prepared.inputs, prepared.inputs.bases
    if prepared.alignment:
        said += prepared.alignment.provenance.get("warnings", [])
    check_rows(prepared.coverage, bases.source, bases.target, inputs.tuned)
    warn_of_settings(bases.source, inputs.tuned)
    doubt = doubt_of_base(inputs.tuned, bases.source, bases.geometries.source)
    said += [*([doubt] if doubt else []), *prepared.behaviour.warnings]


def _written(prepared: Prepared, place: Path, alpha: float) -> Written:
    """A folder to write, with what belongs beside the tensors."""
    inputs, behaviour = prepared.inputs, prepared.behaviour
    job, target, tuned = inputs.job, inputs.bases.target, inputs.tuned
    files, whole = dict[str, Any](), inputs.kind != "adapter"
    if whole:
        dtype = job.out_dtype if DTYPES[job.out_dtype] and inputs.kind == "checkpoint" else ""
        files["config.json"] = config_of(prepared.head, target, tuned, behaviour.config, dtype)
    if whole or has_tokenizer(tuned.folder):
        files |= behaviour.beside(target.folder, whole=whole)
    return Written(place, alpha, files)


def _outcome(prepared: Prepared, fitted: Fit, fates: Sequence[TensorFate], **known: Any) -> Outcome:
    inputs, head = prepared.inputs, prepared.head
    job = describe(inputs.job, *inputs.bases.checkpoints, inputs.tuned) | (head.told if head else {})
    known |= {"coverage": [asdict(fate) for fate in fates], "carried": prepared.behaviour.carried}
    return begun(fitted, kind=inputs.kind, job=job, bytes_out=prepared.bytes_out, **known)


def _strength(asked: Strength, output: Written) -> dict[str, Any]:
    """What is told of one strength, once its folder is written."""
    known = {"asked": asked.asked, "alpha": output.alpha, "written": str(output.folder)}
    return {**known, "rounding": output.rounding.as_dict()}


def _told_of(outcome: Outcome, i: int, output: Written, said: list[str]) -> Outcome:
    """The outcome as one folder tells it, once its tensors are written."""
    one, said = {**outcome.job, "alpha": output.alpha}, [*said, *output.rounding.warnings()]
    return replace(outcome, job=one, alphas=[outcome.alphas[i]], warnings=said)


def _ending(outcome: Outcome, alignment: Alignment) -> Ending:
    told = {"outcome": told_in_manifest(outcome), "provenance": alignment.provenance}
    return Ending({"README.md": model_card(outcome)}, told)
