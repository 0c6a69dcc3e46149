"""The spaces of two models that are compared: which activation goes with which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .spaces import Layer, Layout, Space

Blocks = Sequence["int | None"]  # for every target block the source block that feeds it


@dataclass(frozen=True)
class Link:
    """Two spaces, one of each model, whose tokens correspond."""

    source: Space
    target: Space


def moment_links(source: Layout, target: Layout, blocks: Blocks) -> dict[str, Link]:
    """The spaces whose cross-moments are wanted, by name, in the order a forward pass of the target meets them.

    Of every paired target block b: ``b.attention``, ``b.context``, ``b.mlp``, ``b.middle``; ``b.after`` where what
    follows the two blocks is no such pair itself; ``embedding`` where what follows the embeddings is not
    ``0.attention``; ``final``.
    """
    found: dict[str, Link] = {}
    if blocks[0] != 0 or source.family.embedding_norm or target.family.embedding_norm:
        found["embedding"] = Link(source.first(), target.first())
    for b, own in enumerate(blocks):
        if own is None:
            continue
        for part in ("attention", "context", "mlp", "middle"):
            found[f"{b}.{part}"] = Link(source.space(own, part), target.space(b, part))
        if after_name(source, target, blocks, b) == f"{b}.after":
            found[f"{b}.after"] = Link(source.after(own), target.after(b))
    found["final"] = Link(source.final(), target.final())
    return found


def after_name(source: Layout, target: Layout, blocks: Blocks, b: int) -> str:
    """The name of the link between what follows target block ``b`` and what follows its source block."""
    own, last = blocks[b], b + 1 == target.depth
    assert own is not None
    if last and own + 1 == source.depth:
        return "final"
    return f"{b + 1}.attention" if not last and blocks[b + 1] == own + 1 else f"{b}.after"


def energy_links(source: Layout, target: Layout, blocks: Blocks) -> dict[str, Link]:
    """The outputs whose energies set the scales: by target layer, and ``embedding.output``, ``embedding.norm``."""
    found = {"embedding.output": Link(source.embedded(), target.embedded())}
    if source.family.embedding_norm and target.family.embedding_norm:
        found["embedding.norm"] = Link(source.first(), target.first())
    for layer in target.layers():
        if layer.role != "head" and (own := blocks[layer.block]) is not None:
            found[layer.name] = Link(_written(source, layer, own), target.written(layer))
    return found


def _written(source: Layout, layer: Layer, block: int) -> Space:
    own = source.counterpart(layer, block)
    assert own is not None  # check_pair
    return source.written(own)
