"""What the two jobs can be asked: every option once, with its default and its help."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch

from ..alignment.alignment import Alignment
from ..errors import InputRefused
from ..files.located import located
from ..models.pair import SIDES
from ..recipes.recipe import Recipe
from ..updates.alpha import AUTO, MATCH, Alpha
from .provenance import recorded_base

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def option(default: Any, text: str, **more: Any) -> Any:
    """A field that is an option of the command too.

    Args:
        text: its help there; more: ``unset``, what the help says of a default of None; ``least``, of a number.
    """
    return field(default=default, metadata={"help": text, **more})


def calibration_option() -> Any:
    """Of both jobs, which take it by position too, behind ``out``."""
    return option(
        "builtin",
        "Text (.txt), records (.jsonl), a folder of images, a .safetensors of ready tensors, "
        "'self' (text sampled from TUNED, which is whole in memory meanwhile), or 'builtin' (text Python ships).",
    )


@dataclass(frozen=True, kw_only=True)
class Aligning:
    """How two bases are aligned; a third of the rows is held out, a batch at most."""

    recipe: Recipe = field(default_factory=Recipe)  # whose fields are options
    device: str = option("cpu", "cpu, cuda or cuda:N.")
    prompts: Path | None = option(None, "What texts of 'self' begin with: lines of text, or .jsonl, chats too.")
    mix: float = option(0.0, "Share of general text ('builtin') among the calibration's tokens, below 1.")
    tokens: int | None = option(None, "Calibration tokens.", unset="4 x the widest space", least=1)
    batch_size: int = option(8, "Samples per forward pass.", least=1)
    seed: int = option(0, "Which calibration samples are drawn.")
    depth: str = option(
        "similarity",
        "Which source block feeds which target block: where depths differ, by similarity of what they add to the "
        "residual; relative, evenly spread; or a JSON file, for each target block a source block, increasing, or null.",
    )
    held_out: bool = option(True, "Measure the alignment on rows it has not seen.")
    skip_bad_inputs: bool = option(False, "Leave out images and lines that cannot be read, and count them.")


@dataclass(frozen=True, kw_only=True)
class Moving:
    """How an update is moved, and what is written; of ``alpha`` one, or several."""

    alpha: Alpha | tuple[Alpha, ...] | None = option(
        None,
        f"Strength of the update; several, as 0.5,1,2, fill OUT/alpha-0.5, ...; match is where {MATCH}; auto is where "
        f"{AUTO}.",
        unset="auto for effect with rows held out, else 1",
    )
    output: Literal["auto", "adapter", "checkpoint", "delta"] = option(
        "auto", "What to write; auto writes what TUNED is."
    )
    out_dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "Of what is written; auto is TARGET's, an adapter's own, float32 for a delta."
    )
    rank: int | None = option(
        None, "Most directions of a layer of the adapter.", unset="its own, 16 of a full tune", least=1
    )
    only_targeted: bool = option(False, "Fit only the kinds of layers that the adapter has factors of.")
    leave: tuple[str, ...] = option((), "Glob of tensors to leave behind; may be repeated.")


@dataclass(frozen=True, kw_only=True)
class Running:
    """How a job is carried out; sizes in bytes."""

    max_ram: int | None = option(None, "Host memory the run may take, as 16GiB.", unset="what is available")
    max_memory: int | None = option(None, "Device memory the run may take, as 8GiB.", unset="what the device has free")
    offload_folder: Path | None = option(None, "Keep hidden states in files there.", unset="they stay in memory")
    resume: bool = option(False, "Go on with the run into the same folder that was interrupted, or begin.")
    overwrite: bool = option(False, "Replace the folder if it is not empty.")
    allow_pickle: bool = option(False, "Read .bin files (weights only).")


@dataclass(frozen=True)
class AlignJob(Running, Aligning):
    """Which two bases to align, on what.

    Attributes:
        source, target: folders or hub ids of the base models.
        out: folder to write.
        tuned: a tune of the source, if its chat template is to tell the calibration's chats, or it is to say text.
    """

    source: str
    target: str
    out: Path
    calibration: str = calibration_option()
    _: KW_ONLY
    tuned: str | None = None


@dataclass(frozen=True)
class Job(Running, Moving, Aligning):
    """What to move, from where to where.

    Attributes:
        source, target: folders or hub ids of the base models.
        tuned: folder of a tune of the source: a checkpoint or a LoRA adapter.
        out: folder to write.
        maps: folder of an alignment to apply, or None to align first; see :meth:`of_maps`.
    """

    source: str
    tuned: str
    target: str
    out: Path
    calibration: str = calibration_option()
    _: KW_ONLY
    maps: str | None = None
    verify_inputs: bool = option(False, "Compare the whole content of both bases and MAPS, not headers only.")

    @classmethod
    def of_maps(
        cls, maps: str, tuned: str, out: Path, *, source: str | None = None, target: str | None = None, **more: Any
    ) -> Job:
        """Apply the alignment in ``maps``, to the bases it records unless others are named."""
        recorded = Alignment.load(maps)

        def place(side: str, given: str | None) -> str:
            if given:
                return given
            found = recorded_base(recorded, side).get("reference")
            if not isinstance(found, str):
                raise InputRefused(f"{maps} does not say which {side} it was made for; give --{side}")
            try:  # on an alignment's word nothing is fetched
                located(found, download=False)
            except InputRefused as error:
                raise InputRefused(f"the {side} of {maps}: {error}, or name it with --{side}") from error
            return found

        places = SIDES.zip((source, target)).map(lambda each: place(*each))
        return cls(places.source, tuned, places.target, out, recipe=recorded.recipe, maps=maps, **more)

    @property
    def strength(self) -> Alpha | tuple[Alpha, ...]:
        """As it was asked for; else ``auto`` where the recipe fits and there are rows to choose by, 1 elsewhere."""
        unasked: Alpha = "auto" if self.recipe.fits and self.held_out else 1.0
        return unasked if self.alpha is None else self.alpha

    @property
    def alignment(self) -> AlignJob:
        """The part that aligns."""
        return AlignJob(**{each.name: getattr(self, each.name) for each in fields(AlignJob)})


def options_of(job: AlignJob | Job) -> dict[str, Any]:
    """The choices that decide what is written, beside the inputs and the recipe."""
    names = ["tokens", "mix", "seed", "held_out", "skip_bad_inputs", "device", "leave", "output", "out_dtype"]
    names += ["rank", "only_targeted"]
    return {name: getattr(job, name) for name in names if hasattr(job, name)}
