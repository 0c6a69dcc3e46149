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
from ..updates.coverage import ADDED
from ..updates.fits import ROUNDING
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
update of `{{ job.tuned }}` was moved through an alignment of the two base models' activations{% if fitted_in_words %},
and layers that write the residual were fitted to what was missing of its effect{% endif %}. It has not been
evaluated; measure it on your task before you rely on it.

| | |
|---|---|
| output | {{ kind }} |
| recipe | {{ recipe }} |
| alpha | {{ job.alpha }}{{ why }} |
{% if arrived_in_words %}| arrived | {{ arrived_in_words }} |
{% endif %}{% if fitted_in_words %}| fitted | {{ fitted_in_words }} |
{% endif %}{% if cut_in_words %}| rank | {{ cut_in_words }} |
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
        fitted_in_words=fitted(outcome),
        cut_in_words=cut(outcome),
        rounding=percent(lost, 1) if (lost := outcome.alphas[0]["rounding"]["total"]) else "",
    )
    return card


def choices(recipe: dict[str, Any]) -> str:
    """Every field of a recipe, in one line."""
    return ", ".join([recipe["name"], *(f"{field} {value}" for field, value in recipe.items() if field != "name")])


def fitted(outcome: Outcome) -> str:
    """In one line how many layers were fitted, how much of them, and which of them the tune does not have."""
    shares = [share for share in outcome.fits.get("share", {}).values() if share]
    if not shares:
        return ""
    added = [row["tensor"] for row in outcome.coverage if row["fate"] == "fitted" and row["note"].startswith(ADDED)]
    kinds = ", ".join(sorted({name.rpartition(".")[2] for name in added}))
    told = f"; {len(added)} of them added, which TUNED has no factors of: {kinds}" if added else ""
    return f"{len(shares)} layers, {percent(statistics.median(shares))} of their update (median){told}"


def cut(outcome: Outcome) -> str:
    """In one line what the rank of an adapter keeps of the update; its rank alone where that is all."""
    if outcome.rank is None:
        return ""
    kept = outcome.fits.get("kept", {})
    least = min(kept, key=lambda layer: kept[layer], default="")
    if not least or kept[least] >= 1 - ROUNDING:
        return str(outcome.rank)
    median = percent(statistics.median(kept.values()))
    return f"{outcome.rank}, which keeps {median} of a layer's update (median; least {percent(kept[least])}, {least})"


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
