"""What a result is worth, as far as that can be said without labels: in a line, and a warning where it is nothing."""

from __future__ import annotations

import statistics

from .outcome import Outcome

NOTHING = 0.05  # share of divergence removed below which a result is no better than the target as it is
POOR = 0.25  # share below which it is worth a word


def verdict(outcome: Outcome) -> str:
    """How much of the tune's effect arrived on rows that were held out; "" where nothing tells."""
    points = [one["share"] for one in outcome.arrived]
    if (share := shown(outcome)) is not None:
        said = f"{_percent(share)} of the tune's effect on predictions arrived"
        if points:
            said += f" ({_percent(statistics.median(points))} of its effect inside, the median write point)"
        return f"{said}, on held-out rows"
    if points:
        worst = min(outcome.arrived, key=lambda one: one["share"])
        median = _percent(statistics.median(points))
        return f"{median} of the tune's effect arrived at the median write point, least at {worst['layer']}, held out"
    return ""


def shown(outcome: Outcome) -> float | None:
    """The share of divergence removed at the strength that was written; None where it was not measured."""
    alpha = outcome.alphas[0]["alpha"] if outcome.alphas else 1.0
    return outcome.removed.get(f"{alpha:g}")


def doubts(outcome: Outcome) -> list[str]:
    """What to be warned of: a result that is no better than the target as it is, or hardly."""
    share = shown(outcome)
    if share is None or share >= POOR:
        return []
    cure = "give calibration of what the tune is for, or more of it"
    if share < NOTHING:
        return [
            f"the moved model is no better than TARGET without any update: {_percent(share)} of the tune's effect on "
            f"predictions arrived on held-out rows; do not use it as it is: {cure}, or train on TARGET"
        ]
    return [f"only {_percent(share)} of the tune's effect on predictions arrived on held-out rows: {cure}"]


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
