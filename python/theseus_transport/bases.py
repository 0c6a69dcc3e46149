"""Two base models on disk: opened, checked, told apart by fingerprints, and aligned."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from . import __version__
from .alignment import Alignment, align
from .calibration import Calibration, SideInfo, load_calibration
from .checkpoint import Checkpoint
from .checks import available_memory, find_device, read_layout
from .errors import InputRefused, ResourceError
from .headers import digest
from .loading import load_model
from .predict import Prediction
from .quality import measure
from .recipes import Recipe
from .spaces import Layout

Progress = Callable[[str, int], Callable[[], object]]  # stage and its number of steps -> call after every step
Lap = Callable[[str], None]  # called when a stage ends
SIDES = ("source", "target")


@dataclass(frozen=True)
class AlignJob:
    """Which two bases to align, on what.

    Attributes:
        source, target: folders or hub ids of the base models.
        out: folder to write.
        calibration: a file, a folder of images, or ``builtin``.
        tokens: calibration tokens, or None for four times the widest space.
        held_out: measure the alignment on one batch it has not seen, where there are at least three.
        skip_bad_inputs: leave out images and lines that cannot be read, rather than refusing them.
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


class Bases:
    """Source and target of a job, opened and checked; nothing is computed.

    Attributes:
        checkpoints, layouts: of source and target.
        references: how a later command finds them.
    """

    def __init__(self, job: AlignJob) -> None:
        for name in ("tokens", "batch_size", "seed"):
            if not 0 <= (getattr(job, name) or 0) < 2**63:
                raise InputRefused(f"{name} is {getattr(job, name)}; give a number from 0 to 2^63 - 1")
        self.job, self.device = job, find_device(job.device)
        self.references = tuple(_reference(r) for r in (job.source, job.target))
        self.checkpoints = tuple(Checkpoint.open(r, allow_pickle=job.allow_pickle) for r in (job.source, job.target))
        for name, checkpoint in zip(("SOURCE", "TARGET"), self.checkpoints, strict=True):
            if checkpoint.kind == "adapter":
                raise InputRefused(f"{name} {checkpoint.folder} is an adapter; give the base model it was trained on")
        first, second = (read_layout(n, c) for n, c in zip(("SOURCE", "TARGET"), self.checkpoints, strict=True))
        self.layouts: tuple[Layout, Layout] = (first, second)

    @property
    def source(self) -> Checkpoint:
        return self.checkpoints[0]

    @property
    def target(self) -> Checkpoint:
        return self.checkpoints[1]

    @property
    def inputs(self) -> list[Path]:
        """What the output may not overlap."""
        given = [] if self.job.calibration == "builtin" else [Path(self.job.calibration)]
        return [*(c.folder for c in self.checkpoints), *given]

    @property
    def tokens_wanted(self) -> int:
        return self.job.tokens or 4 * max(max(la.width, la.middle, la.heads * la.head_dim) for la in self.layouts)

    def prediction(self, *, move: int = 0) -> Prediction:
        """Memory and time of an alignment, and of moving an update with ``move`` flops."""
        tokens, recipe = self.tokens_wanted, self.job.recipe
        return Prediction.of_alignment(self.checkpoints, self.layouts, recipe, tokens, self.device, move)

    def check_memory(self, needed: int) -> None:
        if (available := available_memory()) and needed > available and self.device.type == "cpu":
            raise ResourceError(
                f"this needs about {needed / 2**30:.1f} GiB of memory, {available / 2**30:.1f} GiB are available; "
                "free some, or use smaller models"
            )

    def calibration(self) -> Calibration:
        job = self.job
        sides = [
            _side(c, la, name) for c, la, name in zip(self.checkpoints, self.layouts, ("SOURCE", "TARGET"), strict=True)
        ]
        return load_calibration(
            job.calibration,
            *sides,
            tokens_wanted=self.tokens_wanted,
            batch_size=job.batch_size,
            seed=job.seed,
            hold_out=job.held_out,
            skip_bad=job.skip_bad_inputs,
        )

    def align(self, progress: Progress, lap: Lap) -> Alignment:
        """Load both models, align them, and measure the alignment on the batch that was held out, if any."""
        data = self.calibration()
        source, target = (load_model(c, la) for c, la in zip(self.checkpoints, self.layouts, strict=True))
        lap("load")
        alignment = align(
            source,
            target,
            data.batches,
            recipe=self.job.recipe,
            device=self.device,
            progress=progress("align", len(data.batches)),
        )
        held = measure(alignment, source, target, data.held) if data.held else []
        lap("align")
        provenance = {
            **{side: self.identity(i) for i, side in enumerate(SIDES)},
            "calibration": data.description,
            "calibration_fingerprint": data.fingerprint,
            "tokens": data.tokens,
            "quality": [row.as_dict() for row in held],
            "versions": versions(),
        }
        return replace(alignment, provenance=provenance)

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
            kinds = ("header_hash", "content_hash") if whole else ("header_hash",)
            found = (checkpoint.header_hash(), content_hash(checkpoint) if whole else "")
            for kind, now in zip(kinds, found, strict=False):
                if recorded.get(kind) != now:
                    raise InputRefused(
                        f"{folder} was made for the {side} {recorded.get('reference')} ({kind} "
                        f"{str(recorded.get(kind))[:12]}), but {checkpoint.folder} ({now[:12]}) was given; "
                        f"name the right one with --{side}, or align again"
                    )


def quiet(stage: str, steps: int) -> Callable[[], object]:
    """Progress that nobody watches."""
    return lambda: None


def recorded_base(alignment: Alignment, side: str) -> dict[str, Any]:
    """What an alignment's provenance says of a base; {} where it is edited, or was made in Python."""
    provenance: Any = alignment.provenance
    found = provenance.get(side) if isinstance(provenance, dict) else None
    return found if isinstance(found, dict) else {}


def content_hash(checkpoint: Checkpoint) -> str:
    """BLAKE2b over names and whole contents of all files."""
    rows = checkpoint.fingerprint(full=True)["files"]
    return digest(json.dumps(sorted((name, row["blake2b"]) for name, row in rows.items())).encode())


def versions() -> dict[str, str]:
    return {"theseus": __version__, "torch": torch.__version__, "transformers": transformers.__version__}


def _reference(given: str) -> str:
    """A folder by its absolute path, so that it is found from elsewhere; a hub id as it is."""
    with suppress(OSError):
        if (path := Path(given).expanduser()).exists():
            return str(path.resolve())
    return given


def _side(checkpoint: Checkpoint, layout: Layout, name: str) -> SideInfo:
    vision, positions = layout.family.modality == "vision", checkpoint.config.get("max_position_embeddings")
    return SideInfo(
        folder=checkpoint.folder,
        kind=layout.family.modality,
        name=f"{name} {checkpoint.folder.name}",
        vocab_size=layout.vocabulary,
        channels=layout.channels,
        image_size=layout.image,
        max_positions=positions if isinstance(positions, int) else None,
        tokens_per_image=layout.grid[0] * layout.grid[1] + sum(layout.ahead) if vision else 1,
    )
