"""What of a tuned model counts as changed: by comparing it with its base, or presumed until a tensor is compared."""

from __future__ import annotations

from math import prod

from ..errors import InputRefused
from ..models.tensors import dtype_of
from ..recipes.effect import FIT
from .computed import ComputedUpdate
from .coverage import Stays

NAMED = 8  # tensors a message names


def changes(update: ComputedUpdate, stays: Stays, *, presumed: bool) -> set[str]:
    """Canonical names of the tuned tensors that differ from their base; nothing is read where that is presumed.

    Raises:
        InputRefused: tensors have another shape than in the base; a bias that is new, another than its layer's outputs.
    """
    tuned, source = update.tuned, update.source
    wanted = {name: _shape_wanted(update, name) for name in tuned if not stays.by_rule(name)}
    differ = [name for name, shape in wanted.items() if shape not in (None, tuned.shape(name))]
    if differ:
        told = [
            f"{n} is {list(tuned.shape(n))} in the tuned model and {list(wanted[n] or ())} "
            + ("in the base" if n in source else "by its layer")
            for n in differ[:NAMED]
        ]
        more = f" and {len(differ) - NAMED} more" if differ[NAMED:] else ""
        raise InputRefused(f"{'; '.join(told)}{more}; was the right base given? ({leaving(*differ)})")
    return {name for name in tuned if _is_changed(update, name, presumed=presumed)}


def _shape_wanted(update: ComputedUpdate, name: str) -> tuple[int, ...] | None:
    """The shape a tuned tensor must have: its base's; of a bias the base lacks, its layer's outputs; None: unknown."""
    source, weight = update.source, f"{name.removesuffix('.bias')}.weight"
    if name in source:
        return source.shape(name)
    return source.shape(weight)[:1] if name.endswith(".bias") and weight in source else None


def _is_changed(update: ComputedUpdate, name: str, *, presumed: bool) -> bool:
    source, tuned = update.source, update.tuned
    if name not in source or source.shape(name) != tuned.shape(name):
        return True
    if update.delta.adapted is not None:
        return tuned.slots[name].stored in update.delta.adapted.changed
    kinds = tuned.dtype(name), dtype_of(source.tensors, source.slots[name].stored)
    if kinds[0] != kinds[1]:
        named = (str(kind).removeprefix("torch.") for kind in kinds)
        text = "the tuned model is {}, the base {}: their rounding moves along".format(*named)
        update.said.extend([text] * (text not in update.said))
    if presumed:
        update.presumed.add(name)
    return presumed or not update.same(name)


def first_change(update: ComputedUpdate) -> str | None:
    """Canonical name, in the source, of a changed tensor that moves, found by reading little: small tensors first.

    None where that depends on a pairing of blocks which is not known yet.

    Raises:
        InputRefused: nothing moves.
    """
    found = {source for name in update for source in update.sources(name)} | update.fits.sources
    deciding = {name for name in found if not name.endswith(FIT)}
    if update.delta.adapter is not None and update.fits.planned and not deciding:
        return None  # factors were looked at one by one
    sizes = {n: prod(update.source.shape(n) if n in update.source else update.tuned.shape(n)) for n in deciding}
    for name in sorted(deciding, key=lambda name: (sizes[name], name)):
        update.compare([name])
        if name not in update.unchanged:
            return name
    update.settled()  # refuses
    return None


def leaving(*names: str) -> str:
    """The options that leave tensors' layers behind, for messages."""
    layers = dict.fromkeys(name.removesuffix(".weight").removesuffix(".bias") for name in names)
    asked = " ".join(f"--leave '{layer}*'" for layer in list(layers)[:NAMED])
    return f"{asked} leaves {'it' if len(names) == 1 else 'them'} behind"


def leaving_alone(update: ComputedUpdate, name: str) -> str:
    """The option that leaves a tensor's layer behind, where anything else moves."""
    try:
        first_change(update)
    except InputRefused:
        return "nothing else changed that could move"
    return leaving(name)
