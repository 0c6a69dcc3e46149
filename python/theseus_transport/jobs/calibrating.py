"""The calibration of a job, as its options say: checked, measured, and read."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..activations.inputs import SideInfo
from ..calibration.advice import warning_of_general, warnings_of_rows
from ..calibration.calibration import Calibration
from ..calibration.extent import Extent, extent
from ..calibration.mixed import GENERAL, load_mixed, own_tokens
from ..calibration.text import LENGTH
from ..errors import InputRefused
from ..files.checkpoint import Checkpoint
from ..models.geometry import Geometry
from ..models.pair import Pair
from ..recipes.effect import writers
from ..recipes.recipe import Recipe
from .checks import trim_memory
from .self_text import SelfText
from .settings import AlignJob

log = logging.getLogger(__name__)
SELF = "self"


@dataclass(frozen=True)
class Calibrating:
    """What the calibration of a job depends on: its options, what both models read, and the source base."""

    job: AlignJob
    infos: Pair[SideInfo]
    source: Checkpoint
    geometry: Geometry
    device: torch.device

    def check(self) -> None:
        """Refuse options that do not go together, or with these models."""
        job, vision = self.job, self.infos.source.kind == "vision"
        if not 0 <= job.mix < 1:
            raise InputRefused(f"mix is {job.mix}; give a share of general text from 0 to below 1, as 0.5")
        if job.mix and job.calibration == GENERAL:
            raise InputRefused(
                f"mix is {job.mix}, but the calibration is general text already; give --calibration yours"
            )
        if job.mix and vision:
            raise InputRefused(
                f"mix is {job.mix}, but {self.infos.source.name} reads images; put others into the folder"
            )
        if job.prompts is not None and job.calibration != SELF:
            raise InputRefused(
                f"--prompts {job.prompts} begin what TUNED says; give --calibration self, or leave it out"
            )
        if job.calibration != SELF:
            return
        if vision:
            raise InputRefused(
                f"calibration is 'self', but {self.infos.source.name} reads images; give a folder of the task's images"
            )
        if not job.tuned:
            raise InputRefused(
                "calibration is 'self', text sampled from a tune, and an alignment has none; use theseus transport, "
                "or give --calibration a file of text that the tune wrote"
            )
        if job.prompts is not None and not job.prompts.expanduser().is_file():
            raise InputRefused(f"--prompts {job.prompts} is no file; give lines of text, or records as .jsonl")

    @property
    def inputs(self) -> list[Path]:
        """What the output may not overlap."""
        given = [] if self.job.calibration in (GENERAL, SELF) else [Path(self.job.calibration)]
        return [*given, *([self.job.prompts] if self.job.prompts else [])]

    def extent(self, tokens: int) -> Extent:
        """How much of it there will be; refuses as :meth:`SelfText.loading`."""
        job, most = self.job, self.job.batch_size if self.job.held_out else 0
        wanted = own_tokens(tokens, job.mix)
        found = extent(job.calibration, self.infos, wanted=wanted, most=most, seed=job.seed)
        if job.calibration == SELF:
            model = self._tune.loading
            found = replace(found, loading=found.loading + model)
        if job.mix:
            found = found.with_(extent(GENERAL, self.infos, wanted=tokens - wanted, most=0, seed=job.seed))
        return found

    def read(self, tokens: int, batch_size: int) -> Calibration:
        """Batches of this many samples; sampled first where it is what the tune says."""
        job, options = self.job, dict[str, Any]()
        if job.calibration == SELF:
            options["sampled"] = self._tune.batches(own_tokens(tokens, job.mix))
        elif job.tuned:
            options["chats"] = Checkpoint.open(job.tuned, allow_pickle=job.allow_pickle).folder
        data = load_mixed(
            job.calibration,
            *self.infos,
            mix=job.mix,
            tokens_wanted=tokens,
            batch_size=batch_size,
            seed=job.seed,
            hold_out=job.held_out,
            skip_bad=job.skip_bad_inputs,
            **options,
        )
        trim_memory()
        return data

    @property
    def _tune(self) -> SelfText:
        length = min([LENGTH, *(info.max_positions for info in self.infos if info.max_positions)])
        return SelfText.of(self.job, self.source, self.geometry, self.device, length)


def warn_of_rows(calibration: str, rows: int, target: Geometry, recipe: Recipe) -> None:
    """Warn of calibration that fits of the target's writers are poor on: few rows, or general text alone."""
    widths = {layer.role: target.weights()[layer.role][1] for layer in writers(recipe, target.layers())}
    for text in filter(None, [*warnings_of_rows(rows, list(widths.values())), warning_of_general(calibration)]):
        log.warning(text)
