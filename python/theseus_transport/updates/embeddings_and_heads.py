"""Embeddings and heads of base, tune and target made comparable: tied, new in the tune, or with other rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..errors import InputRefused
from ..models.base import Base
from ..models.family import Slot
from ..models.tensors import Seen, SeenTensors, dtype_of, growing, shape_of
from .coverage import TIES, Stays
from .delta import Delta, Renamed

MISSING = "the source base has no such tensor"


@dataclass
class Ends:
    """Where a transport begins and ends: base, tune and target are seen with the same heads and the same rows.

    A tied head is no tensor of its own, but a tune's own head moved away from the base's embedding, and an untied
    target has a place for it. A head that is new in the tune moved away from zero. Tables of a vocabulary move by the
    rows they share.

    Attributes:
        source, target: the bases, as they are to be seen.
        stays: what is left.
        one_tokenizer: rows of one index mean the same token in both vocabularies, though their numbers differ.
        tuned: the tuned tensors by canonical name, as they are to be seen.
        left: canonical name of the source -> why it stays.
        notes: canonical name of the source -> what to say where it moves.
        new: canonical names, in the target, of what is new in the tune: it moves whole, whatever the strength.
        shared: where an adapter saves head and embedding as one, and the target keeps them as one too: the head's name
            in the target -> the embedding's, as stored.
        lone: the tune's embedding, if its head is not that, and the target ties the two; else "".
        said: warnings.
    """

    source: Base
    target: Base
    delta: Delta
    stays: Stays
    one_tokenizer: bool
    tuned: Renamed = field(init=False)
    left: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    new: set[str] = field(default_factory=set)
    shared: dict[str, str] = field(default_factory=dict)
    lone: str = ""
    said: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        family, into = self.source.geometry.family, self.target.geometry.family
        self.tuned = self.delta.tuned_tensors(family)
        self._head, self._into = (f"{f.heads.get('vocabulary')}.weight" for f in (family, into))
        token = family.embedding("token")
        self._token = token.name if token else ""
        self._known: set[int] = set()
        self.full = self.delta.tuned is not None and self.delta.adapted is None
        self._new_heads()
        if self.source.geometry.tied and self._token in self.source:
            self._tied()
        elif self.full and self._head in self.source and self._head not in self.tuned:
            self._missing()
        if self.target.geometry.tied and not self.shared and self._head in self.source:  # as a tensor of its own
            self.lone = self._token
        if self.source.geometry.vocabulary and self.target.geometry.vocabulary:
            self._rows(self.source.geometry.vocabulary, self.target.geometry.vocabulary)

    def fitted(self, layer: str, b: Tensor) -> Tensor:
        """The B of a LoRA [out, r] on a head over the vocabulary, with the rows the tables are seen with."""
        if f"{layer}.weight" != self._head or len(b) not in self._known:
            return b
        return torch.cat([b[: self.kept], b.new_zeros(self.size - self.kept, b.shape[1])])

    def _new_heads(self) -> None:
        """Both bases get a head of zeros where the tune has one that the source's base does not have."""
        family, into = self.source.geometry.family, self.target.geometry.family
        for purpose, own in family.heads.items():
            weight = f"{own}.weight"
            if weight not in self.tuned or self.stays.asked(weight) or self.stays.by_rule(weight):
                continue
            if purpose == "vocabulary" and self.source.geometry.tied:
                continue
            fresh = weight not in self.source or (
                purpose == "classes" and self.tuned.shape(weight) != self.source.shape(weight)
            )
            if not fresh:
                continue
            if why := self._no_place(purpose):
                self.left |= {name: why for name in (weight, f"{own}.bias") if name in self.tuned}
                self.said.append(f"{own} is new in the tuned model and stays behind: {why}")
            else:
                self._add_head(own, into.heads[purpose], self.tuned.shape(weight))

    def _no_place(self, purpose: str) -> str | None:
        """Why a head that is new in the tune stays, or None."""
        families = self.source.geometry.family, self.target.geometry.family
        if purpose == "classes" and purpose in families[1].heads:
            read = [family.classes_read for family in families]
            return None if read[0] == read[1] else f"it reads {read[0]} x the features, the target's {read[1]} x"
        if purpose == "vocabulary" and purpose in families[1].heads and self._into not in self.target:
            return TIES if self.target.geometry.tied else None
        return MISSING

    def _add_head(self, own: str, into: str, shape: Sequence[int]) -> None:
        widths = self.source.geometry.width, self.target.geometry.width
        if len(shape) != 2 or shape[1] % widths[0]:
            raise InputRefused(
                f"{own}.weight is {list(shape)} in the tuned model; a head reads the {widths[0]} features of the norm "
                f"in front of it; --leave '{own}*' leaves it behind"
            )
        inputs = shape[1] // widths[0] * widths[1]
        norm = self.target.slots[f"{self.target.geometry.family.final_norm}.weight"]
        dtype = dtype_of(self.target.tensors, norm.stored)
        zeros: tuple[dict[str, Seen], dict[str, Seen]] = {}, {}
        target = self._prefixed()
        for part, inner in (("weight", ((shape[1],), (inputs,))), ("bias", ((), ()))):
            name, place = f"{own}.{part}", f"{into}.{part}"
            target.slots.pop(place, None)
            if name in self.tuned:
                self.source.slots[name], target.slots[place] = Slot(name), Slot(place)
                zeros[0][name] = Seen(0, (shape[0], *inner[0]), self.tuned.dtype(name))
                zeros[1][place] = Seen(0, (shape[0], *inner[1]), dtype)
                self.new.add(place)
                self.notes[name] = "new in the tuned model: whole"
        self.source = replace(self.source, tensors=SeenTensors(self.source.tensors, zeros[0]))
        self.target = replace(target, tensors=SeenTensors(target.tensors, zeros[1]))

    def _prefixed(self) -> Base:
        """The target; a bare backbone with its tensors as a class with a head names them."""
        prefix, target = self.target.geometry.family.prefix, self.target
        if not prefix or any(name.startswith(f"{prefix}.") for name in target.tensors):
            return target
        slots = {name: replace(slot, stored=f"{prefix}.{slot.stored}") for name, slot in target.slots.items()}
        return replace(target, tensors=SeenTensors(target.tensors, {}, f"{prefix}."), slots=slots)

    @property
    def _other_class(self) -> bool:
        """Whether the tune is of a class with a head over classes, which the base is not."""
        heads = self.target.geometry.family.heads
        return f"{heads.get('classes')}.weight" in self.new

    def _tied(self) -> None:
        """The source's head is its embedding; the tune may have one of its own."""
        head, token, slots = self._head, self._token, self.tuned.slots
        self.source.slots[head] = self.source.slots[token]
        full, one = self.full, head in slots and token in slots and self._same(head, token)
        if head in slots and not one:
            return
        if full and head not in slots and self._other_class:
            del self.source.slots[head]
            self.target.slots.pop(self._into, None)  # what is written is of a class without
        elif token in slots and (one or full or self.delta.ties):
            if self._into in self.target:
                slots[head] = slots[token]
            else:
                del self.source.slots[head]
                slots.pop(head, None)
                if self.delta.adapter is not None and (own := self.target.geometry.family.embedding("token")):
                    self.shared[self._into] = self.target.slots[own.name].stored

    def _missing(self) -> None:
        """An untied source has a head, a full tune of it has none."""
        if self.delta.ties and self._token in self.tuned:
            self.tuned.slots[self._head] = self.tuned.slots[self._token]
            return
        self.left[self._head] = "the tuned model has no such tensor"
        if self._other_class:
            self.target.slots.pop(self._into, None)
        else:
            self.said.append(f"the tuned model has no {self._head}, and its config does not tie it: the target's stays")

    def _same(self, one: str, other: str) -> bool:
        """Whether two tuned tensors are equal; of what differs early, little is read."""
        tuned, shape = self.tuned, self.tuned.shape(one)
        if shape != tuned.shape(other) or tuned.slots[one] == tuned.slots[other]:
            return shape == tuned.shape(other)
        return all(torch.equal(tuned.rows(one, r), tuned.rows(other, r)) for r in growing(shape) if r)

    def _rows(self, own: int, other: int) -> None:
        """Tables of a vocabulary of ``own`` rows, the target's of ``other``, are seen with the rows they share."""
        bias = f"{self._head.removesuffix('.weight')}.bias"
        tables = [name for name in dict.fromkeys((self._token, self._head, bias)) if name in self.source]
        tables = [n for n in tables if n not in self.tuned or self.tuned.shape(n)[1:] == self.source.shape(n)[1:]]
        counts = {name: self.tuned.shape(name)[0] for name in tables if name in self.tuned}
        self._known = {own, *counts.values()}
        together = own == other or self.one_tokenizer
        self.size = other if together else own
        self.kept = min(own, self.size, *counts.values())
        for name, count in counts.items():
            said = []
            if count != own:
                said.append(f"{abs(count - own)} rows {'added' if count > own else 'removed'} by the tune stay")
            if together and self.size != own:
                said.append(f"{abs(other - own)} {'of the target' if other > own else 'without a place'} stay")
            if said:
                self.notes[name] = f"{self.kept} rows; {', '.join(said)}"
        if added := {name: count - own for name, count in counts.items() if count > own}:
            self.said.append(
                f"{max(added.values())} rows added to {' and '.join(added)} by the tune stay behind: "
                "its base has no such rows, so they are no update"
            )
        if self.size == self.kept == own and set(counts.values()) <= {own}:
            return
        views: list[dict[str, Seen]] = []
        for tensors, slots in ((self.source.tensors, self.source.slots), (self.tuned.tensors, self.tuned.slots)):
            stored = {slots[name].stored for name in tables if name in slots}
            shapes = {n: (self.size, *shape_of(tensors, n)[1:]) for n in stored}
            views.append({n: Seen(self.kept, shape, dtype_of(tensors, n)) for n, shape in shapes.items()})
        self.source = replace(self.source, tensors=SeenTensors(self.source.tensors, views[0]))
        self.tuned = Renamed(SeenTensors(self.tuned.tensors, views[1]), self.tuned.slots)
