"""The maps of an alignment on disk: read when asked for, and known by name and shape before any is made."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch

from .checkpoint import Checkpoint
from .errors import InputRefused
from .links import Pairs, moment_links
from .maps import Heads, Map, from_tensors, parts
from .recipes import Recipe
from .writer import raw

if TYPE_CHECKING:
    from .alignment import Alignment

MAPS = "maps.safetensors"
KEPT = 4  # maps in memory: what a layer reads and writes, and its neighbour does
PlannedMap = tuple[str, tuple[int, ...], torch.dtype]


class Stamp(NamedTuple):
    """What is recorded of a map: the name of its class, and the BLAKE2b of its tensors."""

    kind: str
    blake2b: str


def stamp(made: Map) -> Stamp:
    """Of a map as it is written, and again as it is read."""
    running = hashlib.blake2b(digest_size=32)
    for part, tensor in made.tensors().items():
        running.update(f"{part} {tensor.dtype} {list(tensor.shape)}".encode())
        running.update(raw(tensor))
    return Stamp(type(made).__name__, running.hexdigest())


class StoredMaps(Mapping[str, Map]):
    """Maps by name, each read from its file when asked for; the last few are kept."""

    def __init__(self, file: Checkpoint, stamps: Mapping[str, Mapping[str, str]], drawn: Alignment) -> None:
        """
        Args:
            stamps: fields of a :class:`Stamp` for all maps the file holds, by name.
            drawn: the outline of their alignment, which says what they may be.

        Raises:
            InputRefused: the file holds other tensors than these maps are made of, or of other shapes.
            KeyError, TypeError: a class is unknown, or a stamp is none.
        """
        self._file, self._stamps = file, {name: Stamp(**fields) for name, fields in stamps.items()}
        expected = {f"{name}/{part}" for name, one in self._stamps.items() for part in parts(one.kind)}
        if wrong := sorted(expected ^ set(file)):
            lacks = "lacks" if wrong[0] in expected else "holds a stray"
            raise InputRefused(f"{file.folder / MAPS} {lacks} {wrong[0]} ({len(wrong)} such); align again")
        fits = {name: (shape, dtype) for name, shape, dtype in planned_maps(drawn, drawn.recipe)}
        for name, shape in file.shapes.items():
            if (found := (shape, file.dtypes[name])) != fits.get(name):
                raise InputRefused(f"{file.folder / MAPS}: {name} is {found}, expected {fits.get(name)}; align again")
        self._heads = {"value": drawn.source.kv_heads, "key": drawn.source.kv_heads}, drawn.source.heads
        self._read = lru_cache(maxsize=KEPT)(self._from_disk)

    def _from_disk(self, name: str) -> Map:
        recorded = self._stamps[name]
        found = from_tensors(recorded.kind, {part: self._file[f"{name}/{part}"] for part in parts(recorded.kind)})
        if stamp(found) != recorded:
            raise InputRefused(f"{self._file.folder / MAPS}: the map {name} is not what was written; align again")
        if isinstance(found, Heads):
            count = self._count(name)
            if found.heads != count or not bool(((found.source_head >= 0) & (found.source_head < count)).all()):
                raise InputRefused(
                    f"{self._file.folder / MAPS}: the map {name} reads heads {found.source_head.tolist()[:8]} of "
                    f"{found.heads}, the source has {count}; align again"
                )
        return found

    def size(self, name: str) -> tuple[int, int] | None:
        """Features of source and target that a map is between, from its header; None for the identity."""
        of = {part: self._file.shapes[f"{name}/{part}"] for part in parts(self._stamps[name].kind)}
        if "blocks" in of:
            count, own, into = of["blocks"]
            return self._count(name) * own, count * into
        sides = of.get("matrix") or (*of.get("left", ())[:1], *of.get("right", ())[1:])
        return (sides[0], sides[1]) if sides else None

    def _count(self, name: str) -> int:
        """Heads of the source that a map by heads reads."""
        shared, plain = self._heads
        return shared.get(name.rpartition(".")[2], plain)

    def __getitem__(self, name: str) -> Map:
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stamps)

    def __len__(self) -> int:
        return len(self._stamps)

    def __contains__(self, name: object) -> bool:
        return name in self._stamps


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
