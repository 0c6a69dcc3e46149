"""The maps a recipe will make, by name and shape, before any is made."""

from __future__ import annotations

import torch

from ..activations.links import Pairs
from .recipe import Recipe

PlannedMap = tuple[str, tuple[int, ...], torch.dtype]


def planned_maps(pairs: Pairs, recipe: Recipe) -> list[PlannedMap]:
    """(name/part, shape, dtype) of all that ``maps.safetensors`` may hold, from geometry and pairing alone.

    Completed maps are among them wherever the recipe could complete one; few token types decide whether it does.
    """
    sizes: dict[str, tuple[int, ...]] = {n: (link.source.width, link.target.width) for n, link in pairs.moments.items()}
    if recipe.name == "paper":
        dense = [(f"{name}/matrix", size) for name, size in sizes.items()]
        return _doubles(dense + [part for b in pairs.places if b is not None for part in _outputs(pairs, b, recipe)])
    planned: list[PlannedMap] = []
    paired = [b for b in pairs.places if b is not None]
    dense = [(f"{n}/matrix", size) for n, size in sizes.items() if not n.endswith(".context")]
    if recipe.completion == "deeper":
        first = {name for name in ("embedding", "0.attention") if name in sizes and _starts(pairs, name)}
        dense += [(f"{name}.completed/matrix", sizes[name]) for name in sorted(first)]
    target = pairs.target
    if target.family.embedding("token") and target.tied and target.family.norm == "layer":
        dense.append(("token/matrix", (pairs.source.width, target.width)))
    heads = (("context", target.heads), ("value", target.kv_heads), ("query", target.heads), ("key", target.kv_heads))
    for b in paired:
        for part, count in heads:
            if recipe.heads == "dense" and part in ("context", "value"):
                dense.append((f"{b}.{part}/matrix", sizes[f"{b}.context"]))
                continue
            size = (count, pairs.source.head_dim, target.head_dim)
            planned.append((f"{b}.{part}/source_head", (count,), torch.int64))
            planned.append((f"{b}.{part}/blocks", size, torch.float64))
            planned.append((f"{b}.{part}/heads", (), torch.int64))
    return _doubles(dense) + planned


def _starts(pairs: Pairs, name: str) -> bool:
    """Whether a space is the residual's where nothing but embeddings wrote it."""
    return name == "embedding" or pairs.blocks[0] == 0


def _outputs(pairs: Pairs, b: int, recipe: Recipe) -> list[tuple[str, tuple[int, ...]]]:
    """Of the maps between layers' outputs: factored where both layers expand."""
    found: list[tuple[str, tuple[int, ...]]] = []
    for own, layer in pairs.layers(b):
        (out_s, in_s), (out_t, in_t) = pairs.source.weights()[own.role], pairs.target.weights()[layer.role]
        if out_s > in_s + 1 and out_t > in_t + 1 and recipe.null != "svd":
            found.append((f"{layer.name}/left", (out_s, in_t + 1)))
            found.append((f"{layer.name}/right", (in_t + 1, out_t)))
        else:
            found.append((f"{layer.name}/matrix", (out_s, out_t)))
    return found


def _doubles(shapes: list[tuple[str, tuple[int, ...]]]) -> list[PlannedMap]:
    return [(name, shape, torch.float64) for name, shape in shapes]
