"""What of an alignment a job needs, from geometry and recipe alone."""

from __future__ import annotations

from collections.abc import Collection

from ..recipes.solver import Solver

TOKENS = 4  # for every feature of the widest space


def needed(solver: Solver, keys: Collection[str] | None) -> frozenset[str]:
    """Links and layers of the target that rules and vectors of these keys need; None: all.

    Where depths differ no pairing is known yet: then of every block what any block needs.
    """
    if keys is None:
        return frozenset(solver.every)
    source, target = solver.pairs.source, solver.pairs.target
    if source.depth != target.depth:
        layers = target.layers()
        slots = {layer.slot for layer in layers if layer.name in keys}
        keys = {*keys, *(layer.name for layer in layers if layer.slot in slots)}
    return frozenset(solver.needed(keys))


def held_in_memory(solver: Solver, keys: Collection[str] | None) -> frozenset[str]:
    """Links and layers that memory is planned for: what is needed, and all that a text of few token types may add."""
    behind_norms = {name for name, link in solver.links.items() if link.target.norm}
    return needed(solver, keys) | behind_norms | frozenset(keys or ())


def tokens_for(solver: Solver, names: Collection[str], fits: Collection[str] = ()) -> int:
    """Tokens to align on, where nothing else is asked for: by the widest space that is mapped, or that a layer reads
    which is fitted."""
    mapped = [link for name, link in solver.links.items() if name in names] or [solver.links["final"]]
    target = solver.pairs.target
    read = [target.weights()[layer.role][1] for layer in target.layers() if layer.name in fits]
    return TOKENS * max(*read, *(width for link in mapped for width in link.widths))
