"""The weights of a model as a tune or an update changes it, tensor by tensor beside those of its base."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor

from ..models.family import Family
from ..models.tensors import Tensors, growing, rows_of, shape_of
from ..updates.computed import ComputedUpdate
from ..updates.delta import Delta
from ..updates.merged import Merged
from .window import Window

VOCABULARY = "the head over the vocabulary"  # name under which a tune's own is read, wherever it is stored


class TunedWeights:
    """Tensors of the tuned source under the names its base has for them; what the tune leaves is the base's own.

    An adapter is added to its base tensor by tensor as it is read: no merged model is made.
    """

    def __init__(self, base: Window, delta: Delta, family: Family, left: Callable[[str], bool]) -> None:
        """
        Args:
            left: whether a canonical tensor is left behind on request, as if the tune had not changed it.
        """
        self._base, self._family = base, family
        if delta.tuned is None:
            assert delta.adapter is not None
            merged = Merged(base, delta.adapter, family)
            self.tensors: Tensors = merged
            stored = {family.canonical(name): name for name in merged.changed}
        else:
            self.tensors = delta.tuned
            stored = family.spelled(delta.tuned)
        spelled = family.spelled(base)
        names = {name: stored[canonical] for canonical, name in spelled.items() if canonical in stored}
        token = family.embedding("token")
        table = stored.get(token.name) if token else None
        self._rows = shape_of(self.tensors, table)[0] if table else None  # of the tune's vocabulary
        self._names = {
            name: own for name, own in names.items() if self._like(name, own) and not left(family.canonical(name))
        }
        moved = {
            name: own for name, own in stored.items() if not left(name) and spelled.get(name) in (None, *self._names)
        }
        self._head = self._head_of(delta, spelled, moved)

    def _head_of(self, delta: Delta, base: Mapping[str, str], tuned: Mapping[str, str]) -> tuple[str, str | None]:
        """The base's tensor that its head over the vocabulary is, and the tune's: it may have come apart from the
        embedding, or joined it.

        Args:
            base, tuned: canonical names -> as stored; of the tune, what it may have changed.
        """
        head, token = f"{self._family.heads.get('vocabulary')}.weight", self._family.embedding("token")
        table, whole = token.name if token else "", delta.tuned is not None and delta.adapted is None
        joined = head not in tuned and (delta.ties or (whole and head not in base))
        return base.get(head, base.get(table, "")), tuned.get(table if joined else head)

    @property
    def outputs(self) -> int:
        """Rows of the tune's head over the vocabulary."""
        name, own = self._head
        return shape_of(self._base, name)[0] if own is None else shape_of(self.tensors, own)[0]

    def _like(self, name: str, own: str) -> bool:
        """Whether a tuned tensor can stand in the base's place: a vocabulary's may have more rows, or as few as all."""
        base, tuned = shape_of(self._base, name), shape_of(self.tensors, own)
        grown = len(base) == len(tuned) == 2 and base[1:] == tuned[1:] and tuned[0] > base[0]
        return base == tuned or grown or (base[1:] == tuned[1:] and tuned[0] == self._rows)

    def changes(self, names: Collection[str]) -> bool:
        """Whether any of these stored tensors differs from the base's; reads them up to the first rows that do."""
        return any(
            not self._same(name, rows)
            for name in names
            if name in self._names
            for rows in growing(shape_of(self._base, name))
        )

    def _same(self, name: str, rows: slice | None) -> bool:
        base, tuned = rows_of(self._base, name, rows), self[name] if rows is None else self.rows(name, rows)
        return torch.equal(tuned.to(base), base)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            return self._base[name]
        shape, own = self._base.shapes[name], self._names[name]
        return self.tensors[own] if shape == shape_of(self.tensors, own) else self.rows(name, slice(0, shape[0]))

    def take(self, name: str, index: Tensor) -> Tensor:
        """The rows that ``index`` names (int64, ascending, each once), [len(index), ...]."""
        if name not in self._names:
            return self._base.take(name, index)
        own, read = self._names[name], getattr(self.tensors, "take", None)
        there = index[index < shape_of(self.tensors, own)[0]]
        found: Tensor = self.tensors[own][there] if read is None else read(own, there)
        rest = index[len(there) :]
        return torch.cat([found, self._base.take(name, rest).to(found)]) if len(rest) else found

    def rows(self, name: str, rows: slice) -> Tensor:
        """Consecutive rows of a tensor, [rows, ...]; those that the tune's table does not have are the base's."""
        name, own = self._head if name == VOCABULARY else (name, self._names.get(name))
        if own is None:
            return self._base.rows(name, rows)
        count = shape_of(self.tensors, own)[0]
        found = rows_of(self.tensors, own, slice(min(rows.start, count), min(rows.stop, count)))
        if rows.stop <= count:
            return found
        return torch.cat([found, self._base.rows(name, slice(max(rows.start, count), rows.stop)).to(found)])


class UpdatedWeights:
    """Tensors of the target with what its update holds of them so far; those of a block are kept until the next."""

    def __init__(self, base: Window, update: ComputedUpdate) -> None:
        self._base, self._update = base, update
        self._made: dict[str, Tensor] = {}  # by the update's names
        # where the tune is of a class with a head, and the target is a bare backbone, the update names it as that class
        stored = getattr(update.target.tensors, "stored", str)
        self._own = {stored(slot.stored): slot.stored for slot in update.target.slots.values()}

    def forget(self, *names: str) -> None:
        """Make these, as the update names them, anew when they are asked for; or all."""
        for name in names or list(self._made):
            self._made.pop(name, None)

    def __getitem__(self, name: str) -> Tensor:
        own = self._own.get(name, name)
        if not self._update.there(own):
            return self._base[name]
        if own not in self._made:
            self._made[own] = self._base[name].detach().cpu().to(self._update.dtype(own)) + self._update[own]
        return self._made[own]

    def take(self, name: str, index: Tensor) -> Tensor:
        """The rows that ``index`` names (int64, ascending, each once), [len(index), ...]."""
        found, own = self._base.take(name, index), self._own.get(name, name)
        if not self._update.there(own):
            return found
        found = found.detach().cpu().to(self._update.dtype(own), copy=True)
        for tile in self._update.tiles(own) or (slice(0, shape_of(self._base, name)[0]),):
            first, last = torch.searchsorted(index, torch.tensor([tile.start, tile.stop])).tolist()
            if first < last:
                value = self._update.rows(own, tile) if self._update.tiles(own) else self._update[own]
                found[first:last] += value[index[first:last] - tile.start]
        return found

    def rows(self, name: str, rows: slice) -> Tensor:
        """Consecutive rows of a tensor, [rows, ...]."""
        return self.take(name, torch.arange(*rows.indices(self._base.shapes[name][0])))


class Scaled:
    """The target's tensors with its update at another strength."""

    def __init__(self, base: Window, updated: UpdatedWeights, alpha: float) -> None:
        self._base, self._updated, self._alpha = base, updated, alpha

    def _between(self, before: Tensor, after: Tensor) -> Tensor:
        return after if after is before else torch.lerp(before.to(after), after, self._alpha)

    def __getitem__(self, name: str) -> Tensor:
        return self._between(self._base[name], self._updated[name])

    def take(self, name: str, index: Tensor) -> Tensor:
        """The rows that ``index`` names (int64, ascending, each once), [len(index), ...]."""
        return self._between(self._base.take(name, index), self._updated.take(name, index))

    def rows(self, name: str, rows: slice) -> Tensor:
        """Consecutive rows of a tensor, [rows, ...]."""
        return self._between(self._base.rows(name, rows), self._updated.rows(name, rows))
