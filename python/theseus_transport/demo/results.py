"""What the demo measured, as data."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from .data import SHIFTS

WAYS = {
    "random": "random update, effect's norm",
    "random_tune": "effect, random tune of its norm",
    "wrong": "effect, tune of another shift",
    "paper": "paper",
    "coherent": "coherent",
    "refitted": "classifier refitted, none moved",
    "effect": "effect",
    "ceiling": "trained there (the ceiling)",
}
RIVALS = {"coherent": "effect over coherent", "refitted": "effect over refitted"}  # by name, paired


@dataclass(frozen=True)
class DemoSettings:
    """Sizes of the experiment.

    Attributes:
        seeds: independent repetitions: split of the images, both pretrainings, all fine-tunes. They count from 1;
            seeds 100 and 101 were used to choose the settings and are not reported.
        shifts: names from SHIFTS, at least two.
        widths: of the two models; updates move both ways. depth, heads: of both.
        train: images; the rest of the 1797 is the test set.
        batch: images per step; pretrain_steps, full_steps, lora_steps: AdamW steps with a one-cycle learning rate.
        rank: of the LoRA on every linear layer but the classifier.
        workers: processes of one thread each; 1 stays in this process.
    """

    seeds: int = 4
    shifts: tuple[str, ...] = tuple(SHIFTS)
    widths: tuple[int, int] = (32, 64)
    depth: int = 3
    heads: int = 4
    train: int = 900
    batch: int = 64
    pretrain_steps: int = 1200
    full_steps: int = 100
    lora_steps: int = 200
    rank: int = 8
    workers: int = 2

    @classmethod
    def quick(cls) -> DemoSettings:
        """A few seconds: every step runs, no number means anything."""
        return cls(
            seeds=1,
            shifts=("rotation", "occlusion"),
            widths=(8, 16),
            depth=2,
            heads=2,
            pretrain_steps=4,
            full_steps=2,
            lora_steps=2,
            rank=2,
            workers=1,
        )


@dataclass(frozen=True)
class Cell:
    """Accuracies in percent on the test images of one shift, for one tune; whatever moved, at strength 1.

    Attributes:
        update: ``full`` or ``lora``.
        zero_shot: the target as it was.
        random: with a random update that has, tensor by tensor, the norm of what ``effect`` moved.
        random_tune: with what ``effect`` moved of a random change of the source, of the tune's norm.
        wrong: with what ``effect`` moved of the source's tune of another shift.
        paper, coherent, effect: with what the recipe moved of the source's tune.
        refitted: its classifier alone fitted to how the tune changed the source's logits.
        ceiling: its own fine-tune.
    """

    seed: int
    source: int
    target: int
    shift: str
    update: str
    zero_shot: float
    random: float
    random_tune: float
    wrong: float
    paper: float
    coherent: float
    refitted: float
    effect: float
    ceiling: float


@dataclass(frozen=True)
class DemoResult:
    """All cells, the pretrained models' accuracy on unshifted test images [(seed, width) -> %], and the wall time."""

    settings: DemoSettings
    cells: tuple[Cell, ...]
    pretrained: Mapping[tuple[int, int], float]
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """The result as demo.json holds it."""
        return as_dict(self)


class Interval(NamedTuple):
    """A mean and the half width of its 95 % interval (not finite below two values)."""

    mean: float
    half: float

    def __str__(self) -> str:
        return f"{self.mean:+.1f}" + (f"±{self.half:.1f}" if math.isfinite(self.half) else "")

    def as_dict(self) -> dict[str, float | None]:
        return {"mean": self.mean, "half": self.half if math.isfinite(self.half) else None}


def interval(values: Iterable[float]) -> Interval:
    """Student's t over independent values."""
    from scipy import stats

    found = [float(v) for v in values]
    mean = math.fsum(found) / len(found)
    if len(found) < 2:
        return Interval(mean, math.nan)
    spread = math.sqrt(math.fsum((v - mean) ** 2 for v in found) / (len(found) - 1))
    return Interval(mean, float(stats.t.ppf(0.975, len(found) - 1)) * spread / math.sqrt(len(found)))


def over_seeds(cells: Iterable[Cell], value: Callable[[Cell], float]) -> Interval:
    """The mean of a value over cells, its interval from the means of seeds: cells of one seed share models."""
    found: dict[int, list[float]] = {}
    for cell in cells:
        found.setdefault(cell.seed, []).append(value(cell))
    return interval(math.fsum(values) / len(values) for values in found.values())


def gain(cells: Iterable[Cell], way: str) -> Interval:
    """Of one of WAYS over zero-shot, in percentage points, paired within each cell."""
    return over_seeds(cells, lambda cell: float(getattr(cell, way)) - cell.zero_shot)


def lead(cells: Iterable[Cell], rival: str) -> Interval:
    """Of ``effect`` over another of WAYS, in percentage points, paired within each cell."""
    return over_seeds(cells, lambda cell: cell.effect - float(getattr(cell, rival)))


def updates(result: DemoResult) -> dict[str, list[Cell]]:
    """Kind of update -> its cells."""
    found: dict[str, list[Cell]] = {}
    for cell in result.cells:
        found.setdefault(cell.update, []).append(cell)
    return found


def as_dict(result: DemoResult) -> dict[str, Any]:
    """The result as plain JSON; intervals as mean and half width in percentage points, null where undefined."""
    return {
        "format": 2,
        "settings": asdict(result.settings),
        "seconds": round(result.seconds, 1),
        "pretrained": [{"seed": s, "width": w, "accuracy": a} for (s, w), a in sorted(result.pretrained.items())],
        "gains": [
            {
                "update": update,
                "cells": len(cells),
                "zero_shot": math.fsum(c.zero_shot for c in cells) / len(cells),
                **{way: gain(cells, way).as_dict() for way in WAYS},
                "effect_over": {rival: lead(cells, rival).as_dict() for rival in RIVALS},
            }
            for update, cells in updates(result).items()
        ],
        "cells": [asdict(cell) for cell in result.cells],
    }


def write_json(result: DemoResult, path: Path) -> Path:
    path.write_text(json.dumps(as_dict(result), indent=1) + "\n")
    return path
