"""The maps of an alignment on disk: read when asked for, and known by name and shape before any is made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from .checkpoint import Checkpoint
from .errors import InputRefused
from .links import Pairs, moment_links
from .maps import Map, from_tensors, parts
from .recipes import Recipe

if TYPE_CHECKING:
    from .alignment import Alignment

MAPS = "maps.safetensors"
KEPT = 4  # maps in memory: what a layer reads and writes, and its neighbour does
PlannedMap = tuple[str, tuple[int, ...], torch.dtype]


class StoredMaps(Mapping[str, Map]):
    """Maps by name, each read from its file when asked for; the last few are kept."""

    def __init__(self, file: Checkpoint, kinds: Mapping[str, str]) -> None:
        """
        Args:
            kinds: name -> class of the map.

        Raises:
            InputRefused: the file holds other tensors than these maps are made of.
            KeyError: a class is unknown.
        """
        self._file, self._kinds = file, dict(kinds)
        expected = {f"{name}/{part}" for name, kind in kinds.items() for part in parts(kind)}
        if wrong := sorted(expected ^ set(file)):
            lacks = "lacks" if wrong[0] in expected else "holds a stray"
            raise InputRefused(f"{file.folder / MAPS} {lacks} {wrong[0]} ({len(wrong)} such); align again")
        self._read = lru_cache(maxsize=KEPT)(self._from_disk)

    def _from_disk(self, name: str) -> Map:
        kind = self._kinds[name]
        return from_tensors(kind, {part: self._file[f"{name}/{part}"] for part in parts(kind)})

    def __getitem__(self, name: str) -> Map:
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._kinds)

    def __len__(self) -> int:
        return len(self._kinds)

    def __contains__(self, name: object) -> bool:
        return name in self._kinds


def planned_maps(alignment: Alignment, recipe: Recipe) -> list[PlannedMap]:
    """(name/part, shape, dtype) of all that ``maps.safetensors`` may hold, from geometry and pairing alone.

    Completed maps are among them wherever the recipe could complete one; few token types decide whether it does.
    """
    pairs = Pairs(alignment.source, alignment.target, alignment.blocks)
    links = moment_links(pairs.source, pairs.target, pairs.blocks)
    sizes: dict[str, tuple[int, ...]] = {n: (link.source.width, link.target.width) for n, link in links.items()}
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
