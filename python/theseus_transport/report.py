"""What people read: coverage, maps, predicted and used, what to do next; and the model card."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jinja2
from markupsafe import Markup
from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from .terminal import in_page, percent

if TYPE_CHECKING:
    from .outcome import Outcome
    from .plan import Plan

MATCH = "alpha |delta_T| / |W_T| = |delta_S| / |W_S|, norms over the weight matrices that move"
PAGE = jinja2.Environment(finalize=lambda value: value if isinstance(value, Markup) else in_page(value))
CARD = PAGE.from_string(
    """\
---
base_model: {{ job.target | tojson }}
{% if kind == "adapter" %}library_name: peft
{% else %}library_name: transformers
{% endif %}tags:
- theseus
- training-free
---

# {{ title }}

Moved from `{{ job.source }}` to `{{ job.target }}` by [Theseus](https://arxiv.org/abs/2602.12952) without training: the
update of `{{ job.tuned }}` was mapped through an alignment of the two base models' activations. It has not been
evaluated; measure it on your task before you rely on it.

| | |
|---|---|
| output | {{ kind }} |
| recipe | {{ recipe }} |
| alpha | {{ job.alpha }}{% if alphas[0].asked == "match" %} (match: {{ match }}){% endif %} |
{% if rounding %}| rounding | {{ rounding }} of the update |
{% endif %}| calibration | {{ calibration }} |
| tensors | {% for fate, n in fates %}{{ n }} {{ fate }}{% if not loop.last %}, {% endif %}{% endfor %} |
{% if maps %}| maps | {{ maps | length }}, lowest rank {{ "%.0f" | format(100 * lowest) }} % of the most it could have |
{% endif %}{% if quality %}| held out | {{ held }} |
{% endif %}{% if carried %}| from the tune | {{ carried | join(", ") }} |
{% endif %}| versions | {% for name, v in job.versions.items() %}{{ name }} {{ v }} {% endfor %}|
{% if warnings %}
## Warnings

{% for warning in warnings %}- {{ warning }}
{% endfor %}{% endif %}
"""
)


def model_card(outcome: Outcome) -> str:
    """README.md of an output folder: recipe, numbers, warnings."""
    fates = sorted(Counter(row["fate"] for row in outcome.coverage).items())
    lowest = min((_share(m) for m in outcome.maps), default=1.0)
    title = {"adapter": "Moved LoRA adapter", "checkpoint": "Moved fine-tune", "delta": "Moved task vector"}[
        outcome.kind
    ]
    card: str = CARD.render(
        **vars(outcome) | {"warnings": condensed(outcome.warnings)},
        fates=fates,
        lowest=lowest,
        title=title,
        held=held_out(outcome.quality) if outcome.quality else "",
        recipe=choices(outcome.job["recipe"]),
        match=MATCH,
        rounding=percent(lost, 1) if (lost := outcome.alphas[0]["rounding"]["total"]) else "",
    )
    return card


def coverage_table(rows: list[dict[str, str]]) -> Table:
    """The fate of every tensor, tensors of all blocks in one line."""
    counts = Counter((_kind(row["tensor"]), row["fate"], row["note"]) for row in rows)
    table = Table(title="Coverage (* is every block)", title_justify="left", box=SIMPLE_HEAD)
    table.add_column("layer", no_wrap=True)
    for column in ("tensors", "fate", "why"):
        table.add_column(column)
    colours = {"transported": "green", "folded": "green", "unchanged": "dim", "left": "yellow"}
    for (layer, fate, note), n in counts.items():
        table.add_row(escape(layer), str(n), Text(fate, colours.get(fate, "")), escape(note))
    return table


def by_kind(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows of the same space in every block, under its name with * for the block."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        kinds.setdefault(re.sub(r"\d+", "*", row["space"]), []).append(row)
    return kinds


def maps_table(maps: list[dict[str, Any]]) -> Table:
    """Rank and gap of the maps, one line per kind of space: the weakest of all blocks."""
    table = Table(
        "space",
        "maps",
        "source x target",
        "lowest rank",
        "smallest gap",
        title="Maps (* is every block, the weakest is shown)",
        title_justify="left",
        box=SIMPLE_HEAD,
    )
    for kind, group in by_kind(maps).items():
        worst = min(group, key=_share)
        colour = "yellow" if _share(worst) < 1 / 2 else ""
        gap = f"{min(m['gap'] for m in group):.1e}"
        size = f"{worst['source']} x {worst['target']}"
        table.add_row(escape(kind), str(len(group)), size, Text(f"{worst['rank']} of {worst['most']}", colour), gap)
    return table


def quality_table(quality: list[dict[str, Any]]) -> Table:
    """How maps do on held-out rows, one line per kind of space: the worst of all blocks."""
    table = Table(
        "space",
        "maps",
        "held out",
        "shifted rows",
        title="Quality (1 is a perfect match, shifted rows are chance; the worst of all blocks)",
        title_justify="left",
        box=SIMPLE_HEAD,
    )
    for kind, group in by_kind(quality).items():
        worst = min(group, key=lambda row: row["held"] - row["shifted"])
        colour = "yellow" if worst["near_chance"] else ""
        table.add_row(escape(kind), str(len(group)), Text(f"{worst['held']:.2f}", colour), f"{worst['shifted']:.2f}")
    return table


def report(outcome: Outcome) -> RenderableType:
    """All of an outcome, for a terminal."""
    parts: list[RenderableType] = [coverage_table(outcome.coverage), coverage_counts(outcome)] * bool(outcome.coverage)
    if outcome.maps:
        parts += ["", maps_table(outcome.maps)]
    if outcome.quality:
        parts += ["", quality_table(outcome.quality)]
    facts = Table.grid(padding=(0, 2))
    facts.add_row("calibration", escape(outcome.calibration))
    used = "" if outcome.used_bytes is None else f", {size(outcome.used_bytes)} used"
    facts.add_row("memory", f"{size(outcome.predicted_bytes)} predicted{used} ({outcome.plan})")
    if outcome.predicted_device_bytes:
        used = "" if outcome.used_device_bytes is None else f", {size(outcome.used_device_bytes)} used"
        facts.add_row("device memory", f"{size(outcome.predicted_device_bytes)} predicted{used}")
    if outcome.carried:
        facts.add_row("from TUNED", escape(", ".join(outcome.carried)))
    if outcome.skipped:
        facts.add_row("skipped", outcome.skipped)
    if outcome.bytes_read is not None:
        facts.add_row("weights read", size(outcome.bytes_read))
    facts.add_row("output", f"{outcome.kind}, {size(outcome.bytes_out)}")
    facts.add_row("time predicted", _stages(outcome.predicted_seconds) + ", by flops and this machine's rate")
    if outcome.seconds:
        facts.add_row("time used", _stages(outcome.seconds))
    for row in outcome.alphas:
        alpha = f"{row['alpha']:.4g}" + (f" (match: {MATCH})" if row["asked"] == "match" else "")
        if row["rounding"]["tensors"]:
            alpha += f", rounding is {percent(row['rounding']['total'], 1)} of the update"
        facts.add_row("alpha", alpha)
    if outcome.blocks and outcome.blocks != list(range(len(outcome.blocks))):
        facts.add_row("blocks", pairing(outcome.blocks))
    if outcome.lost_heads:
        lost = sum(map(len, outcome.lost_heads.values()))
        facts.add_row("heads", f"{lost} source heads (of all blocks) have no place in the target; their update is lost")
    parts += ["", facts, *warnings(outcome.warnings), "", "[bold]next[/]"]
    parts += [Text(f"  {line}", no_wrap=True, overflow="ignore") for line in next_steps(outcome)]  # to be copied whole
    return Group(*parts)


def plan_table(plan: Plan, seconds: dict[str, float]) -> RenderableType:
    """How a run would fit its memory."""
    table = Table("stage", "host memory", *["device memory"] * bool(plan.device), title="Plan", title_justify="left",
                  box=SIMPLE_HEAD)  # fmt: skip
    for stage, nbytes in plan.host.items():
        device = [size(plan.device[stage]) if stage in plan.device else ""] * bool(plan.device)
        table.add_row(stage, size(nbytes), *device)
    facts = Table.grid(padding=(0, 2))
    facts.add_row("how", plan.choice.words)
    facts.add_row("peak", size(plan.peak) + (f", {size(plan.device_peak)} on the device" if plan.device else ""))
    facts.add_row("time", _stages(seconds) + ", by flops and this machine's rate")
    return Group(table, facts)


def pairing(blocks: Sequence[int | None]) -> str:
    """Which source block feeds which target block, in one line."""
    fed = ", ".join(f"{own} -> {b}" for b, own in enumerate(blocks) if own is not None)
    unfed = ", ".join(str(b) for b, own in enumerate(blocks) if own is None)
    return f"source -> target: {fed}" + (f"; the target's {unfed} get no update" if unfed else "")


def choices(recipe: dict[str, Any]) -> str:
    """Every field of a recipe, in one line."""
    return ", ".join([recipe["name"], *(f"{field} {value}" for field, value in recipe.items() if field != "name")])


def held_out(quality: list[dict[str, Any]]) -> str:
    """Quality in one line."""
    median, poor = statistics.median(row["held"] for row in quality), sum(row["near_chance"] for row in quality)
    return f"{len(quality)} maps, median {median:.2f} of 1, {poor} near chance"


def coverage_counts(outcome: Outcome) -> str:
    """How many tensors had which fate, in one line."""
    fates = Counter(row["fate"] for row in outcome.coverage)
    return f"{len(outcome.coverage)} tensors: " + ", ".join(f"{n} {fate}" for fate, n in sorted(fates.items()))


def record(outcome: dict[str, Any]) -> RenderableType:
    """What a manifest tells of how a folder was made, for a terminal.

    Raises:
        AttributeError, KeyError, TypeError, ValueError: it is no outcome.
    """
    job, recipe = outcome["job"], outcome["job"]["recipe"]
    if outcome["kind"] == "alignment":
        made, alpha = f"alignment of {job['source']} and {job['target']}", ""
    else:
        made = f"{outcome['kind']} of {job['tuned']}, moved from {job['source']} to {job['target']}"
        alpha = f"alpha {job['alpha']}, "
    how = f"recipe {choices(recipe)}; {alpha}calibration {outcome['calibration']}"
    tables = [coverage_table(outcome["coverage"])] * bool(outcome["coverage"]) + [maps_table(outcome["maps"])]
    tables += [quality_table(outcome["quality"])] * bool(outcome["quality"])
    return Group(escape(made), escape(how), *tables, *warnings(outcome["warnings"]))


def warnings(messages: list[str], label: str = "[yellow]warning[/]") -> list[RenderableType]:
    return [f"{label} {escape(message)}" for message in condensed(messages)]


def condensed(messages: list[str]) -> list[str]:
    """Messages that differ in their numbers only, as one: a model has many blocks."""
    groups: dict[str, list[str]] = {}
    for message in messages:
        groups.setdefault(re.sub(r"\d+", "", message), []).append(message)
    return [group[0] + (f" (and {len(group) - 1} like it)" if group[1:] else "") for group in groups.values()]


def next_steps(outcome: Outcome) -> list[str]:
    """What to do with the result, line by line."""
    job, out = outcome.job, outcome.written
    if out is None:
        return ["nothing was computed or written (--dry-run); run the same command without it"]
    if outcome.kind == "alignment":
        return [f"theseus apply {out} TUNED OUT    # for every tune of {job['source']}"]
    first, *others = [str(row["written"]) for row in outcome.alphas]
    more = f"    # or {', '.join(map(repr, others))}" if others else ""
    measure = [f"measure {place}" for place in (first, *others)]
    if not others:
        measure = ["measure it on your task; try --alpha 0.5 and 1.5 beside it"]
    if outcome.kind == "adapter":
        base = f"model = {job['target_class']}.from_pretrained({job['target']!r}{job.get('target_options', '')})"
        return [base, f"model = PeftModel.from_pretrained(model, {first!r}){more}", *measure]
    if outcome.kind == "checkpoint":
        return [f"model = {job['target_class']}.from_pretrained({first!r}){more}", *measure]
    return [f"add the tensors of {first} to those of {job['target']}, scaled as you like{more}"]


def size(nbytes: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.2f} GiB"


def _stages(seconds: dict[str, float]) -> str:
    """Stage by stage, and in all; a stage's name that begins with `of` is a part of another."""
    total = sum(s for stage, s in seconds.items() if not stage.startswith("of "))
    return ", ".join([f"{_duration(total)} in all", *(f"{stage} {_duration(s)}" for stage, s in seconds.items())])


def _duration(seconds: float) -> str:
    """For people."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _kind(tensor: str) -> str:
    """The layer of a tensor, the same for all blocks."""
    return re.sub(r"\.\d+\.", ".*.", re.sub(r"\.(weight|bias)$", "", tensor))


def _share(row: dict[str, Any]) -> float:
    return float(row["rank"] / max(row["most"], 1))
