"""Two base models on disk: opened, checked, told apart by fingerprints, and aligned."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch

from ..activations.inputs import SideInfo
from ..activations.links import Blocks, Pairs
from ..alignment.alignment import Alignment, outline
from ..budget.needs import held_in_memory, needed, tokens_for
from ..budget.plan import Plan, fitted
from ..budget.sizes import Sizes
from ..budget.terms import Amounts
from ..budget.time import Effort, move_seconds
from ..calibration.calibration import Calibration, load_calibration
from ..calibration.extent import Extent, extent
from ..errors import InputRefused
from ..files.checkpoint import Checkpoint
from ..files.earlier_runs import unfinished
from ..files.journal import Work
from ..machine import available_memory, find_device, free_device_memory, resident_memory
from ..models.base import Base
from ..models.pair import SIDES, Pair
from ..recipes.recipe import Recipe
from ..recipes.solver import Solver
from ..streaming.block_pairing import pair_streamed
from ..streaming.hidden_states import check_offload, own_folder
from ..streaming.passage import Passage, Sink, all_together
from ..streaming.window import Window
from ..updates.arguments import check_whole
from ..updates.merged import Merged
from .checks import check_dtypes, read_geometry, trim_memory
from .provenance import content_hash, recorded_base, reference_of, versions
from .settings import AlignJob


class Bases:
    """Source and target of a job, opened and checked; nothing is computed.

    Attributes:
        checkpoints, geometries: of source and target.
        references: how a later command finds them.
    """

    def __init__(self, job: AlignJob) -> None:
        asked = {} if job.tokens is None else {"tokens": (job.tokens, 1)}
        check_whole(**asked, batch_size=(job.batch_size, 1), seed=(job.seed, 0))
        self.job, self.device = job, find_device(job.device)
        given = Pair(job.source, job.target)
        self.references = given.map(reference_of)
        self.checkpoints = given.map(lambda reference: Checkpoint.open(reference, allow_pickle=job.allow_pickle))
        for name, checkpoint in zip(("SOURCE", "TARGET"), self.checkpoints, strict=True):
            if checkpoint.kind == "adapter":
                base = checkpoint.adapter_config.get("base_model_name_or_path") or "which it does not name"
                raise InputRefused(f"{name} {checkpoint.folder} is an adapter; give the base it was trained on, {base}")
        first, second = (read_geometry(n, c) for n, c in zip(("SOURCE", "TARGET"), self.checkpoints, strict=True))
        self.geometries = Pair(first, second)
        check_dtypes(*self.checkpoints)
        self.windows = self.checkpoints.map(Window)

    @property
    def source(self) -> Checkpoint:
        return self.checkpoints.source

    @property
    def target(self) -> Checkpoint:
        return self.checkpoints.target

    @property
    def inputs(self) -> list[Path]:
        """What the output may not overlap."""
        given = [] if self.job.calibration == "builtin" else [Path(self.job.calibration)]
        return [*(c.folder for c in self.checkpoints), *given]

    @property
    def tokens_wanted(self) -> int:
        """As asked, or by what is mapped."""
        return self.job.tokens or tokens_for(self._solver(), self.needed)

    @property
    def bytes_of_maps(self) -> int:
        """Of all that an alignment may hold."""
        maps = outline(*self.geometries, self.job.recipe).planned_maps
        return sum(dtype.itemsize * prod(shape) for _, shape, dtype in maps)

    def seconds(self, *, move: int = 0) -> dict[str, float]:
        """Predicted, by stage, of the alignment as it was fitted, and of moving an update with ``move`` flops."""
        known = self.needed, self.extent, self.tokens_wanted, self.plan.choice
        effort = Effort.of(self.checkpoints, self.geometries, self.recipe(), *known)
        return effort.seconds(self.device) | move_seconds(move, self.device)

    def fitted(
        self,
        *,
        tuned: Checkpoint | Merged | None = None,
        aligned: bool = False,
        keys: frozenset[str] | None = None,
        inputs: Sequence[Path] = (),
    ) -> Plan:
        """How the run fits the memory it may take.

        Args:
            tuned: a full tune that is moved; aligned: the maps are there already.
            keys: of the alignment's rules and vectors that are wanted; None: all.
            inputs: more of them, in which no file of hidden states may lie.

        Raises:
            ResourceError: it does not fit.
            InputRefused: as :func:`check_offload`.
        """
        job, free = self.job, available_memory()
        self.needed = needed(self._solver(), keys)
        self.extent = Extent(0, Pair(0, 0), 0) if aligned else self._extent()
        sizes = Sizes(
            checkpoints=self.checkpoints,
            geometries=self.geometries,
            recipe=self.recipe(),
            tuned=tuned,
            extent=self.extent,
            device=self.device,
            aligned=aligned,
            wanted=None if keys is None else held_in_memory(self._solver(), keys),
        )
        budget, begun = (job.max_ram, job.max_memory), unfinished(job.out) if job.resume else None
        self.plan = fitted(
            sizes,
            job.batch_size,
            offload=job.offload_folder is not None,
            budget=budget,
            like=begun.key.get("carried out") if begun else None,
            free=(free and free + resident_memory(), free_device_memory(self.device)),
        )
        if self._hidden and not aligned:
            stored = Amounts(sizes, replace(self.plan.choice, resident=True)).hidden
            check_offload(self._hidden, stored, job.out, inputs=[*self.inputs, *inputs])
        return self.plan

    def _extent(self) -> Extent:
        job = self.job
        most = job.batch_size if job.held_out else 0
        infos = Pair(self._side(0), self._side(1))
        return extent(job.calibration, infos, wanted=self.tokens_wanted, most=most, seed=job.seed)

    def _solver(self) -> Solver:
        """One that knows what is needed; depths may be paired otherwise."""
        recipe, blocks = self.recipe(), Pairs.by_position(*self.geometries).blocks
        return recipe.solver(*self._models(), blocks, recipe)

    def _models(self) -> Pair[Base]:
        return self.windows.zip(self.geometries).map(lambda side: Base.of(*side))

    def draft(self, data: Calibration) -> Alignment:
        """The outline of the alignment, with the pairing of blocks."""
        return outline(*self.geometries, self.recipe(), self.blocks(data))

    def writing(self, key: Mapping[str, Any], *, stem: str, **options: Any) -> dict[str, Any]:
        """How this job writes: arguments of :meth:`Work.open`."""
        own = {"stem": stem, "key": key, "resume": self.job.resume, "overwrite": self.job.overwrite}
        return {"inputs": self.inputs, **own, **options}

    def calibration(self) -> Calibration:
        job = self.job
        tuned = job.tuned and Checkpoint.open(job.tuned, allow_pickle=job.allow_pickle)
        data = load_calibration(
            job.calibration,
            self._side(0),
            self._side(1),
            tokens_wanted=self.tokens_wanted,
            batch_size=self.plan.choice.batch_size,
            seed=job.seed,
            hold_out=job.held_out,
            skip_bad=job.skip_bad_inputs,
            chats=tuned.folder if tuned else None,
        )
        trim_memory()
        return data

    def _side(self, i: int) -> SideInfo:
        folder, name = self.checkpoints[i].folder, ("SOURCE", "TARGET")[i]
        return SideInfo.of(self.geometries[i], f"{name} {folder.name}", folder)

    def recipe(self) -> Recipe:
        """The job's, with the floor that follows the models' precision."""
        double = all(checkpoint.compute_dtype == torch.float64 for checkpoint in self.checkpoints)
        return self.job.recipe.in_float64() if double else self.job.recipe

    def blocks(self, data: Calibration) -> Blocks:
        """For every target block the source block that feeds it; where depths differ, after a pass over both models."""
        if self.geometries.source.depth == self.geometries.target.depth:
            return Pairs.by_position(*self.geometries).blocks
        options: dict[str, Any] = {"folder": self._hidden, "ahead": self.plan.choice.ahead}
        return pair_streamed(self.windows, self.geometries, data.batches, self.device, **options)

    @property
    def _hidden(self) -> Path | None:
        """Where files of hidden states lie, if not in memory or with the journal."""
        offload = self.job.offload_folder
        return offload and own_folder(offload, self.job.out)

    def key(self, data: Calibration | None, *more: Checkpoint, whole: bool = False, **options: Any) -> dict[str, Any]:
        """All that decides what is written, as JSON: a run goes on only where it is the same.

        Args:
            more: the tune; whole: by whole contents.
        """
        named = zip(("SOURCE", "TARGET", "TUNED"), (*self.checkpoints, *more), strict=False)
        files = {name: checkpoint.fingerprint(full=whole)["files"] for name, checkpoint in named}
        how = self.plan.choice
        known = {"calibration": data.fingerprint, "carried out": how.rounding} if data else {}
        return {**files, **known, **options, "versions": versions()}

    def align(
        self, data: Calibration, draft: Alignment, sink: Sink, work: Work, progress: Callable[[int], Any]
    ) -> tuple[Alignment, Passage]:
        """One pass over both models; maps go into the sink, and what is told of them into the alignment.

        Args:
            draft: the outline of this pairing of blocks.
        """
        recipe, choice, bases = draft.recipe, self.plan.choice, self._models()
        folder, toward = self._hidden, None
        if recipe.solver.leans_on_depth(recipe) and not work.state:  # else it is in there
            toward = all_together(
                bases, self.windows, draft.pairs, data, self.device, folder=folder, halves=choice.halves
            )
        if toward is not None and choice.polar == "cpu":
            toward = toward.cpu()
        solver = recipe.solver(*bases, draft.blocks, recipe, toward=toward)
        solver.method = choice.method
        how: dict[str, Any] = {name: getattr(choice, name) for name in ("ahead", "resident", "tiles", "halves")}
        how["folder"] = folder
        if choice.polar == "cpu":
            how["decompose"] = torch.device("cpu")
        passage = Passage(self.windows, self.geometries, data, solver, sink, work, self.device, **how)
        held = passage.run(progress)
        provenance = {
            **{side: self.identity(i) for i, side in enumerate(SIDES)},
            "calibration": data.description,
            "calibration_fingerprint": data.fingerprint,
            "tokens": data.tokens,
            "quality": [row.as_dict() for row in held],
            "versions": versions(),
        }
        return draft.filled(solver.ruleset, tokens=data.tokens, provenance=provenance), passage

    def identity(self, side: int) -> dict[str, str]:
        """Where a base is, and the hash of its headers."""
        return {"reference": self.references[side], "header_hash": self.checkpoints[side].header_hash()}

    def check_identity(self, alignment: Alignment, folder: object, *, whole: bool) -> None:
        """Refuse bases other than those of an alignment.

        Args:
            folder: where the alignment lies, for the message.
            whole: compare the content of every file too, not headers and sizes only.
        """
        for i, side in enumerate(SIDES):
            recorded, checkpoint = recorded_base(alignment, side), self.checkpoints[i]
            if "header_hash" not in recorded:
                raise InputRefused(f"{folder} does not say which {side} it was made for; align again")
            if getattr(alignment, side) != self.geometries[i]:
                raise InputRefused(f"{folder} records another geometry of the {side} than it was made for; align again")
            kinds = ("header_hash", "content_hash") if whole else ("header_hash",)
            found = (checkpoint.header_hash(), content_hash(checkpoint) if whole else "")
            for kind, now in zip(kinds, found, strict=False):
                if recorded.get(kind) != now:
                    raise InputRefused(
                        f"{folder} was made for the {side} {recorded.get('reference')} ({kind} "
                        f"{str(recorded.get(kind))[:12]}), but {checkpoint.folder} ({now[:12]}) was given; "
                        f"name the right one with --{side}, or align again"
                    )
