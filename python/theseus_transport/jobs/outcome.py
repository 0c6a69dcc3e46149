"""What a job did: for people, for programs, and for the manifest."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..alignment.alignment import Alignment
from ..files.checkpoint import Checkpoint
from ..machine import peak_memory
from ..models.pair import SIDES
from ..streaming.passage import Passage
from ..streaming.window import Window
from .bases import Fit
from .provenance import versions

RUNS = ("overwrite", "resume", "max_ram", "max_memory", "offload_folder")  # of a job, what its result does not show


@dataclass
class Outcome:
    """What a job did, for people and programs: everything here is JSON."""

    job: dict[str, Any]
    coverage: list[dict[str, str]]
    warnings: list[str]
    calibration: str
    tokens: int
    bytes_out: int
    plan: str
    predicted_bytes: int
    predicted_seconds: dict[str, float]
    kind: str
    maps: list[dict[str, Any]] = field(default_factory=list)
    quality: list[dict[str, Any]] = field(default_factory=list)
    blocks: list[int | None] = field(default_factory=list)
    skipped: str = ""
    carried: list[str] = field(default_factory=list)
    arrived: list[dict[str, Any]] = field(default_factory=list)
    removed: dict[str, float] = field(default_factory=dict)
    fits: dict[str, dict[str, float]] = field(default_factory=dict)
    rank: int | None = None
    lost_heads: dict[int, list[int]] = field(default_factory=dict)
    alphas: list[dict[str, Any]] = field(default_factory=list)
    used_bytes: int | None = None
    predicted_device_bytes: int = 0
    used_device_bytes: int | None = None
    bytes_read: int | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    written: str | None = None


class Clock:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage], self._last = now - self._last, now

    def stages(self, seconds: Mapping[str, float]) -> None:
        """Stages that were timed elsewhere, up to now."""
        self.seconds |= seconds
        self._last = time.perf_counter()

    def finish(self, outcome: Outcome, out: Path, *windows: Window) -> Outcome:
        """The outcome with time, memory and what was read of the weights."""
        outcome.seconds, outcome.written = self.seconds, str(out)
        outcome.bytes_read = sum(window.bytes_read for window in windows)
        outcome.used_bytes = peak_memory()
        if outcome.predicted_device_bytes:
            outcome.used_device_bytes = torch.cuda.max_memory_allocated(outcome.job["device"])
        return outcome


def begun(fitted: Fit, **known: Any) -> Outcome:
    """What is known of a job before it runs, and what else is ``known``."""
    start: dict[str, Any] = {
        "coverage": [],
        "warnings": [],
        "calibration": fitted.bases.job.calibration,
        "tokens": fitted.tokens,
        "plan": fitted.plan.choice.words,
        "predicted_bytes": fitted.plan.peak,
        "predicted_device_bytes": fitted.plan.device_peak,
        "predicted_seconds": fitted.seconds,
    }
    return Outcome(**{**start, **known})


def told(alignment: Alignment) -> dict[str, Any]:
    """What an alignment says of itself."""
    known = alignment.provenance
    return {
        "maps": [asdict(r) for r in alignment.reports],
        "blocks": alignment.blocks,
        "lost_heads": alignment.lost,
        "quality": known.get("quality", []),
        "calibration": known.get("calibration", "unknown"),
        "tokens": known.get("tokens", 0),
    }


def arrived(passage: Passage | None) -> dict[str, Any]:
    """What a pass says once it is over: how much of the effect arrived, and what was not run."""
    if passage is None:
        return {}
    removed = {f"{alpha:g}": share for alpha, share in passage.removed.items()}
    return {"arrived": [asdict(one) for one in passage.arrived], "removed": removed, "skipped": passage.skipped}


def told_in_manifest(outcome: Outcome) -> dict[str, Any]:
    """What a manifest records: nothing that another run of the same job would measure otherwise."""
    predicted = {"plan": "", "predicted_bytes": 0, "predicted_device_bytes": 0, "predicted_seconds": {}}
    measured: dict[str, Any] = {"seconds": {}, "used_bytes": None, "used_device_bytes": None, "bytes_read": None}
    return {**asdict(outcome), **predicted, **measured}


def describe(job: Any, *checkpoints: Checkpoint) -> dict[str, Any]:
    """The job as provenance: choices, inputs with fingerprints, versions."""
    classes = checkpoints[1].config.get("architectures")
    given = classes if isinstance(classes, list) else []
    named = [name for name in given if isinstance(name, str) and name.isidentifier()]  # it becomes code to be copied
    hashes = {name: c.header_hash() for name, c in zip((*SIDES, "tuned"), checkpoints, strict=False)}
    return {
        **{k: str(v) if isinstance(v, Path) else v for k, v in asdict(job).items() if k not in RUNS},
        **({"alpha": job.strength} if hasattr(job, "strength") else {}),
        "fingerprints": hashes,
        "target_class": named[0] if named else "AutoModel",
        "versions": versions(),
    }


@contextmanager
def collected_warnings() -> Iterator[list[str]]:
    """What the package warns about meanwhile, for the report."""
    messages: list[str] = []
    handler, package = logging.Handler(logging.WARNING), logging.getLogger("theseus_transport")
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    package.addHandler(handler)
    try:
        yield messages
    finally:
        package.removeHandler(handler)
