"""What people read: coverage, maps, predicted and used, what to do next; and the model card."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, Any

import jinja2
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from .job import Outcome

CARD = jinja2.Template(
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
| recipe | {{ job.recipe.name }}, null {{ job.recipe.null }}, floor {{ job.recipe.floor }} |
| alpha | {{ job.alpha }} |
| calibration | {{ calibration }} |
| tensors | {% for fate, n in fates %}{{ n }} {{ fate }}{% if not loop.last %}, {% endif %}{% endfor %} |
{% if maps %}| maps | {{ maps | length }}, lowest rank {{ "%.0f" | format(100 * lowest) }} % of its width |
{% endif %}| versions | {% for name, v in job.versions.items() %}{{ name }} {{ v }} {% endfor %}|
{% if warnings %}
## Warnings

{% for warning in warnings %}- {{ warning }}
{% endfor %}{% endif %}
""",
    autoescape=False,
)


def model_card(outcome: Outcome) -> str:
    """README.md of an output folder: recipe, numbers, warnings."""
    fates = sorted(Counter(row["fate"] for row in outcome.coverage).items())
    lowest = min((_share(m) for m in outcome.maps), default=1.0)
    title = {"adapter": "Moved LoRA adapter", "checkpoint": "Moved fine-tune", "delta": "Moved task vector"}[
        outcome.kind
    ]
    return CARD.render(
        **vars(outcome) | {"warnings": condensed(outcome.warnings)}, fates=fates, lowest=lowest, title=title
    )


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
    kinds: dict[str, list[dict[str, Any]]] = {}
    for m in maps:
        kinds.setdefault(re.sub(r"\d+", "*", m["space"]), []).append(m)
    for kind, group in kinds.items():
        worst = min(group, key=_share)
        full = min(worst["source"], worst["target"])
        colour = "yellow" if worst["rank"] < full / 2 else ""
        gap = f"{min(m['gap'] for m in group):.1e}"
        size = f"{worst['source']} x {worst['target']}"
        table.add_row(escape(kind), str(len(group)), size, Text(f"{worst['rank']} of {full}", colour), gap)
    return table


def report(outcome: Outcome) -> RenderableType:
    """All of an outcome, for a terminal."""
    parts: list[RenderableType] = [coverage_table(outcome.coverage)]
    if outcome.maps:
        parts += ["", maps_table(outcome.maps)]
    facts = Table.grid(padding=(0, 2))
    facts.add_row("calibration", escape(outcome.calibration))
    used = "" if outcome.used_bytes is None else f", {size(outcome.used_bytes)} used"
    facts.add_row("memory", f"{size(outcome.predicted_bytes)} predicted{used}")
    facts.add_row("output", f"{outcome.kind}, {size(outcome.bytes_out)}")
    if outcome.seconds:
        facts.add_row("time", ", ".join(f"{stage} {s:.1f} s" for stage, s in outcome.seconds.items()))
    if outcome.lost_heads:
        lost = sum(map(len, outcome.lost_heads.values()))
        facts.add_row("heads", f"{lost} source heads (of all blocks) have no place in the target; their update is lost")
    parts += ["", facts, *warnings(outcome.warnings), "", "[bold]next[/]"]
    parts += [Text(f"  {line}", no_wrap=True, overflow="ignore") for line in next_steps(outcome)]  # to be copied whole
    return Group(*parts)


def record(outcome: dict[str, Any]) -> RenderableType:
    """What a manifest tells of how a folder was made, for a terminal.

    Raises:
        AttributeError, KeyError, TypeError, ValueError: it is no outcome.
    """
    job, recipe = outcome["job"], outcome["job"]["recipe"]
    made = f"{outcome['kind']} of {job['tuned']}, moved from {job['source']} to {job['target']}"
    how = f"recipe {recipe['name']}, null {recipe['null']}, alpha {job['alpha']}, calibration {outcome['calibration']}"
    tables = coverage_table(outcome["coverage"]), maps_table(outcome["maps"])
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
    if outcome.kind == "adapter":
        return [
            f"model = {job['target_class']}.from_pretrained({job['target']!r})",
            f"model = PeftModel.from_pretrained(model, {out!r})",
            "measure it on your task; try --alpha 0.5 and 1.5 beside it",
        ]
    if outcome.kind == "checkpoint":
        return [
            f"model = {job['target_class']}.from_pretrained({out!r})",
            "measure it on your task; try --alpha 0.5 and 1.5 beside it",
        ]
    return [f"add the tensors of {out} to those of {job['target']}, scaled as you like"]


def size(nbytes: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.2f} GiB"


def console(*, stderr: bool = False) -> Console:
    return Console(stderr=stderr, soft_wrap=False)


def _kind(tensor: str) -> str:
    """The layer of a tensor, the same for all blocks."""
    return re.sub(r"\.\d+\.", ".*.", re.sub(r"\.(weight|bias)$", "", tensor))


def _share(row: dict[str, Any]) -> float:
    return row["rank"] / max(min(row["source"], row["target"]), 1)
