"""What the block loop visits, in order: which blocks run, and what is seen meanwhile."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

from ..activations.links import Link, Pairs, of_class
from ..models.geometry import Space
from ..models.pair import Pair

Links = dict[str, Link]
NO_NORMS = Pair[frozenset[str]](frozenset(), frozenset())


@dataclass(frozen=True)
class Visit:
    """One stretch of the loop: at most one block of each model; what is seen is worked up before the next.

    Attributes:
        source, target: the blocks that run, or None.
        moments, outputs: the links whose cross-moments and energies are added up.
        norms: of each side those that run on the result, because a link compares what they read or give.
    """

    source: int | None = None
    target: int | None = None
    moments: Links = field(default_factory=dict)
    outputs: Links = field(default_factory=dict)
    norms: Pair[frozenset[str]] = NO_NORMS

    @property
    def links(self) -> Links:
        """All that is seen."""
        return self.moments | self.outputs

    def halved(self, layers: Collection[str]) -> tuple[Visit, Visit]:
        """This visit as two, one of what is seen up to the end of attention and one of what is seen behind it.

        Args:
            layers: those of the target's attention.
        """
        own = f"{self.target}.attention", f"{self.target}.context"
        spaces = {*own, *map(of_class, own)}
        first, second = (
            replace(
                self,
                moments={n: link for n, link in self.moments.items() if (n in spaces) is inside},
                outputs={n: link for n, link in self.outputs.items() if (n in layers) is inside},
            )
            for inside in (True, False)
        )
        return replace(first, norms=NO_NORMS), second

    @property
    def blocks(self) -> Pair[int | None]:
        return Pair(self.source, self.target)


def schedule(pairs: Pairs, wanted: Collection[str], *, whole: bool = False) -> list[Visit]:
    """The embeddings, a visit for every pair of blocks and every block by itself, the end.

    What comes after the last ``wanted`` link is left out.

    Args:
        wanted: names of links. whole: nothing is left out.
    """
    moments = {n: _unpooled(link) for n, link in {**pairs.moments, **pairs.class_rows}.items() if n in wanted}
    outputs = {n: link for n, link in pairs.energies.items() if n in wanted}
    (_, first), *inside, (_, last) = pairs.arrivals
    met = dict(inside)

    def seen(names: Sequence[str]) -> tuple[Links, Links]:
        own, other = ({n: links[n] for n in names if n in links} for links in (moments, outputs))
        return own, other

    start, end = Visit(None, None, *seen(first)), Visit(None, None, *seen(last))
    run_ahead = {geometry.family.embedding_norm for geometry in pairs.geometries}  # with the embeddings
    visits, at = [replace(start, norms=_norms(start.links.values(), run_ahead))], 0
    for b, own in enumerate(pairs.blocks):
        if own is None:
            visits.append(Visit(target=b))
            continue
        (spaces, layers), after = seen(met[b]), pairs.after(b)
        follow = _norms([spaces[name] for name in (after, of_class(after)) if name in spaces])
        visits += [Visit(source=j) for j in range(at, own)] + [Visit(own, b, spaces, layers, follow)]
        at = own + 1
    visits += [Visit(source=j) for j in range(at, pairs.source.depth)]
    visits.append(replace(end, norms=_norms(end.links.values())))
    while len(visits) > 1 and not (whole or visits[-1].links):
        visits.pop()
    return visits


def _norms(links: Collection[Link], but: Collection[str | None] = ()) -> Pair[frozenset[str]]:
    """Of each side the norms whose output these links compare."""
    return Pair(*(frozenset(link[side].module for link in links) - {*but} for side in (0, 1)))


def _unpooled(link: Link) -> Link:
    """Between blocks the final norm runs over all tokens by itself, also where the model pools first."""
    return Link(*link.map(_plain))


def _plain(space: Space) -> Space:
    return replace(space, module=space.norm, side="output") if space.side == "normed" and space.norm else space
