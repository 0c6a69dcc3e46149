"""What the demo shows: gains over zero-shot with their intervals, as a table, as JSON and as a plot."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.table import Table

from .demo_data import APART

if TYPE_CHECKING:
    from .demo import Cell, DemoResult

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
    """Everything, as plain JSON; intervals as mean and half width in percentage points, null where undefined."""
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


def render_table(result: DemoResult) -> Table:
    """Gains over zero-shot, one row per recipe and kind of update."""
    settings = result.settings
    averaged = [s for s in settings.shifts if s not in APART]
    small, large = settings.widths
    table = Table(
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        title=f"Gain over zero-shot in percentage points, ViT {small} to {large} and back",
        caption=f"Mean and 95 % interval, paired, over {settings.seeds} seeds x 2 directions x shifts "
        f"({', '.join(averaged)}); {', '.join(APART)} apart (chance is 10 %). "
        "Alpha tuned on labelled validation images. Random: the norm of the moved update, tensor by tensor. "
        f"{result.seconds:.0f} s.",
    )
    for header in ("shifts", "recipe", "kind"):
        table.add_column(header, no_wrap=True)
    shown = [column for column in COLUMNS if column != "random_tuned"]  # a terminal is 80 wide; the JSON has all
    for header in ("zero-\nshot %", *(COLUMNS[column] for column in shown)):
        table.add_column(header, justify="right", no_wrap=True)
    previous = None
    for (shift, recipe, update), cells in groups(result).items():
        if previous not in (None, shift):
            table.add_section()
        zero_shot = sum(c.zero_shot for c in cells) / len(cells)
        label = shift if shift in APART else f"{len(averaged)} shifts"
        found = gains(cells)
        name = "" if shift == previous else label
        table.add_row(name, recipe, update, f"{zero_shot:.1f}", *(str(found[column]) for column in shown))
        previous = shift
    return table


def write_json(result: DemoResult, path: Path) -> Path:
    path.write_text(json.dumps(as_dict(result), indent=1) + "\n")
    return path


def plot(result: DemoResult, path: Path) -> Path:
    """Accuracy per shift: zero-shot, moved by the default recipe, the target's own fine-tune; a panel per update."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    bars = (
        ("zero_shot", "zero-shot", "#c3c8d0"),
        ("random", "random, same norm", "#8b93a1"),
        ("transported", "moved, alpha 1", "#7fb3d5"),
        ("transported_tuned", "moved, alpha tuned", "#1f6fb2"),
        ("ceiling", "own fine-tune (ceiling)", "#f0b35e"),
    )
    small, large = result.settings.widths
    updates = list(dict.fromkeys(c.update for c in result.cells))
    figure, axes = pyplot.subplots(len(updates), 1, figsize=(9, 2.9 * len(updates) + 0.9), sharex=True, squeeze=False)
    for axis, update in zip(axes[:, 0], updates, strict=True):
        for place, shift in enumerate(result.settings.shifts):
            cells = [c for c in result.cells if (c.shift, c.update, c.recipe) == (shift, update, "coherent")]
            for k, (column, label, color) in enumerate(bars):
                accuracies = interval(getattr(c, column) for c in cells)
                gain = interval(getattr(c, column) - c.zero_shot for c in cells)
                error = gain.half if column != "zero_shot" and math.isfinite(gain.half) else 0.0
                axis.bar(
                    place + 0.165 * (k - 2),
                    accuracies.mean,
                    0.155,
                    yerr=error or None,
                    color=color,
                    label=label if place == 0 else None,
                    error_kw={"elinewidth": 1, "capsize": 2, "ecolor": "#333a45"},
                )
        axis.axhline(10, color="#5a6270", linewidth=0.8, linestyle=":", label="chance")
        axis.set_title({"full": "Full fine-tune", "lora": "LoRA"}[update], loc="left", fontsize=11, fontweight="bold")
        axis.set_ylabel("accuracy on the target, %")
        axis.set_ylim(0, 100)
        axis.set_yticks(range(0, 101, 20))
        axis.grid(axis="y", color="#e6e9ee", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.tick_params(length=0)
        axis.spines[["top", "right", "left"]].set_visible(False)
    axes[-1, 0].set_xticks(range(len(result.settings.shifts)), result.settings.shifts)
    figure.suptitle(
        f"Fine-tunes moved between vision transformers {small} and {large} wide, without training",
        x=0.01, y=0.99, ha="left", fontsize=13, fontweight="bold",
    )  # fmt: skip
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper left", bbox_to_anchor=(0.005, 0.955), ncols=6, frameon=False, fontsize=9,
                  columnspacing=1.2, handlelength=1.0, handletextpad=0.5)  # fmt: skip
    seeds = result.settings.seeds
    note = f"Recipe coherent; mean over {seeds} seeds and both directions; lines: 95 % interval of the gain."
    figure.text(0.01, 0.008, note, fontsize=8, color="#5a6270")
    figure.tight_layout(rect=(0, 0.02, 1, 0.945))
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path
