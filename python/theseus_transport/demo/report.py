"""What the demo shows: gains over zero-shot with their intervals, as a table and as a plot."""

from __future__ import annotations

import math
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from .results import RIVALS, WAYS, DemoResult, gain, lead, over_seeds, updates

NAMES = {"full": "Full fine-tune", "lora": "LoRA"}


def render_table(result: DemoResult) -> Table:
    """Gains over zero-shot and their share of the ceiling's, one row per way, full fine-tunes beside LoRAs."""
    settings, kinds = result.settings, updates(result)
    small, large = settings.widths
    table = Table(
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        title=f"Gain over zero-shot in percentage points, ViT {small} to {large} and back",
        caption=f"Mean over {len(settings.shifts)} shifts ({', '.join(settings.shifts)}), both directions and "
        f"{settings.seeds} seeds, with its 95 % interval over seeds, paired. Strength 1, no label used but for the "
        f"ceiling. {result.seconds:.0f} s.",
    )
    table.add_column("", no_wrap=True)
    for kind in kinds:
        table.add_column(NAMES[kind], justify="right", no_wrap=True)
        table.add_column("share", justify="right", no_wrap=True)
    zero_shot = [f"{over_seeds(cells, lambda c: c.zero_shot).mean:.1f} %" for cells in kinds.values()]
    table.add_row("accuracy before (zero-shot)", *(text for own in zero_shot for text in (own, "")), end_section=True)
    for way, label in WAYS.items():
        row = [label]
        for cells in kinds.values():
            found, most = gain(cells, way), gain(cells, "ceiling")
            row += [str(found), f"{100 * found.mean / most.mean:.0f} %" if most.mean > 0 else ""]
        table.add_row(*row, end_section=way == "ceiling")
    for rival, label in RIVALS.items():
        leads = [str(lead(cells, rival)) for cells in kinds.values()]
        table.add_row(label, *(text for own in leads for text in (own, "")))
    return table


def plot(result: DemoResult, path: Path) -> Path:
    """Accuracy per shift, zero-shot, by several ways, and of the target's own fine-tune; a panel per kind of update."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    bars = (
        ("zero_shot", "zero-shot", "#c3c8d0"),
        ("random_tune", "moved, random tune", "#8b93a1"),
        ("coherent", "moved, coherent", "#7fb3d5"),
        ("effect", "moved, effect", "#1f6fb2"),
        ("refitted", "classifier refitted", "#8fbf8f"),
        ("ceiling", "own fine-tune (ceiling)", "#f0b35e"),
    )
    settings, kinds = result.settings, updates(result)
    small, large = settings.widths
    figure, axes = pyplot.subplots(len(kinds), 1, figsize=(9, 2.9 * len(kinds) + 0.9), sharex=True, squeeze=False)
    for axis, (kind, cells) in zip(axes[:, 0], kinds.items(), strict=True):
        for place, shift in enumerate(settings.shifts):
            own = [cell for cell in cells if cell.shift == shift]
            for k, (way, label, color) in enumerate(bars):
                half = gain(own, way).half
                axis.bar(
                    place + 0.14 * (k - 2.5),
                    over_seeds(own, lambda cell, way=way: getattr(cell, way)).mean,  # type: ignore[misc]
                    0.13,
                    yerr=half if way != "zero_shot" and math.isfinite(half) else None,
                    color=color,
                    label=label if place == 0 else None,
                    error_kw={"elinewidth": 1, "capsize": 2, "ecolor": "#333a45"},
                )
        axis.axhline(10, color="#5a6270", linewidth=0.8, linestyle=":", label="chance")
        axis.set_title(NAMES[kind], loc="left", fontsize=11, fontweight="bold")
        axis.set_ylabel("accuracy on the target, %")
        axis.set_ylim(0, 100)
        axis.set_yticks(range(0, 101, 20))
        axis.grid(axis="y", color="#e6e9ee", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.tick_params(length=0)
        axis.spines[["top", "right", "left"]].set_visible(False)
    axes[-1, 0].set_xticks(range(len(settings.shifts)), settings.shifts)
    figure.suptitle(
        f"Fine-tunes moved between vision transformers {small} and {large} wide, without training",
        x=0.01, y=0.99, ha="left", fontsize=13, fontweight="bold",
    )  # fmt: skip
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper left", bbox_to_anchor=(0.005, 0.955), ncols=7, frameon=False, fontsize=8,
                  columnspacing=1.1, handlelength=1.0, handletextpad=0.5)  # fmt: skip
    note = f"Mean over {settings.seeds} seeds and both directions, strength 1; lines: 95 % interval of the gain."
    figure.text(0.01, 0.008, note, fontsize=8, color="#5a6270")
    figure.tight_layout(rect=(0, 0.02, 1, 0.945))
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path
