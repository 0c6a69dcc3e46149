"""What a job reads, and what it will do, before anything heavy runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..alignment.alignment import Alignment
from ..budget.time import move_flops
from ..errors import InputRefused
from ..files.checkpoint import Checkpoint
from ..files.earlier_runs import check_room
from ..files.result_folder import differences
from ..files.writer import planned_bytes
from ..streaming.resident import Resident
from ..streaming.tune import open_tune
from ..streaming.window import Window
from ..updates.alpha import Strength, chosen, folders
from ..updates.changes import first_change
from ..updates.computed import ComputedUpdate
from ..updates.delta import Delta
from ..updates.factored import RANK
from ..updates.fates import TensorFate
from ..updates.merged import Merged
from ..updates.output import Kind, kind_of, planned
from ..updates.transport import transport
from .bases import Bases
from .behaviour import Behaviour, behaviour_of
from .checks import check_dtypes, check_left, check_tune
from .provenance import check_identity
from .settings import DTYPES, Job
from .task_classes import NewHead
from .vocabularies import one_tokenizer


@dataclass(frozen=True)
class Inputs:
    """What a job reads, opened.

    Attributes:
        kind: of what is written.
        delta: the update; window: through which tensors of the tune are read.
        one_tokenizer: of both bases, though their vocabularies have other sizes.
    """

    job: Job
    alphas: list[Strength]
    bases: Bases
    tuned: Checkpoint
    kind: Kind
    delta: Delta
    window: Window
    one_tokenizer: bool

    @property
    def tune(self) -> Checkpoint | Merged:
        """What its tensors are read from."""
        read = self.window.checkpoint
        assert not isinstance(read, Resident)
        return read

    @property
    def folders(self) -> list[Path]:
        """What the output may not overlap."""
        maps = [Path(self.job.maps)] if self.job.maps else []
        return [*self.bases.inputs, self.tuned.folder, *maps]

    def transport(self, alignment: Alignment) -> ComputedUpdate:
        """The update of the target; nothing is computed."""
        job, how = self.job, dict[str, Any](presumed=True, one_tokenizer=self.one_tokenizer)
        made = RANK if self.kind == "adapter" and self.delta.adapter is None else None
        how |= {"rank": job.rank or made, "only_targeted": job.only_targeted}
        update = transport(alignment, self.delta, self.bases.windows.target, leave=job.leave, device=job.device, **how)
        return update if self.kind == "adapter" else update.as_tensors()


@dataclass(frozen=True)
class Prepared:
    """What a job will do, as far as that is known before anything heavy runs.

    Attributes:
        alignment: that is applied; None: it is to be made.
        places: folders to write, one for every strength.
        maps_first: a strength follows from all that maps move, so that all maps are made before anything is moved.
        update_first: a strength follows from all of the update, fits included, so that it is written by itself first.
        needs: keys of the alignment's rules and vectors that are wanted; None: all.
        fits: layers of the target that will be fitted -> rank of the factors they get; None: they are whole.
        flops: of moving.
    """

    inputs: Inputs
    behaviour: Behaviour
    alignment: Alignment | None
    coverage: list[TensorFate]
    head: NewHead | None
    places: list[Path]
    bytes_out: int
    maps_first: bool
    update_first: bool
    needs: frozenset[str] | None
    fits: dict[str, int | None]
    flops: int


def open_inputs(job: Job) -> Inputs:
    """Both bases and the tune, which is what its folder says."""
    alphas, bases = chosen(job.strength), Bases.open(job.alignment)
    tuned = Checkpoint.open(job.tuned, allow_pickle=job.allow_pickle)
    kind = kind_of(job.output, tuned, job.rank)
    base, family = bases.windows.source, bases.geometries.source.family
    as_adapter = kind == "adapter" and job.rank is None  # at a rank of its own what is merged becomes factors again
    delta, window = open_tune(tuned, bases.source, base, family, as_adapter=as_adapter)
    return Inputs(job, alphas, bases, tuned, kind, delta, window, one_tokenizer(*bases.checkpoints))


def check(inputs: Inputs) -> None:
    """Refuse a tune that is none of the source."""
    check_dtypes(inputs.tuned)
    check_tune(inputs.bases.source, inputs.tuned, inputs.bases.geometries.source)


def prepare(inputs: Inputs) -> Prepared:
    """What of the update moves, where to, and whether there is room for it."""
    job, bases, tuned = inputs.job, inputs.bases, inputs.tuned
    behaviour = behaviour_of(bases.source, tuned, bases.target)
    alignment = _opened(inputs) if job.maps else None
    draft = inputs.transport(alignment or inputs.bases.outline)
    first_change(draft)
    head = NewHead.of(draft, tuned, bases.target)
    check_left(job.leave, draft.coverage, bases.source, tuned)
    places = folders(job.out, inputs.alphas)
    tensors = planned(draft, inputs.kind, DTYPES[job.out_dtype])
    bytes_out = len(places) * planned_bytes(tensors)
    asked, fits = {alpha.asked for alpha in inputs.alphas}, bool(draft.fits.planned)
    maps_first = alignment is None and "match" in asked and not fits
    update_first = "auto" in asked or ("match" in asked and fits)
    maps = bases.bytes_of_maps if maps_first else 0
    twice = 2 if inputs.kind == "delta" else 1  # what did not change is left out by a copy, at the end
    if update_first:
        kind: Kind = "adapter" if inputs.kind == "adapter" else "delta"
        maps += 2 * planned_bytes(planned(draft, kind, torch.float32))
    check_room(places, max(2 * maps, maps + twice * bytes_out), job.alignment, inputs=inputs.folders)
    needs = None if maps_first else frozenset[str]().union(*(tensor.needs for tensor in tensors))
    return Prepared(
        inputs=inputs,
        behaviour=behaviour,
        alignment=alignment,
        coverage=draft.coverage,
        head=head,
        places=places,
        bytes_out=bytes_out,
        maps_first=maps_first,
        update_first=update_first,
        needs=needs,
        fits={layer: how.rank if how else None for layer, how in draft.fits.planned.items()},
        flops=move_flops(draft),
    )


def _opened(inputs: Inputs) -> Alignment:
    """The alignment to apply, which is of these bases."""
    maps, whole, bases = str(inputs.job.maps), inputs.job.verify_inputs, inputs.bases
    if damaged := differences(maps) if whole else []:
        raise InputRefused(f"{maps} is damaged: {'; '.join(damaged)}; align again")
    alignment = Alignment.load(maps)
    check_identity(alignment, maps, bases.checkpoints, bases.geometries, whole=whole)
    return alignment
