"""What people read of a job on the screen: coverage, maps, predicted and used, what to do next."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ..budget.plan import Plan
from ..jobs.model_card import _share, choices, condensed, cut, fitted
from ..jobs.outcome import Outcome
from ..jobs.verdict import verdict
from ..shown import percent
from ..updates.alpha import WHY

SHARE = re.compile(r"(\d+)%")


def coverage_table(rows: list[dict[str, str]]) -> Table:
    """The fate of every tensor, tensors of all blocks in one line."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        alike.setdefault((_kind(row["tensor"]), row["fate"], SHARE.sub("%", row["note"])), []).append(row["note"])
    table = Table(title="Coverage (* is every block)", title_justify="left", box=SIMPLE_HEAD)
    table.add_column("layer", no_wrap=True)
    for column in ("tensors", "fate", "why"):
        table.add_column(column)
    colours = {"transported": "green", "fitted": "green", "folded": "green", "unchanged": "dim", "left": "yellow"}
    for (layer, fate, _), notes in alike.items():
        table.add_row(escape(layer), str(len(notes)), Text(fate, colours.get(fate, "")), escape(ranged(notes)))
    return table


def ranged(notes: Sequence[str]) -> str:
    """Notes that differ in their shares as one, each from its least to its largest."""
    columns = [[int(share) for share in column] for column in zip(*map(SHARE.findall, notes), strict=True)]
    each = iter([f"{min(c)}%" if min(c) == max(c) else f"{min(c)} to {max(c)}%" for c in columns])
    return SHARE.sub(lambda _: next(each), notes[0])


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
    """A table of how maps do on held-out rows, one line per kind of space: the worst of all blocks."""
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
    parts: list[RenderableType] = [f"[bold]{said}[/]", ""] if (said := verdict(outcome)) else []
    if outcome.coverage:
        parts += [coverage_table(outcome.coverage), coverage_counts(outcome)]
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
    for label, words in {"fitted": fitted(outcome), "rank": cut(outcome)}.items():
        if words:
            facts.add_row(label, escape(words))
    facts.add_row("time predicted", _stages(outcome.predicted_seconds) + ", by flops and this machine's rate")
    if outcome.seconds:
        facts.add_row("time used", _stages(outcome.seconds))
    for row in outcome.alphas:
        alpha = f"{row['alpha']:.4g}" + WHY.get(row["asked"], "")
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
    """A table of the memory of every stage, with the choices, the peak and the time predicted, for a terminal."""
    table = Table("stage", "host memory", title="Plan", title_justify="left", box=SIMPLE_HEAD)
    if plan.device:
        table.add_column("device memory")
    for stage, nbytes in plan.host.items():
        device = [size(plan.device[stage]) if stage in plan.device else ""] if plan.device else []
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
    return f"source -> target: {fed}" + (f"; none feeds the target's {unfed}" if unfed else "")


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
    tables = [coverage_table(outcome["coverage"])] if outcome["coverage"] else []
    tables.append(maps_table(outcome["maps"]))
    if outcome["quality"]:
        tables.append(quality_table(outcome["quality"]))
    return Group(escape(made), escape(how), *tables, *warnings(outcome["warnings"]))


def warnings(messages: list[str], label: str = "[yellow]warning[/]") -> list[RenderableType]:
    return [f"{label} {escape(message)}" for message in condensed(messages)]


def next_steps(outcome: Outcome) -> list[str]:
    """What to do with the result, in lines of commands and Python to be copied."""
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
    """A number of bytes for people, as `3.2 GiB`."""
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
