"""README.md of a folder that is written."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from typing import Any

import jinja2
from markupsafe import Markup

from ..shown import in_page, percent
from ..updates.alpha import WHY
from .outcome import Outcome
from .verdict import verdict

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
update of `{{ job.tuned }}` was moved through an alignment of the two base models' activations. It has not been
evaluated; measure it on your task before you rely on it.

| | |
|---|---|
| output | {{ kind }} |
| recipe | {{ recipe }} |
| alpha | {{ job.alpha }}{{ why }} |
{% if arrived_in_words %}| arrived | {{ arrived_in_words }} |
{% endif %}{% if rounding %}| rounding | {{ rounding }} of the update |
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
        why=WHY.get(outcome.alphas[0]["asked"], ""),
        arrived_in_words=verdict(outcome),
        rounding=percent(lost, 1) if (lost := outcome.alphas[0]["rounding"]["total"]) else "",
    )
    return card


def choices(recipe: dict[str, Any]) -> str:
    """Every field of a recipe, in one line."""
    return ", ".join([recipe["name"], *(f"{field} {value}" for field, value in recipe.items() if field != "name")])


def held_out(quality: list[dict[str, Any]]) -> str:
    """Quality in one line."""
    median, poor = statistics.median(row["held"] for row in quality), sum(row["near_chance"] for row in quality)
    return f"{len(quality)} maps, median {median:.2f} of 1, {poor} near chance"


def condensed(messages: list[str]) -> list[str]:
    """Messages that differ in their numbers only, as one: a model has many blocks."""
    groups: dict[str, list[str]] = {}
    for message in messages:
        groups.setdefault(re.sub(r"\d+", "", message), []).append(message)
    return [group[0] + (f" (and {len(group) - 1} like it)" if group[1:] else "") for group in groups.values()]


def _share(row: dict[str, Any]) -> float:
    return float(row["rank"] / max(row["most"], 1))
