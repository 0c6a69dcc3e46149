"""One transport from files to files: check everything, align, move, write; what the command runs."""

from __future__ import annotations

import json
import logging
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import transformers

from . import __version__
from .alignment import Alignment, align, outline
from .calibration import Calibration, SideInfo, load_calibration
from .checkpoint import Checkpoint
from .checks import (
    available_memory,
    check_left,
    check_rows,
    check_tune,
    check_values,
    find_device,
    predict_bytes,
    read_layout,
)
from .delta import Adapter, Delta
from .errors import InputRefused, ResourceError
from .loading import load_model
from .output import Kind, check_output, write_update
from .recipes import Recipe
from .report import model_card
from .spaces import Layout
from .transport import transport
from .update import Update

log = logging.getLogger(__name__)
Progress = Callable[[str, int], Callable[[], object]]  # stage and its number of steps -> call after every step
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
    "preprocessor_config.json",
)


@dataclass(frozen=True)
class Job:
    """What to move, from where to where.

    Attributes:
        source, target: folders or hub ids of the base models.
        tuned: folder of a tune of the source: a checkpoint or a LoRA adapter.
        out: folder to write.
        output: ``auto`` writes an adapter for an adapter and a checkpoint for a checkpoint.
        calibration: a file, or ``builtin``.
        tokens: calibration tokens, or None for four times the widest space.
    """

    source: str
    tuned: str
    target: str
    out: Path
    calibration: str = "builtin"
    recipe: Recipe = field(default_factory=Recipe)
    alpha: float = 1.0
    output: Literal["auto", "adapter", "checkpoint", "delta"] = "auto"
    device: str = "cpu"
    tokens: int | None = None
    batch_size: int = 8
    seed: int = 0
    leave: tuple[str, ...] = ()
    overwrite: bool = False
    allow_pickle: bool = False


@dataclass
class Outcome:
    """What a job did, for people and programs: everything here is JSON."""

    job: dict[str, Any]
    coverage: list[dict[str, str]]
    maps: list[dict[str, Any]]
    lost_heads: dict[int, list[int]]
    warnings: list[str]
    calibration: str
    tokens: int
    bytes_out: int
    predicted_bytes: int
    used_bytes: int | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    written: str | None = None
    kind: str = ""


class Session:
    """The checked inputs of a job; opening it refuses what cannot work, before anything heavy runs."""

    def __init__(self, job: Job) -> None:
        if not 0 < abs(job.alpha) < float("inf"):
            raise InputRefused(f"alpha is {job.alpha}; give a finite number other than 0")
        for name in ("tokens", "batch_size", "seed"):
            if not 0 <= (getattr(job, name) or 0) < 2**63:
                raise InputRefused(f"{name} is {getattr(job, name)}; give a number from 0 to 2^63 - 1")
        self.job = job
        self.device = find_device(job.device)
        self.source, self.target = (Checkpoint.open(r, allow_pickle=job.allow_pickle) for r in (job.source, job.target))
        self.tuned = Checkpoint.open(job.tuned, allow_pickle=job.allow_pickle)
        for name, checkpoint in (("SOURCE", self.source), ("TARGET", self.target)):
            if checkpoint.kind == "adapter":
                raise InputRefused(f"{name} {checkpoint.folder} is an adapter; give the base model it was trained on")
        self.layouts = (read_layout("SOURCE", self.source), read_layout("TARGET", self.target))
        if self.tuned.kind == "adapter":
            self.delta = Delta(self.source, adapter=Adapter.of(self.tuned))
        else:
            self.delta = Delta.between(self.source, self.tuned)
        self.kind: Kind = _kind(job, self.tuned)
        self.inputs = [c.folder for c in (self.source, self.tuned, self.target)]
        if job.calibration != "builtin":
            self.inputs.append(Path(job.calibration))
        check_values(self.source, self.target, self.tuned)
        if self.tuned.kind == "checkpoint":
            check_tune(self.source, self.tuned, self.layouts[0])
        draft = self.transport(outline(*self.layouts, job.recipe))
        self.coverage = draft.coverage
        check_left(job.leave, self.coverage, self.source, self.tuned)
        self.bytes_out = check_output(draft, job.out, self.kind, overwrite=job.overwrite, inputs=self.inputs)
        self.steps = len(draft)
        widest = max(max(la.width, la.middle, la.heads * la.head_dim) for la in self.layouts)
        self.tokens_wanted = job.tokens or 4 * widest
        self.predicted_bytes = predict_bytes(self.source, self.target, *self.layouts)
        if (available := available_memory()) and self.predicted_bytes > available and self.device.type == "cpu":
            raise ResourceError(
                f"this needs about {self.predicted_bytes / 2**30:.1f} GiB of memory, {available / 2**30:.1f} GiB are "
                "available; free some, or use smaller models"
            )

    def transport(self, alignment: Alignment) -> Update:
        return transport(alignment, self.delta, self.target, alpha=self.job.alpha, leave=self.job.leave)

    def calibration(self) -> Calibration:
        sides = [
            _side(c, la, name)
            for c, la, name in zip((self.source, self.target), self.layouts, ("SOURCE", "TARGET"), strict=True)
        ]
        job = self.job
        return load_calibration(
            job.calibration, *sides, tokens_wanted=self.tokens_wanted, batch_size=job.batch_size, seed=job.seed
        )

    def outcome(self, **known: Any) -> Outcome:
        start: dict[str, Any] = {
            "job": describe(self.job, self.source, self.tuned, self.target),
            "coverage": [asdict(row) for row in self.coverage],
            "maps": [],
            "lost_heads": {},
            "warnings": [],
            "calibration": self.job.calibration,
            "tokens": self.tokens_wanted,
            "bytes_out": self.bytes_out,
            "predicted_bytes": self.predicted_bytes,
            "kind": self.kind,
        }
        return Outcome(**{**start, **known})

    def rehearse(self) -> Outcome:
        """What :meth:`run` would do, calibration data included; nothing is computed or written."""
        with _collected_warnings() as warnings:
            data = self.calibration()
            check_rows(self.coverage, self.source, self.target)
        return self.outcome(calibration=data.description, tokens=data.tokens, warnings=warnings)

    def run(self, progress: Progress) -> Outcome:
        """Align, move and write.

        Raises:
            InputRefused, ResourceError, NumericalError: nothing is left behind.
        """
        seconds: dict[str, float] = {}
        clock = time.perf_counter()

        def lap(stage: str) -> None:
            nonlocal clock
            now = time.perf_counter()
            seconds[stage], clock = now - clock, now

        with _collected_warnings() as warnings:
            check_rows(self.coverage, self.source, self.target)
            data = self.calibration()
            source, target = (load_model(c, la) for c, la in zip((self.source, self.target), self.layouts, strict=True))
            lap("load")
            alignment = align(
                source,
                target,
                data.batches,
                recipe=self.job.recipe,
                device=self.device,
                progress=progress("align", len(data.batches)),
                provenance={"calibration": data.description, "calibration_fingerprint": data.fingerprint},
            )
            del source, target
            lap("align")
            update = self.transport(alignment)
            outcome = self.outcome(
                maps=[asdict(r) for r in alignment.reports],
                lost_heads=alignment.lost,
                calibration=data.description,
                tokens=data.tokens,
                warnings=warnings,
            )
            outcome.job["recipe"] = asdict(alignment.recipe)  # its floor follows the models' precision

            def known() -> Outcome:
                outcome.warnings = [*warnings, *update.warnings]
                return outcome

            files: dict[str, Any] = {"README.md": lambda: model_card(known())}
            if self.kind != "adapter":
                files["config.json"] = json.dumps(self.target.config, indent=2)
                files |= {n: self.target.folder / n for n in TOKENIZER_FILES if (self.target.folder / n).is_file()}
            write_update(
                update,
                self.job.out,
                self.kind,
                files=files,
                metadata=lambda: {"outcome": asdict(known()), "provenance": alignment.provenance},
                base_name=self.job.target,
                overwrite=self.job.overwrite,
                inputs=self.inputs,
                progress=progress("write", self.steps),
            )
            lap("move and write")
        outcome.seconds = seconds
        outcome.used_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        outcome.written = str(self.job.out)
        return outcome


def describe(job: Job, source: Checkpoint, tuned: Checkpoint, target: Checkpoint) -> dict[str, Any]:
    """The job as provenance: choices, inputs with fingerprints, versions."""
    classes = target.config.get("architectures")
    return {
        **{k: str(v) if isinstance(v, Path) else v for k, v in asdict(job).items()},
        "fingerprints": {"source": source.header_hash(), "tuned": tuned.header_hash(), "target": target.header_hash()},
        "target_class": str(classes[0]) if isinstance(classes, list) and classes else "AutoModel",
        "versions": {"theseus": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }


@contextmanager
def _collected_warnings() -> Iterator[list[str]]:
    """What the package warns about meanwhile, for the report."""
    messages: list[str] = []
    handler, package = logging.Handler(logging.WARNING), logging.getLogger(__package__)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    package.addHandler(handler)
    try:
        yield messages
    finally:
        package.removeHandler(handler)


def _kind(job: Job, tuned: Checkpoint) -> Kind:
    if job.output == "auto":
        return "adapter" if tuned.kind == "adapter" else "checkpoint"
    if job.output == "adapter" and tuned.kind != "adapter":
        raise InputRefused(f"TUNED {tuned.folder} is a full checkpoint; write it as --output checkpoint or delta")
    return job.output


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
