"""One transport from files to files: check everything, align, move, write; what the command runs."""

from __future__ import annotations

import json
import logging
import resource
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import nn

from . import __version__
from .alignment import Alignment, align, outline
from .calibration import Calibration, SideInfo, load_calibration
from .checkpoint import Checkpoint, check_finite
from .delta import Adapter, Delta
from .errors import InputRefused, ResourceError
from .output import Kind, check_output, write_update
from .recipes import Recipe
from .report import model_card
from .spaces import Layout
from .transport import transport
from .update import Update

log = logging.getLogger(__name__)
UNRELATED = 0.05  # cosine of weights below which TUNED cannot be a tune of SOURCE
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
        self.job = job
        self.device = _device(job.device)
        self.source, self.target = (Checkpoint.open(r, allow_pickle=job.allow_pickle) for r in (job.source, job.target))
        self.tuned = Checkpoint.open(job.tuned, allow_pickle=job.allow_pickle)
        for name, checkpoint in (("SOURCE", self.source), ("TARGET", self.target)):
            if checkpoint.kind == "adapter":
                raise InputRefused(f"{name} {checkpoint.folder} is an adapter; give the base model it was trained on")
        self.layouts = (Layout.of(self.source.config), Layout.of(self.target.config))
        if self.tuned.kind == "adapter":
            self.delta = Delta(self.source, adapter=Adapter(self.tuned.adapter_config, self.tuned))
        else:
            self.delta = Delta.between(self.source, self.tuned)
        self.kind: Kind = _kind(job, self.tuned)
        self.inputs = [c.folder for c in (self.source, self.tuned, self.target)]
        self.screen()
        draft = self.transport(outline(*self.layouts, job.recipe))
        self.coverage = draft.coverage
        self.bytes_out = check_output(draft, job.out, self.kind, overwrite=job.overwrite, inputs=self.inputs)
        self.steps = len(draft)
        widest = max(max(la.width, la.middle, la.heads * la.head_dim) for la in self.layouts)
        self.tokens_wanted = job.tokens or 4 * widest
        self.predicted_bytes = predict_bytes(self.source, self.target, *self.layouts)
        if (available := _available()) and self.predicted_bytes > available and self.device.type == "cpu":
            raise ResourceError(
                f"this needs about {self.predicted_bytes / 2**30:.1f} GiB of memory, {available / 2**30:.1f} GiB are "
                "available; free some, or use smaller models"
            )

    def screen(self) -> None:
        """Refuse NaN and Inf in any input, and a TUNED that is no tune of SOURCE.

        Fine-tuning moves weights a little; two models trained apart are uncorrelated.
        """
        for checkpoint in (self.source, self.target, self.tuned):
            for name in checkpoint:
                check_finite(f"{name} of {checkpoint.folder}", checkpoint[name])
        if self.tuned.kind == "adapter":
            return
        names = [self.layouts[0].family.index(c) for c in (self.source, self.tuned)]
        dot, base, tuned = torch.zeros(3, dtype=torch.float64)
        for name in names[0].keys() & names[1].keys():
            a, b = self.source[names[0][name]].double(), self.tuned[names[1][name]].double()
            if a.ndim > 1 and a.shape == b.shape:
                dot, base, tuned = dot + (a * b).sum(), base + a.square().sum(), tuned + b.square().sum()
        cosine = float(dot / (base * tuned).sqrt().clamp(min=1e-300))
        if cosine < UNRELATED:
            raise InputRefused(
                f"the weights of TUNED and SOURCE have cosine {cosine:.3f}, but a tune stays near 1: "
                f"was {self.tuned.folder.name} trained from {self.source.folder.name}?"
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
            "job": describe(self.job, self.source, self.target),
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

        data = self.calibration()
        source, target = (load_model(c, la) for c, la in zip((self.source, self.target), self.layouts, strict=True))
        lap("load")
        collected = _Warnings()
        package = logging.getLogger(__package__)
        package.addHandler(collected)
        try:
            alignment = align(
                source,
                target,
                data.batches,
                recipe=self.job.recipe,
                device=self.device,
                progress=progress("align", len(data.batches)),
                provenance={"calibration": data.description, "calibration_fingerprint": data.fingerprint},
            )
        finally:
            package.removeHandler(collected)
        del source, target
        lap("align")
        update = self.transport(alignment)

        def record() -> dict[str, Any]:
            outcome.warnings = [*collected.messages, *update.warnings]
            return {"outcome": asdict(outcome), "provenance": alignment.provenance}

        outcome = self.outcome(
            maps=[asdict(r) for r in alignment.reports],
            lost_heads=alignment.lost,
            calibration=data.description,
            tokens=data.tokens,
            warnings=list(collected.messages),
        )
        files: dict[str, Any] = {"README.md": model_card(outcome)}
        if self.kind != "adapter":
            files["config.json"] = json.dumps(self.target.config, indent=2)
            files |= {n: self.target.folder / n for n in TOKENIZER_FILES if (self.target.folder / n).is_file()}
        write_update(
            update,
            self.job.out,
            self.kind,
            files=files,
            metadata=record,
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


def describe(job: Job, source: Checkpoint, target: Checkpoint) -> dict[str, Any]:
    """The job as provenance: choices, inputs with fingerprints, versions."""
    return {
        **{k: str(v) if isinstance(v, Path) else v for k, v in asdict(job).items()},
        "fingerprints": {"source": source.header_hash(), "target": target.header_hash()},
        "versions": {"theseus": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }


def load_model(checkpoint: Checkpoint, layout: Layout) -> nn.Module:
    """The backbone in float32 (float64 where the checkpoint is), for forward passes only.

    Raises:
        InputRefused: transformers cannot build it, or tensors are missing (they would be random).
    """
    double = torch.float64 in checkpoint.dtypes.values()
    extra = {"add_pooling_layer": False} if layout.family.modality == "vision" else {}
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        model, info = transformers.AutoModel.from_pretrained(
            checkpoint.folder,
            dtype=torch.float64 if double else torch.float32,
            use_safetensors=all(p.suffix != ".bin" for p in checkpoint.files),
            local_files_only=True,
            output_loading_info=True,
            **extra,
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise InputRefused(f"transformers cannot load {checkpoint.folder}: {error}") from error
    finally:
        transformers.logging.set_verbosity(level)
        transformers.logging.enable_progress_bar()
    if missing := sorted(info["missing_keys"]):
        raise InputRefused(f"{checkpoint.folder} lacks {missing[0]} ({len(missing)} such tensors); is it complete?")
    return model


def predict_bytes(source: Checkpoint, target: Checkpoint, s: Layout, t: Layout) -> int:
    """Peak host memory in bytes: float32 weights, float64 moments and maps, workspace of the widest decomposition."""
    elements = sum(torch.Size(shape).numel() for c in (source, target) for shape in c.shapes.values())
    spaces = sum(a.width * b.width for a, b in zip(s.spaces(), t.spaces(), strict=True))
    widest = max(a.width * b.width for a, b in zip(s.spaces(), t.spaces(), strict=True))
    runtime = 500 << 20  # the interpreter with torch and transformers
    return runtime + 4 * elements + 3 * 8 * spaces + 5 * 8 * widest


class _Warnings(logging.Handler):
    """Collects what the library warns about, for the report."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def _kind(job: Job, tuned: Checkpoint) -> Kind:
    if job.output == "auto":
        return "adapter" if tuned.kind == "adapter" else "checkpoint"
    if job.output == "adapter" and tuned.kind != "adapter":
        raise InputRefused(f"TUNED {tuned.folder} is a full checkpoint; write it as --output checkpoint or delta")
    return job.output


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputRefused(f"device is {name!r}; give cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputRefused(f"device is {name}, but this torch sees no GPU; run `theseus doctor`, or use --device cpu")
    if device.type not in ("cpu", "cuda"):
        raise InputRefused(f"device is {name!r}; only cpu and cuda are supported")
    return device


def _side(checkpoint: Checkpoint, layout: Layout, name: str) -> SideInfo:
    vision = layout.family.modality == "vision"
    return SideInfo(
        folder=checkpoint.folder,
        kind=layout.family.modality,
        name=f"{name} {checkpoint.folder.name}",
        vocab_size=layout.vocabulary,
        channels=layout.channels,
        image_size=layout.image,
        max_positions=checkpoint.config.get("max_position_embeddings"),
        tokens_per_image=layout.grid[0] * layout.grid[1] + 1 if vision else 1,
    )


def _available() -> int | None:
    """Available host memory in bytes, where the system says."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)
