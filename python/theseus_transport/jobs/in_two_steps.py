"""Jobs in two steps, where a strength follows from all that the first makes: it lies beside the output meanwhile."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ..alignment.alignment import outline
from ..errors import AlreadyDone, InputRefused, NumericalError, ResourceError
from ..files.checkpoint import Checkpoint
from ..files.earlier_runs import tell_apart, unfinished, workplace_of
from ..files.headers import real
from ..files.journal import Work
from ..files.result_folder import read_manifest, refuse_foreign
from ..models.base import Base
from ..models.family import Slot
from ..models.tensors import part_of
from ..progress import Progress
from ..recipes.recipe import Recipe
from ..updates.adapted import saved_whole
from ..updates.adapter import PREFIX, Factors
from ..updates.computed import ComputedUpdate
from ..updates.fates import Computation, MovedFactors
from ..updates.output import described_outputs
from .bases import Fit
from .outcome import Clock, Outcome, describe
from .prepared import Prepared
from .settings import DTYPES
from .verdict import doubts
from .written import ending, strength, told_of, written


@contextmanager
def beside(prepared: Prepared, key: dict[str, Any], what: str) -> Iterator[tuple[Path, bool, bool]]:
    """A place beside the output for the first step, removed behind the second; how to begin it: resume, overwrite.

    Args:
        key: of the output, which may be there already.

    Raises:
        AlreadyDone: the output is there.
    """
    job, out = prepared.inputs.job, real(prepared.inputs.job.out)
    place = out.with_name(f".{out.name}.{what}")
    if there := os.path.lexists(place):  # of a run that got so far
        refuse_foreign(place)
    if job.resume and not unfinished(out):
        try:
            tell_apart(out, [*map(real, prepared.places)], key, overwrite=job.overwrite)
        except AlreadyDone:
            shutil.rmtree(place, ignore_errors=True)  # a process was killed while it tidied up
            raise
    try:
        yield place, job.resume or there, job.overwrite or there
        shutil.rmtree(place)
    except (AlreadyDone, InputRefused, NumericalError):
        if not workplace_of(out).exists():  # else that goes on with what lies there
            shutil.rmtree(place, ignore_errors=True)
        raise
    except (KeyboardInterrupt, ResourceError) as error:
        if not place.exists():
            raise
        left = [str(path) for path in (workplace_of(out), place) if path.exists() and str(path) not in str(error)]
        cure = f"--resume goes on with {' and '.join(left)}, or remove {'them' if left[1:] else 'it'}"
        raise type(error)(f"{str(error) or 'interrupted'}; {cure}") from error


def add(
    prepared: Prepared, fitted: Fit, place: Path, key: dict[str, Any], progress: Progress, first: Outcome | None
) -> Outcome:
    """Write the output of an update that lies in ``place``, at the strengths that follow from it.

    Args:
        first: what it was made by; None: another process.
    """
    inputs, job, clock = prepared.inputs, prepared.inputs.job, Clock()
    known = read_manifest(place)["metadata"]
    made = Outcome(**known["outcome"])
    draft = inputs.transport(outline(*inputs.bases.geometries, Recipe(**made.job["recipe"]), made.blocks))
    update = stored(draft, Checkpoint.open(place))
    tried = {float(alpha): share for alpha, share in made.removed.items()}
    outputs = [
        written(prepared, folder, alpha.resolved(update, tried))
        for folder, alpha in zip(prepared.places, inputs.alphas, strict=True)
    ]
    stem, described = described_outputs(update, outputs, inputs.kind, dtype=DTYPES[job.out_dtype], base_name=job.target)
    writing = inputs.bases.writing(key, stem=stem, inputs=inputs.folders)
    with Work.open(job.out, described, **writing) as work:
        step = progress("write", len(described[0].tensors))
        for tensor in described[0].tensors:
            work.write(tensor.name)
            step()
        told = describe(job, *inputs.bases.checkpoints, inputs.tuned) | {"recipe": made.job["recipe"]}
        told |= prepared.head.told if prepared.head else {}
        outcome = replace(made, job=told, kind=inputs.kind, bytes_out=prepared.bytes_out)
        outcome.predicted_bytes, outcome.predicted_seconds = fitted.plan.peak, fitted.seconds
        outcome.plan = fitted.plan.choice.words
        outcome.alphas = [strength(*each) for each in zip(inputs.alphas, outputs, strict=True)]
        made.warnings = [*(text for text in made.warnings if text not in doubts(made)), *doubts(outcome)]
        each = [told_of(outcome, i, output, made.warnings) for i, output in enumerate(outputs)]
        work.finish([ending(one, known["provenance"]) for one in each])
    rounded = [text for out in outputs for text in out.rounding.warnings()]
    outcome.warnings = [*made.warnings, *rounded]
    clock.lap("write")
    clock.stages(first.seconds if first else {})
    clock.finish(outcome, job.out, *inputs.bases.windows, inputs.window)
    outcome.bytes_read = (outcome.bytes_read or 0) + (first.bytes_read or 0 if first else 0)
    return outcome


def stored(update: ComputedUpdate, files: Checkpoint) -> ComputedUpdate:
    """An update whose values were written: they are read, not computed.

    Args:
        update: which tensors of the target move, as planned.
        files: a delta under the target's names, or an adapter.
    """
    computations: dict[str, dict[str, Computation]] = {}
    factors: dict[str, MovedFactors] = {}
    if files.kind == "adapter":
        there = {layer for layer in update.factors if f"{PREFIX}{layer}.lora_A.weight" in files}
        for layer in there:
            compute = partial(_factors, files, layer, update.factors[layer])
            factors[layer] = replace(update.factors[layer], compute=compute, needs=frozenset[str]())
        whole = {name: f"{PREFIX}{own}" for own, name in saved_whole(update).items()}
    else:
        whole = {slot.stored: slot.stored for slot in update.target.slots.values() if slot.stored in files}
    for name, slot in update.target.slots.items():
        layer, of = slot.stored.removesuffix(".weight"), whole.get(slot.stored)
        if of is not None:
            read = partial(_read, files, of, name, update.target if of.startswith(PREFIX) else None, slot)
        elif layer in factors:
            read = partial(_product, factors[layer], name, slot)
        else:
            continue
        tiles = update.tiles(slot.stored) if of is not None and slot.parts == 1 and not slot.transposed else ()
        known = Computation(read, frozenset(), frozenset({"stored"}), tiles)
        computations.setdefault(slot.stored, {})[name] = known
    return replace(update, factors=factors, presumed=set[str](), unchanged=set[str](), _computations=computations)


def _read(
    files: Checkpoint, of: str, name: str, base: Base | None, slot: Slot, rows: slice | None
) -> dict[str, Tensor]:
    """A value as it is stored; what an adapter saves whole holds the ``base`` too."""
    value = part_of(files, replace(slot, stored=of), rows).double()
    return {name: value if base is None else value - base.need(name, rows)}


def _product(moved: MovedFactors, name: str, slot: Slot, rows: slice | None) -> dict[str, Tensor]:
    f = moved.compute()
    whole = (f.b @ f.a).mul_(f.scaling).chunk(slot.parts)[slot.part]
    return {name: whole if rows is None else whole[rows]}


def _factors(files: Checkpoint, layer: str, moved: MovedFactors) -> Factors:
    a, b = (files[f"{PREFIX}{layer}.lora_{factor}.weight"].double() for factor in "AB")
    return Factors(a, b, moved.scaling)
