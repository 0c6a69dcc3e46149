"""The maps of an alignment on disk: read when asked for, and known by name and shape before any is made."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import NamedTuple

from ..activations.links import Pairs
from ..errors import InputRefused
from ..files.checkpoint import Checkpoint
from ..files.writer import raw
from ..recipes.maps import Heads, Map, from_tensors, parts
from ..recipes.recipe import Recipe

MAPS = "maps.safetensors"
KEPT = 4  # maps in memory: what a layer reads and writes, and its neighbour does


class Stamp(NamedTuple):
    """What is recorded of a map: the name of its class, and the BLAKE2b of its tensors."""

    kind: str
    blake2b: str


def stamp(made: Map) -> Stamp:
    """The stamp of a map: the same of one that is written and of the one read back."""
    running = hashlib.blake2b(digest_size=32)
    for part, tensor in made.tensors().items():
        running.update(f"{part} {tensor.dtype} {list(tensor.shape)}".encode())
        running.update(raw(tensor))
    return Stamp(type(made).__name__, running.hexdigest())


class StoredMaps(Mapping[str, Map]):
    """Maps by name, each read from its file when asked for; the last few are kept."""

    def __init__(self, file: Checkpoint, stamps: Mapping[str, Mapping[str, str]], pairs: Pairs, recipe: Recipe) -> None:
        """
        Args:
            stamps: fields of a :class:`Stamp` for all maps the file holds, by name.
            pairs, recipe: of their alignment, which say what they may be.

        Raises:
            InputRefused: the file holds other tensors than these maps are made of, or of other shapes.
            KeyError, TypeError: a class is unknown, or a stamp is none.
        """
        self._file, self._stamps = file, {name: Stamp(**fields) for name, fields in stamps.items()}
        expected = {f"{name}/{part}" for name, one in self._stamps.items() for part in parts(one.kind)}
        if wrong := sorted(expected ^ set(file)):
            lacks = "lacks" if wrong[0] in expected else "holds a stray"
            raise InputRefused(f"{file.folder / MAPS} {lacks} {wrong[0]} ({len(wrong)} such); align again")
        fits = {name: (shape, dtype) for name, shape, dtype in recipe.solver.planned_maps(pairs, recipe)}
        for name, shape in file.shapes.items():
            if (found := (shape, file.dtypes[name])) != fits.get(name):
                raise InputRefused(f"{file.folder / MAPS}: {name} is {found}, expected {fits.get(name)}; align again")
        self._heads = {"value": pairs.source.kv_heads, "key": pairs.source.kv_heads}, pairs.source.heads
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
