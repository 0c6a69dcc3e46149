"""What of a tuned model counts as changed: by comparing it with its base, or presumed until a tensor is compared."""

from __future__ import annotations

from math import prod

from .errors import InputRefused
from .models import dtype_of
from .stays import Stays
from .update import Update


def changes(update: Update, stays: Stays, *, presumed: bool) -> set[str]:
    """Canonical names of the tuned tensors that differ from their base; nothing is read where that is presumed.

    Raises:
        InputRefused: a tensor has another shape than in the base.
    """
    return {name for name in update.tuned if _is_changed(update, stays, name, presumed=presumed)}


def _is_changed(update: Update, stays: Stays, name: str, *, presumed: bool) -> bool:
    source, tuned = update.source, update.tuned
    if name not in source:
        return True
    before, after = source.shape(name), tuned.shape(name)
    if before != after:
        if stays.by_rule(name):
            return True
        raise InputRefused(
            f"{name} is {list(after)} in the tuned model and {list(before)} in the base; "
            f"was the right base given? ({leaving(name)})"
        )
    kinds = tuned.dtype(name), dtype_of(source.tensors, source.slots[name].stored)
    if kinds[0] != kinds[1] and not update.said and not update.delta.is_merged:
        named = (str(kind).removeprefix("torch.") for kind in kinds)
        update.said.append("the tuned model is {}, the base {}: their rounding moves along".format(*named))
    if presumed:
        update.presumed.add(name)
    return presumed or not update.same(name)


def first_change(update: Update) -> str | None:
    """Canonical name, in the source, of a changed tensor that moves, found by reading little: small tensors first.

    None where that depends on a pairing of blocks which is not known yet.

    Raises:
        InputRefused: nothing moves.
    """
    deciding = {source for name in update for source in update.sources(name)}
    sizes = {n: prod(update.source.shape(n) if n in update.source else update.tuned.shape(n)) for n in deciding}
    for name in sorted(deciding, key=lambda name: (sizes[name], name)):
        update.compare([name])
        if name not in update.unchanged:
            return name
    update.settled()  # refuses
    return None


def leaving(name: str) -> str:
    """The option that leaves a tensor's layer behind, for messages."""
    return f"--leave '{name.removesuffix('.weight').removesuffix('.bias')}*' leaves it behind"
