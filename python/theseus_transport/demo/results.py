"""What the demo measured, as data."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from .data import APART, SHIFTS


@dataclass(frozen=True)
class DemoSettings:
    """Sizes of the experiment.

    Attributes:
        seeds: independent repetitions: split of the images, both pretrainings, all fine-tunes. They count from 1;
            seed 0 was used to choose the settings and is not reported.
        shifts: names from SHIFTS.
        widths: of the two models; updates move both ways. depth, heads: of both.
        train, validation: images; the rest of the 1797 is the test set.
        batch: images per step; pretrain_steps, tune_steps: AdamW steps with a one-cycle learning rate.
        rank: of the LoRA on every linear layer but the classifier.
        alphas: strengths tried on the validation images.
        workers: processes of one thread each; 1 stays in this process.
    """

    seeds: int = 2
    shifts: tuple[str, ...] = tuple(SHIFTS)
    widths: tuple[int, int] = (32, 64)
    depth: int = 3
    heads: int = 4
    train: int = 900
    validation: int = 297
    batch: int = 64
    pretrain_steps: int = 1200
    tune_steps: int = 100
    rank: int = 8
    alphas: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)
    workers: int = 2

    @classmethod
    def quick(cls) -> DemoSettings:
        """A few seconds: every step runs, no number means anything."""
        return cls(
            seeds=1,
            shifts=("rotation", "inversion"),
            widths=(8, 16),
            depth=2,
            heads=2,
            pretrain_steps=4,
            tune_steps=2,
            rank=2,
            alphas=(0.5, 1.0),
            workers=1,
        )


@dataclass(frozen=True)
class Cell:
    """Accuracies in percent on the test images of one shift, for one moved update.

    ``transported`` and ``random`` are at alpha 1; ``*_tuned`` at the alpha that is best on the validation images.
    """

    seed: int
    source: int
    target: int
    shift: str
    recipe: str
    update: str
    zero_shot: float
    transported: float
    transported_tuned: float
    random: float
    random_tuned: float
    ceiling: float
    alpha: float


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


COLUMNS = {
    "transported": "moved\nalpha 1",
    "transported_tuned": "moved\ntuned",
    "random": "random\nalpha 1",
    "random_tuned": "random\ntuned",
    "ceiling": "own\nfine-tune",
}


class Interval(NamedTuple):
    """A mean and the half width of its 95 % interval (not finite below two values)."""

    mean: float
    half: float

    def __str__(self) -> str:
        return f"{self.mean:+.1f}" + (f"±{self.half:.1f}" if math.isfinite(self.half) else "")


def interval(values: Iterable[float]) -> Interval:
    """Student's t over the values, each one a paired difference of one cell."""
    from scipy import stats

    found = [float(v) for v in values]
    mean = math.fsum(found) / len(found)
    if len(found) < 2:
        return Interval(mean, math.nan)
    spread = math.sqrt(math.fsum((v - mean) ** 2 for v in found) / (len(found) - 1))
    return Interval(mean, float(stats.t.ppf(0.975, len(found) - 1)) * spread / math.sqrt(len(found)))


def gains(cells: Iterable[Cell]) -> dict[str, Interval]:
    """Column -> gain over zero-shot in percentage points, paired within each (seed, shift, direction)."""
    chosen = list(cells)
    return {column: interval(getattr(c, column) - c.zero_shot for c in chosen) for column in COLUMNS}


def groups(result: DemoResult) -> dict[tuple[str, str, str], list[Cell]]:
    """(shifts, recipe, update) -> cells: the shifts that are averaged, then each that is reported apart."""
    found: dict[tuple[str, str, str], list[Cell]] = {}
    for cell in sorted(result.cells, key=lambda c: c.shift in APART):
        shift = cell.shift if cell.shift in APART else "shifts"
        found.setdefault((shift, cell.recipe, cell.update), []).append(cell)
    return found


def as_dict(result: DemoResult) -> dict[str, Any]:
    """The result as plain JSON; intervals as mean and half width in percentage points, null where undefined."""
    return {
        "format": 1,
        "settings": asdict(result.settings),
        "seconds": round(result.seconds, 1),
        "pretrained": [{"seed": s, "width": w, "accuracy": a} for (s, w), a in sorted(result.pretrained.items())],
        "gains": [
            {
                "shifts": sorted({c.shift for c in cells}),
                "recipe": recipe,
                "update": update,
                "cells": len(cells),
                "zero_shot": sum(c.zero_shot for c in cells) / len(cells),
                **{
                    name: {"mean": g.mean, "half": g.half if math.isfinite(g.half) else None}
                    for name, g in gains(cells).items()
                },
            }
            for (_, recipe, update), cells in groups(result).items()
        ],
        "cells": [asdict(cell) for cell in result.cells],
    }


def write_json(result: DemoResult, path: Path) -> Path:
    path.write_text(json.dumps(as_dict(result), indent=1) + "\n")
    return path
