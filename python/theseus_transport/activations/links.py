"""Which parts of two models correspond: the spaces that are compared, and the layers and vectors that pair up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from ..models.geometry import Geometry, Layer, Space
from ..models.pair import Pair

Blocks = Sequence["int | None"]  # for every target block the source block that feeds it
PARTS = "attention", "context", "mlp", "middle"  # the spaces of a block, in the order of a forward pass
Place = int | None  # a target block; None is what lies outside all blocks


class Link(Pair[Space]):
    """Two spaces, one of each model, whose tokens correspond."""

    __slots__ = ()

    @property
    def widths(self) -> Pair[int]:
        """Features of source and target."""
        return self.map(lambda space: space.width)

    @property
    def of_class(self) -> Link:
        """The same two spaces, of each image's class token alone."""
        return Link(*(replace(space, rows="class") for space in self))

    @property
    def whole(self) -> bool:
        """Whether all tokens are compared."""
        return self.target.rows == "all"


def of_class(name: str) -> str:
    """The link that compares a link's two spaces by the class token alone."""
    return f"{name}.class"


def block_of(name: str) -> int | None:
    """The target block of a link; None outside all blocks."""
    block = name.split(".")[0]
    return int(block) if block.isdigit() else None


@dataclass(frozen=True)
class Pairs:
    """What of two models corresponds, place by place: in a target block ``b``, or outside all blocks (None).

    Attributes:
        source, target: the two geometries.
        blocks: for every target block the source block that feeds it, or None.
    """

    source: Geometry
    target: Geometry
    blocks: Blocks

    @classmethod
    def by_position(cls, source: Geometry, target: Geometry) -> Pairs:
        """Every target block's source block where depths agree; else a guess, evenly spread, before any is compared."""
        if source.depth >= target.depth:
            return cls(source, target, [(b * source.depth) // target.depth for b in range(target.depth)])
        fed = {(b * target.depth) // source.depth: b for b in range(source.depth)}
        return cls(source, target, [fed.get(b) for b in range(target.depth)])

    @property
    def geometries(self) -> Pair[Geometry]:
        return Pair(self.source, self.target)

    @property
    def places(self) -> list[Place]:
        """The target's paired blocks in order, then None."""
        return [*(b for b, own in enumerate(self.blocks) if own is not None), None]

    def reads_one_token(self, b: int) -> bool:
        """Whether behind target block ``b`` both models read the class token alone, each behind its last block.

        Then of all that the two blocks make, but for keys and values, that row alone matters.
        """
        last = b + 1 == self.target.depth and self.blocks[b] == self.source.depth - 1
        return last and self.source.one_token and self.target.one_token

    @cached_property
    def moments(self) -> Mapping[str, Link]:
        """The spaces whose cross-moments are wanted, by name, in the order a forward pass of the target meets them.

        Of every paired target block b: ``b.attention``, ``b.context``, ``b.mlp``, ``b.middle``; ``b.after`` where what
        follows the two blocks is no such pair itself; ``embedding`` where what follows the embeddings is not
        ``0.attention``; ``final``.
        """
        source, target = self.source, self.target
        found: dict[str, Link] = {}
        if self.blocks[0] != 0 or source.family.embedding_norm or target.family.embedding_norm:
            found["embedding"] = Link(source.first(), target.first())
        for b, own in enumerate(self.blocks):
            if own is None:
                continue
            for part in PARTS:
                found[f"{b}.{part}"] = Link(source.space(own, part), target.space(b, part))
            if self.after(b) == f"{b}.after":
                found[f"{b}.after"] = Link(source.after(own), target.after(b))
        found["final"] = Link(source.final(), target.final())
        return found

    @cached_property
    def class_rows(self) -> Mapping[str, Link]:
        """Beside :attr:`moments`, where :meth:`reads_one_token`: the spaces whose class token alone is read.

        By the names that :func:`of_class` gives them: the last block's context, MLP and middle, and ``final``.
        """
        b = self.target.depth - 1
        names = [f"{b}.{part}" for part in PARTS[1:]] + ["final"] if self.reads_one_token(b) else []
        return {of_class(name): self.moments[name].of_class for name in names}

    @cached_property
    def energies(self) -> Mapping[str, Link]:
        """The outputs whose energies set the scales: by target layer, and ``embedding.output``, ``embedding.norm``.

        Of what :meth:`reads_one_token` says the energies of that row, but for queries, keys and values.
        """
        source, target = self.source, self.target
        found = {"embedding.output": Link(source.embedded(), target.embedded())}
        if source.family.embedding_norm and target.family.embedding_norm:
            found["embedding.norm"] = Link(source.first(), target.first())
        for layer in target.layers():
            if layer.role != "head" and (block := self.blocks[layer.block]) is not None:
                own = source.counterpart(layer, block)
                assert own is not None  # check_pair
                link = Link(source.written(own), target.written(layer))
                alone = layer.role in ("output", "expand", "contract") and self.reads_one_token(layer.block)
                found[layer.name] = link.of_class if alone else link
        return found

    @cached_property
    def arrivals(self) -> Sequence[tuple[Place, Sequence[str]]]:
        """Names of :attr:`moments`, :attr:`class_rows` and :attr:`energies` as a run meets them, each once.

        First ``None`` with what precedes the first block; every paired target block with what it and its successor
        show; at the end ``None`` with what is left.
        """
        start = ["embedding", *(["0.attention"] if self.blocks[0] == 0 else []), "embedding.output", "embedding.norm"]
        steps: list[tuple[Place, list[str]]] = [(None, start)]
        for b in (b for b in self.places if b is not None):
            spaces = [f"{b}.{part}" for part in PARTS]
            layers = [la.name for la in self.target.layers() if la.block == b and la.name in self.energies]
            spaces.append(self.after(b))
            steps.append((b, [*spaces, *map(of_class, spaces), *layers]))
        left = dict.fromkeys([*self.moments, *self.class_rows, *self.energies])
        met = [
            (place, [name for name in names if left.pop(name, 0) is None])
            for place, names in [*steps, (None, ["final"])]
        ]
        assert not left
        return met

    def after(self, b: int) -> str:
        """The name of the link between what follows target block ``b`` and what follows its source block."""
        own, last = self.blocks[b], b + 1 == self.target.depth
        assert own is not None
        if last and own + 1 == self.source.depth:
            return "final"
        return f"{b + 1}.attention" if not last and self.blocks[b + 1] == own + 1 else f"{b}.after"

    def layers(self, place: Place) -> Iterator[tuple[Layer, Layer]]:
        """(source, target) of every linear layer that is fed; outside blocks these are the heads."""
        block = None if place is None else self.blocks[place]
        for layer in self.target.layers():
            inside = layer.block == (self.target.depth if place is None else place)
            if inside and (own := self.source.counterpart(layer, block)):
                yield own, layer

    def embeddings(self) -> Iterator[tuple[str, str]]:
        """(source, target) canonical names of the embeddings both families have."""
        for e in self.target.family.embeddings:
            if own := self.source.family.embedding(e.slot):
                yield own.name, e.name

    def norms(self, place: Place) -> Iterator[tuple[str, str, str]]:
        """(source, target, link) of the norms of the residual: canonical names, and the link that compares outputs."""
        source, target = self.source, self.target
        if place is not None and (own := self.blocks[place]) is not None:
            for part in ("attention", "mlp"):
                names = (getattr(la.family, f"{part}_norm") for la in (source, target))
                yield source.block(own, next(names)), target.block(place, next(names)), f"{place}.{part}"
        if place is None:
            yield from self._outer_norms()

    def unread(self, place: Place) -> Iterator[tuple[str, str, str]]:
        """(source, target, map) of norms whose output is more, or other, than what linear layers read.

        The final norm, of which no head may move; the norm whose output is the residual; the norms inside heads.
        """
        source, target = self.source, self.target
        if place is None:
            yield from self._outer_norms()
        elif (own := self.blocks[place]) is not None:
            for role in ("query", "key"):
                names = [getattr(la.family, f"{role}_norm") for la in (source, target)]
                if all(names):
                    yield source.block(own, names[0]), target.block(place, names[1]), f"{place}.{role}"

    def _outer_norms(self) -> Iterator[tuple[str, str, str]]:
        source, target = self.source.family, self.target.family
        if source.embedding_norm and target.embedding_norm:
            yield source.embedding_norm, target.embedding_norm, "embedding"
        yield source.final_norm, target.final_norm, "final"
