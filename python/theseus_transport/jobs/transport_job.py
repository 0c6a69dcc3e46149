"""Jobs from files to files: check everything, align or read an alignment, move, write; what the command runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from ..alignment.alignment import Alignment
from ..budget.plan import Plan
from ..calibration.calibration import Calibration
from ..errors import AlreadyDone
from ..files.journal import Work
from ..files.result_folder import read_manifest
from ..progress import Progress, quiet
from ..recipes.recipe import Recipe
from ..streaming.passage import Passage
from ..streaming.sinks import UpdateSink, apply
from ..updates.alpha import TRIED
from ..updates.fates import TensorFate
from ..updates.output import described_outputs, highest_rank
from ..updates.trained_on import doubt_of_base
from .align_job import AlignSession
from .bases import Fit
from .calibrating import warn_of_rows
from .checks import check_values
from .in_two_steps import add, beside
from .outcome import Clock, Outcome, arrived, begun, collected_warnings, describe, told
from .prepared import Inputs, Prepared, check, open_inputs, prepare
from .settings import DTYPES, Job, options_of
from .tune_settings import warn_of_settings
from .verdict import doubts
from .vocabularies import check_rows
from .written import ending, strength, told_of, written


def fit(prepared: Prepared) -> Fit:
    """How it fits the memory it may take; see :meth:`Bases.fit`."""
    inputs = prepared.inputs
    return inputs.bases.fit(
        tuned=None if inputs.delta.tuned is None else inputs.tune,
        aligned=prepared.alignment is not None,
        keys=prepared.needs,
        fits=prepared.fits,
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
        draft = inputs.transport(prepared.alignment or inputs.bases.outline)
        fates = draft.settled()
    return _outcome(prepared, fitted, fates, **known, warnings=[*warnings, *draft.warnings])


def carry_out(
    prepared: Prepared,
    fitted: Fit,
    progress: Progress = quiet,
    *,
    finished: Callable[[], None] = lambda: None,
    key: dict[str, Any] | None = None,
    stem: str | None = None,
    strengths: Sequence[float] = (),
) -> Outcome:
    """Align unless an alignment is applied, move and write, block by block.

    Args:
        finished: called once all is written.
        key, stem: of what is written and of its files, where this is a part of another job.
        strengths: others than 1 that are tried on the rows that are held out.

    Raises:
        InputRefused, NumericalError: nothing is left behind.
        ResourceError: what was done is kept; the same job with ``resume`` goes on.
    """
    inputs, job, clock = prepared.inputs, prepared.inputs.job, Clock()
    with collected_warnings() as warnings:
        _warn(prepared, warnings)
        draft, data = _draft(prepared, fitted)
        update = inputs.transport(draft)
        if data and update.fits.planned:
            warn_of_rows(job.calibration, data.tokens, draft.target, draft.recipe)
        clock.lap("calibration")
        outputs = [
            written(prepared, place, alpha.resolved(update))
            for place, alpha in zip(prepared.places, inputs.alphas, strict=True)
        ]
        own, described = described_outputs(
            update, outputs, inputs.kind, dtype=DTYPES[job.out_dtype], base_name=job.target
        )
        key = key or key_of(inputs, fitted, data, draft.recipe)
        writing = inputs.bases.writing(key, stem=stem or own, inputs=inputs.folders)
        with inputs.window, Work.open(job.out, described, **writing) as work:
            tensors = described[0].tensors
            how: dict[str, Any] = {"kind": inputs.kind, "progress": progress("write", len(tensors))}
            sink = UpdateSink(update, outputs, tensors, work, inputs.window, **how)
            how = {"given": prepared.alignment is not None, "strengths": strengths}
            alignment, passage, seconds = _moved(fitted, draft, data, sink, work, progress, **how)
            outcome = _outcome(prepared, fitted, update.settled(), **told(alignment), **arrived(passage))
            outcome.fits, outcome.rank = update.fits.told(), highest_rank(update, inputs.kind)
            outcome.job["recipe"] = asdict(draft.recipe)  # its floor follows the models' precision
            outcome.alphas = [strength(*each) for each in zip(inputs.alphas, outputs, strict=True)]
            warnings += doubts(outcome)
            said = [*warnings, *update.warnings]
            each = [told_of(outcome, i, output, said) for i, output in enumerate(outputs)]
            work.finish([ending(one, alignment.provenance) for one in each])
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
        if self.prepared.maps_first:
            return self._aligned_first(progress)
        if self.prepared.update_first:
            return self._updated_first(progress)
        return carry_out(self.prepared, self.fitted, progress, finished=self._finish)

    def _aligned_first(self, progress: Progress) -> Outcome:
        """A strength that follows from all that maps move needs all maps first."""
        job, prepared, fitted = self.job, self.prepared, self.fitted
        key = key_of(prepared.inputs, fitted, fitted.calibration(), prepared.inputs.bases.recipe())
        with beside(prepared, key, "maps") as (place, resume, overwrite):
            with suppress(AlreadyDone):
                AlignSession(replace(job.alignment, out=place, resume=resume, overwrite=overwrite)).run(progress)
            second = Session(replace(job, maps=str(place)))
            outcome = carry_out(second.prepared, second.fitted, progress, key=key)
        self._finish()
        return outcome

    def _updated_first(self, progress: Progress) -> Outcome:
        """A strength that follows from all of the update, fits included, needs that first; then it is added."""
        job, prepared, fitted = self.job, self.prepared, self.fitted
        inputs = prepared.inputs
        key = key_of(inputs, fitted, fitted.calibration(), inputs.bases.recipe())
        tried = TRIED if any(alpha.asked == "auto" for alpha in inputs.alphas) else ()
        with beside(prepared, key, "update") as (place, resume, overwrite):
            kind = "adapter" if inputs.kind == "adapter" else "delta"
            how: dict[str, Any] = {"alpha": 1.0, "output": kind, "out_dtype": "float32"}
            first = Session(replace(job, out=place, resume=resume, overwrite=overwrite, **how))
            stem, made = None if kind == "adapter" else "model", None
            with suppress(AlreadyDone):
                made = carry_out(first.prepared, first.fitted, progress, stem=stem, strengths=tried)
            outcome = add(prepared, fitted, place, key, progress, made)
        self._finish()
        return outcome

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
    **how: Any,
) -> tuple[Alignment, Passage | None, dict[str, float]]:
    """The alignment once all is moved through it, the pass that did if one ran, and seconds by stage."""
    if data is None:
        began = Clock()
        apply(sink, draft.pairs, fitted.bases.windows, work)
        began.lap("move and write")
        return draft, None, began.seconds
    alignment, passage = fitted.align(data, draft, sink, work, partial(progress, "align"), update=sink.update, **how)
    return alignment, passage, passage.seconds


def key_of(inputs: Inputs, fitted: Fit, data: Calibration | None, recipe: Recipe) -> dict[str, Any]:
    """All that decides what is written, a prior as it was asked for; see :meth:`Fit.key`."""
    job = inputs.job
    known = {"MAPS": read_manifest(job.maps)["files"]} if job.maps else {}  # by content
    known |= {
        "alphas": [alpha.asked for alpha in inputs.alphas],
        "recipe": asdict(recipe) | {"prior": job.recipe.prior},
    }
    known |= options_of(job)
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


def _outcome(prepared: Prepared, fitted: Fit, fates: Sequence[TensorFate], **known: Any) -> Outcome:
    inputs, head = prepared.inputs, prepared.head
    job = describe(inputs.job, *inputs.bases.checkpoints, inputs.tuned) | (head.told if head else {})
    known |= {"coverage": [asdict(fate) for fate in fates], "carried": prepared.behaviour.carried}
    return begun(fitted, kind=inputs.kind, job=job, bytes_out=prepared.bytes_out, **known)
