"""Alignments read back: what their record says has to fit its own geometry, since moves follow it blindly."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

from ..errors import InputRefused
from ..models.geometry import Geometry, Role
from ..recipes.ruleset import MapReport, Rule

AGAIN = "align again"
LARGEST = 2**63  # no number is; nor is NaN below it


class Restored(NamedTuple):
    """What a record tells of an alignment before it is trusted; the fields are those of ``Alignment``."""

    source: Geometry
    target: Geometry
    blocks: list[int | None]
    maps: Mapping[str, Any]
    rules: Mapping[str, Rule]
    vectors: Mapping[str, Rule]
    reports: list[MapReport]
    heads: dict[int, list[int]]
    lost: dict[int, list[int]]
    provenance: dict[str, Any]


def check_restored(restored: Restored, drawn: Mapping[str, Mapping[str, Rule]]) -> None:
    """Refuse an alignment whose pairing, rules or reports cannot be those of its two models.

    Args:
        drawn: ``rules`` and ``vectors`` of the outline between these models by the same recipe, with the same blocks.

    Raises:
        InputRefused: names what does not fit, and what it would have to be.
    """
    roles = {layer.name: layer.role for layer in restored.target.layers()}
    for kind in ("rules", "vectors"):
        known = drawn[kind]
        for into, rule in getattr(restored, kind).items():
            if into not in known:
                raise InputRefused(f"{kind} name {into!r}, which these two models do not pair; {AGAIN}")
            if rule.source != known[into].source or rule.kind != known[into].kind:
                named = f"{rule.source!r} ({rule.kind}) feed {into!r}"
                raise InputRefused(f"{kind} let {named}, expected {known[into].source!r} ({known[into].kind}); {AGAIN}")
            if absent := {rule.input, rule.output} - restored.maps.keys():
                raise InputRefused(f"{into!r} moves through the map {sorted(absent)[0]!r}, which is not there; {AGAIN}")
            for name, fits in zip((rule.input, rule.output), _sizes(restored, into, roles.get(into)), strict=True):
                if (size := restored.maps.size(name)) not in (None, fits):  # type: ignore[attr-defined]
                    raise InputRefused(f"{into!r} moves through {name!r}, which maps {size}, expected {fits}; {AGAIN}")
            if not (_number(rule.scale_in) and _number(rule.scale_out) and rule.scale_in > 0 and rule.scale_out >= 0):
                raise InputRefused(f"{into!r} has scales {rule.scale_in!r} and {rule.scale_out!r}; {AGAIN}")
    _check_heads(restored)
    for report in restored.reports:
        _check_plain("reports", vars(report), {"space": str}, "source", "target", "rank", "most", "gap", "tokens")
    _check_provenance(restored.provenance)


def _sizes(restored: Restored, into: str, role: Role | None) -> tuple[tuple[int, int], tuple[int, int]]:
    """Features (source, target) of the maps in front of and behind a layer, or twice those around a vector.

    Args:
        into: name in the target; role: of a layer.
    """
    sides, family = (restored.source, restored.target), restored.target.family
    if role not in (None, "head"):
        (out_s, in_s), (out_t, in_t) = (side.weights()[role] for side in sides)
        return (in_s, in_t), (out_s, out_t)
    norm, widths = into.rpartition(".")[0], (sides[0].width, sides[1].width)
    for inner, count in ((family.query_norm, "heads"), (family.key_norm, "kv_heads")):
        if role is None and inner and norm.endswith(f".{inner}"):  # heads share their norm
            own, other = (getattr(side, count) * side.head_dim for side in sides)
            widths = own, other
    return widths, widths


def check_blocks(blocks: Any, depths: tuple[int, int], what: str = "blocks", cure: str = AGAIN) -> list[int | None]:
    """For every block of the target a block of the source, each behind the one before, or None.

    Args:
        depths: of source and target; what, cure: how a refusal begins and ends.
    """
    source, target = depths
    if not isinstance(blocks, list) or len(blocks) != target:
        raise InputRefused(
            f"{what} is {str(blocks)[:80]}, expected {target} entries, one a block of the target; {cure}"
        )
    if wrong := [own for own in blocks if own is not None and not _index(own, source)]:
        raise InputRefused(f"{what} names block {str(wrong[0])[:80]} of the source, which has {source}; {cure}")
    if not any(own is not None for own in blocks):
        raise InputRefused(f"{what} pairs no block at all; {cure}")
    fed = [own for own in blocks if own is not None]
    if turned := [after for before, after in pairwise(fed) if after <= before]:
        raise InputRefused(f"{what} is {str(blocks)[:80]}, which turns back at {turned[0]}; {cure}")
    return blocks


def _check_heads(restored: Restored) -> None:
    """Heads of paired blocks: for each of the target's one of the source's; and those that have no place."""
    source, target, paired = restored.source.heads, restored.target.heads, _paired(restored.blocks)
    for what, each, count in (("heads", restored.heads, target), ("lost", restored.lost, None)):
        for b, heads in each.items():
            if b not in paired:
                raise InputRefused(f"{what} names block {b}, which no block of the source feeds; {AGAIN}")
            fits = isinstance(heads, list) and len(heads) == (len(heads) if count is None else count)
            if not fits or not all(_index(head, source) for head in heads):
                wanted = f"{count} heads" if count is not None else "heads"
                raise InputRefused(
                    f"{what} of block {b} are {str(heads)[:80]}, expected {wanted} of the source's {source}; {AGAIN}"
                )


def _paired(blocks: Iterable[int | None]) -> set[int]:
    return {b for b, own in enumerate(blocks) if own is not None}


def _check_provenance(told: Any) -> None:
    """Refuse a provenance whose entries that reports and model cards print are not theirs; the rest is free-form."""
    if not isinstance(told, dict):
        raise InputRefused(f"provenance is a {type(told).__name__}, expected an object; {AGAIN}")
    for name, kind in (("quality", list), ("warnings", list), ("calibration", str), ("tokens", int)):
        if not isinstance(told.get(name, kind()), kind):
            raise InputRefused(f"provenance has {name} {str(told[name])[:80]}, expected a {kind.__name__}; {AGAIN}")
    for row in told.get("quality", []):
        _check_plain("quality", row, {"space": str, "near_chance": bool}, "held", "shifted")
    if wrong := [text for text in told.get("warnings", []) if not isinstance(text, str)]:
        raise InputRefused(f"provenance has the warning {str(wrong[0])[:80]}, expected text; {AGAIN}")


def _check_plain(what: str, row: Any, kinds: Mapping[str, type], *numbers: str) -> None:
    """An object of these entries, those in ``numbers`` finite."""
    whole = isinstance(row, dict) and row.keys() == {*kinds, *numbers}
    if not whole or not all(isinstance(row[name], kind) for name, kind in kinds.items()):
        raise InputRefused(f"{what} has the row {str(row)[:80]}, expected {', '.join((*kinds, *numbers))}; {AGAIN}")
    if wrong := [name for name in numbers if not _number(row[name])]:
        raise InputRefused(f"{what} of {row['space'][:80]!r} has {wrong[0]} {str(row[wrong[0]])[:80]}; {AGAIN}")


def _number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < LARGEST


def _index(value: Any, count: int) -> bool:
    return type(value) is int and 0 <= value < count
