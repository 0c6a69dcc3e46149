"""What the two jobs can be asked."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from ..alignment.alignment import Alignment
from ..errors import InputRefused
from ..files.located import located
from ..recipes.recipe import Recipe
from ..updates.alpha import Alpha
from .provenance import recorded_base


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


def options_of(job: Any) -> dict[str, Any]:
    """The choices that decide what is written, beside the inputs and the recipe."""
    names = ("tokens", "seed", "held_out", "skip_bad_inputs", "device", "leave", "output", "out_dtype")
    return {name: getattr(job, name) for name in names if hasattr(job, name)}


DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Job:
    """What to move, from where to where; the fields that :class:`AlignJob` has too mean the same there.

    Attributes:
        source, target: folders or hub ids of the base models.
        tuned: folder of a tune of the source: a checkpoint or a LoRA adapter.
        out: folder to write.
        alpha: strength, ``match``, or several of these, which fill ``out/alpha-...``.
        output: ``auto`` writes an adapter for an adapter and a checkpoint for a checkpoint.
        out_dtype: of what is written.
        maps: folder of an alignment to apply, or None to align first; see :meth:`of_maps`.
        verify_inputs: compare the whole content of both bases with the alignment's, not headers only.
    """

    source: str
    tuned: str
    target: str
    out: Path
    calibration: str = "builtin"
    recipe: Recipe = field(default_factory=Recipe)
    alpha: Alpha | tuple[Alpha, ...] = 1.0
    output: Literal["auto", "adapter", "checkpoint", "delta"] = "auto"
    out_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "cpu"
    tokens: int | None = None
    batch_size: int = 8
    seed: int = 0
    held_out: bool = True
    skip_bad_inputs: bool = False
    leave: tuple[str, ...] = ()
    overwrite: bool = False
    allow_pickle: bool = False
    maps: str | None = None
    verify_inputs: bool = False
    max_ram: int | None = None
    max_memory: int | None = None
    offload_folder: Path | None = None
    resume: bool = False

    @classmethod
    def of_maps(
        cls, maps: str, tuned: str, out: Path, *, source: str | None = None, target: str | None = None, **more: Any
    ) -> Job:
        """Apply the alignment in ``maps``, to the bases it records unless others are named."""
        recorded = Alignment.load(maps)
        places = [source, target]
        for i, side in enumerate(("source", "target")):
            places[i] = places[i] or recorded_base(recorded, side).get("reference")
            if not isinstance(places[i], str):
                raise InputRefused(f"{maps} does not say which {side} it was made for; give --{side}")
            if not (source, target)[i]:  # on an alignment's word nothing is fetched
                try:
                    located(str(places[i]), download=False)
                except InputRefused as error:
                    raise InputRefused(f"the {side} of {maps}: {error}, or name it with --{side}") from error
        return cls(str(places[0]), tuned, str(places[1]), out, recipe=recorded.recipe, maps=maps, **more)

    @property
    def alignment(self) -> AlignJob:
        """The part that aligns."""
        return AlignJob(**{name: getattr(self, name) for name in AlignJob.__dataclass_fields__})
