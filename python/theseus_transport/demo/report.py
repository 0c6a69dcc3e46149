"""What the demo shows: gains over zero-shot with their intervals, as a table, as JSON and as a plot."""

from __future__ import annotations

import math
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from .data import APART
from .results import COLUMNS, DemoResult, gains, groups, interval


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
