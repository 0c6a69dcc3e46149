"""Two base models on disk: opened and checked, fitted to the memory there is, and aligned."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from ..activations.inputs import SideInfo
from ..activations.links import Blocks, Pairs
from ..alignment.alignment import Alignment, outline
from ..alignment.depth import SIMILARITY, WORDS, blocks_asked, read_depth
from ..alignment.prior import undecided, with_prior
from ..budget.needs import held_in_memory, needed, tokens_for
from ..budget.plan import Plan, fitted
from ..budget.sizes import Sizes
from ..budget.terms import Terms
from ..budget.time import Effort, move_seconds
from ..calibration.calibration import Calibration
from ..calibration.extent import Extent
from ..errors import InputRefused
from ..files.checkpoint import Checkpoint
from ..files.earlier_runs import unfinished
from ..files.headers import real
from ..files.journal import Work
from ..machine import available_memory, find_device, free_device_memory, resident_memory
from ..models.base import Base
from ..models.geometry import Geometry
from ..models.pair import SIDES, Pair
from ..recipes.recipe import Recipe
from ..recipes.solver import Solver
from ..streaming.block_pairing import pair_streamed
from ..streaming.hidden_states import check_offload, own_folder
from ..streaming.passage import Passage, Sink, all_together
from ..streaming.prior import decided_streamed
from ..streaming.window import Window
from ..updates.arguments import check_whole
from ..updates.computed import ComputedUpdate
from ..updates.merged import Merged
from .calibrating import Calibrating
from .checks import check_dtypes, read_geometry
from .provenance import reference_of, versions
from .settings import AlignJob

ARGUMENTS = SIDES.map(str.upper)  # as the command names them


@dataclass(frozen=True)
class Bases:
    """Source and target of a job, opened and checked; nothing is computed.

    Attributes:
        references: how a later command finds them.
        checkpoints, geometries, windows: of source and target.
        blocks: for every target block the source block that feeds it, as asked; None: by similarity.
    """

    job: AlignJob
    device: torch.device
    references: Pair[str]
    checkpoints: Pair[Checkpoint]
    geometries: Pair[Geometry]
    windows: Pair[Window]
    blocks: list[int | None] | None

    @classmethod
    def open(cls, job: AlignJob) -> Bases:
        """Refuses numbers, folders, kinds and dtypes that cannot be what a job needs."""
        asked = {} if job.tokens is None else {"tokens": (job.tokens, 1)}
        check_whole(**asked, batch_size=(job.batch_size, 1), seed=(job.seed, 0))
        device, given = find_device(job.device), Pair(job.source, job.target)
        references = given.map(reference_of)
        checkpoints = given.map(lambda reference: Checkpoint.open(reference, allow_pickle=job.allow_pickle))
        for name, checkpoint in ARGUMENTS.zip(checkpoints):
            if checkpoint.kind == "adapter":
                base = checkpoint.adapter_config.get("base_model_name_or_path") or "which it does not name"
                raise InputRefused(f"{name} {checkpoint.folder} is an adapter; give the base it was trained on, {base}")
        geometries = ARGUMENTS.zip(checkpoints).map(lambda named: read_geometry(*named))
        check_dtypes(*checkpoints)
        blocks = blocks_asked(read_depth(job.depth), geometries, "--depth")
        opened = cls(job, device, references, checkpoints, geometries, checkpoints.map(Window), blocks)
        opened.calibrating.check()
        return opened

    @property
    def source(self) -> Checkpoint:
        return self.checkpoints.source

    @property
    def target(self) -> Checkpoint:
        return self.checkpoints.target

    @property
    def inputs(self) -> list[Path]:
        """What the output may not overlap."""
        told = [] if self.job.depth in WORDS else [real(self.job.depth)]
        return [*(c.folder for c in self.checkpoints), *self.calibrating.inputs, *told]

    @property
    def outline(self) -> Alignment:
        """What an alignment will hold; where blocks are still to be compared, with blocks paired by position."""
        return outline(*self.geometries, self.recipe(), self.blocks)

    @property
    def bytes_of_maps(self) -> int:
        """Bytes of all maps that an alignment between the two bases may hold."""
        return sum(dtype.itemsize * prod(shape) for _, shape, dtype in self.outline.planned_maps)

    def fit(
        self,
        *,
        tuned: Checkpoint | Merged | None = None,
        aligned: bool = False,
        keys: frozenset[str] | None = None,
        fits: Mapping[str, int | None] = MappingProxyType({}),
        inputs: Sequence[Path] = (),
        flops: int = 0,
    ) -> Fit:
        """How the run fits the memory it may take.

        Args:
            tuned: a full tune that is moved, with ``flops``; aligned: the maps are there already.
            keys: of the alignment's rules and vectors that are wanted; None: all.
            fits: layers of the target that will be fitted -> rank of the factors they get; None: they are whole.
            inputs: more of them, in which no file of hidden states may lie.

        Raises:
            ResourceError: it does not fit.
            InputRefused: as :func:`check_offload`.
        """
        job, free, solver = self.job, available_memory(), self.solver()
        names = needed(solver, keys)
        tokens = job.tokens or tokens_for(solver, names, fits)
        there = aligned and not self.recipe().fits
        extent = Extent(0, Pair(0, 0), 0) if there else self.calibrating.extent(tokens)
        sizes = Sizes(
            checkpoints=self.checkpoints,
            geometries=self.geometries,
            recipe=self.recipe(),
            tuned=tuned,
            extent=extent,
            device=self.device,
            aligned=aligned,
            wanted=None if keys is None and not solver.alone else held_in_memory(solver, keys),
            fits=fits,
            told=keys is not None and extent.held > 0,
            blocks=self.blocks,
        )
        begun = unfinished(job.out) if job.resume else None
        plan = fitted(
            sizes,
            job.batch_size,
            offload=job.offload_folder is not None,
            budget=(job.max_ram, job.max_memory),
            like=begun.key.get("carried out") if begun else None,
            free=(free and free + resident_memory(), free_device_memory(self.device)),
        )
        if self.hidden and not there:
            check_offload(self.hidden, Terms(sizes, plan.choice).files, job.out, inputs=[*self.inputs, *inputs])
        seconds = move_seconds(flops, self.device)
        if not there:
            models, asked = (self.checkpoints, self.geometries, self.recipe()), frozenset() if aligned else names
            seen: dict[str, Any] = {"told": sizes.told, "moved": flops, "blocks": self.blocks}
            effort = Effort.of(*models, asked, extent, tokens, plan.choice, fits, **seen)
            seconds = effort.seconds(self.device) | seconds
        return Fit(self, tokens, extent, plan, seconds)

    @property
    def calibrating(self) -> Calibrating:
        """The calibration that the job asks for."""
        return Calibrating(self.job, self.infos, self.source, self.geometries.source, self.device)

    def solver(self) -> Solver:
        """One that knows what is needed; where blocks are still to be compared, they may be paired otherwise."""
        recipe = self.recipe()
        return recipe.solver(*self.models(), self.outline.blocks, recipe)

    def models(self) -> Pair[Base]:
        """The two base models, with their tensors by canonical name."""
        return self.windows.zip(self.geometries).map(lambda side: Base.of(*side))

    @property
    def infos(self) -> Pair[SideInfo]:
        """What calibration has to know of both models."""
        named = zip(self.geometries, ARGUMENTS, (each.folder for each in self.checkpoints), strict=True)
        return Pair(*(SideInfo.of(geometry, f"{name} {folder.name}", folder) for geometry, name, folder in named))

    def recipe(self) -> Recipe:
        """The job's, with the floor that follows the models' precision, and the prior that their structure allows."""
        double = all(checkpoint.compute_dtype == torch.float64 for checkpoint in self.checkpoints)
        recipe = self.job.recipe.in_float64() if double else self.job.recipe
        return with_prior(recipe, *self.geometries)

    @property
    def hidden(self) -> Path | None:
        """Where files of hidden states lie, if not in memory or with the journal."""
        offload = self.job.offload_folder
        return offload and own_folder(offload, self.job.out)

    def writing(self, key: Mapping[str, Any], *, stem: str, **options: Any) -> dict[str, Any]:
        """How this job writes: arguments of :meth:`Work.open`."""
        own = {"stem": stem, "key": key, "resume": self.job.resume, "overwrite": self.job.overwrite}
        return {"inputs": self.inputs, **own, **options}

    @property
    def identities(self) -> dict[str, dict[str, str]]:
        """By side: where a base is, and the hash of its headers."""
        known = zip(SIDES, self.references, self.checkpoints, strict=True)
        return {side: {"reference": place, "header_hash": base.header_hash()} for side, place, base in known}


@dataclass(frozen=True)
class Fit:
    """How a job is carried out, so that it fits the memory it may take.

    Attributes:
        tokens: of calibration, as asked, or by what is mapped.
        extent: of the calibration there is.
        seconds: predicted, by stage.
    """

    bases: Bases
    tokens: int
    extent: Extent
    plan: Plan
    seconds: dict[str, float]

    def calibration(self) -> Calibration:
        """Read, in batches of the plan's size."""
        return self.bases.calibrating.read(self.tokens, self.plan.choice.batch_size)

    def draft(self, data: Calibration) -> Alignment:
        """The outline of the alignment, with the pairing of blocks."""
        bases, blocks = self.bases, self._blocks(data)
        recipe, pairs = bases.recipe(), Pairs(*bases.geometries, blocks)
        if undecided(bases.job.recipe) and not recipe.solver.alone:
            how: dict[str, Any] = {"folder": bases.hidden, "halves": self.plan.choice.halves}
            recipe = decided_streamed(recipe, bases.models(), bases.windows, pairs, data, bases.device, **how)
        return outline(*bases.geometries, recipe, blocks)

    def _blocks(self, data: Calibration) -> Blocks:
        """For every target block the source block that feeds it; where depths differ, after a pass over both models."""
        bases, sides = self.bases, self.bases.geometries
        if bases.blocks is not None:
            return bases.blocks
        if sides.source.depth == sides.target.depth:
            return Pairs.by_position(*sides).blocks
        options: dict[str, Any] = {"folder": bases.hidden, "ahead": self.plan.choice.ahead}
        return pair_streamed(bases.windows, sides, data.batches, bases.device, **options)

    def key(self, data: Calibration | None, *more: Checkpoint, whole: bool = False, **options: Any) -> dict[str, Any]:
        """All that decides what is written, as JSON: a run goes on only where it is the same.

        Args:
            more: the tune; whole: by whole contents.
        """
        named = zip((*ARGUMENTS, "TUNED"), (*self.bases.checkpoints, *more), strict=False)
        files = {name: checkpoint.fingerprint(full=whole)["files"] for name, checkpoint in named}
        how = self.plan.choice
        known = {"calibration": data.fingerprint, "carried out": how.rounding} if data else {}
        depth = self.bases.blocks or SIMILARITY
        return {**files, **known, **options, "depth": depth, "versions": versions()}

    def align(
        self,
        data: Calibration,
        draft: Alignment,
        sink: Sink,
        work: Work,
        progress: Callable[[int], Any],
        *,
        update: ComputedUpdate | None = None,
        given: bool = False,
        strengths: Sequence[float] = (),
    ) -> tuple[Alignment, Passage]:
        """One pass over both models; maps go into the sink, and what is told of them into the alignment.

        Args:
            draft: the outline of this pairing of blocks; ``given``: it is a whole alignment, no map is made.
            update: that is moved on the way, and fitted where the recipe does.
            strengths: others than 1 at which it is tried on the rows that are held out.
        """
        bases, recipe, choice, models = self.bases, draft.recipe, self.plan.choice, self.bases.models()
        folder, toward = bases.hidden, None
        if given:
            solver = recipe.solver.of_maps(*models, draft.blocks, recipe, draft.ruleset)
        else:
            if recipe.solver.leans_on_depth(recipe) and not work.state:  # else it is in there
                toward = all_together(
                    models, bases.windows, draft.pairs, data, bases.device, folder=folder, halves=choice.halves
                )
            if toward is not None and choice.polar == "cpu":
                toward = toward.cpu()
            solver = recipe.solver(*models, draft.blocks, recipe, toward=toward)
        solver.method = choice.method
        how: dict[str, Any] = {name: getattr(choice, name) for name in ("ahead", "resident", "tiles", "halves")}
        how |= {"folder": folder, "update": update, "strengths": strengths}
        if choice.polar == "cpu":
            how["decompose"] = torch.device("cpu")
        passage = Passage(bases.windows, bases.geometries, data, solver, sink, work, bases.device, **how)
        held = passage.run(progress)
        if given:
            return draft, passage
        provenance = {
            **bases.identities,
            "calibration": data.description,
            "calibration_fingerprint": data.fingerprint,
            "tokens": data.tokens,
            "quality": [row.as_dict() for row in held],
            "versions": versions(),
        }
        return draft.filled(solver.ruleset, tokens=data.tokens, provenance=provenance), passage
