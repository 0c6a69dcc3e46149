"""The ``paper`` recipe: every layer's own input and output, no scales, as in arXiv 2602.12952."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, partial

import torch
from torch import Tensor

from ..activations.links import Link, Pairs, block_of
from ..activations.moments import CrossMoment, Grams
from ..linalg.procrustes import Polar, procrustes
from ..linalg.whitening import whiten
from ..models.geometry import Layer
from . import maps
from .choices import RecipeChoices
from .maps import Map, PlannedMap, doubles
from .ruleset import Rule
from .solver import Rows, Solver, Widths


class Paper(Solver):
    """The recipe at work; the maps of a block come from its own links only."""

    whitens = any_module = True

    @classmethod
    def planned_maps(cls, pairs: Pairs, recipe: RecipeChoices) -> list[PlannedMap]:
        found: list[tuple[str, Widths]] = [(f"{name}/matrix", link.widths) for name, link in pairs.moments.items()]
        for layer, (own, into) in _augmented(pairs):
            (out_s, _), (out_t, k) = own, into
            if expands(own, into, recipe):
                found += [(f"{layer.name}/left", (out_s, k)), (f"{layer.name}/right", (k, out_t))]
            else:
                found.append((f"{layer.name}/matrix", (out_s, out_t)))
        return doubles(found)

    @classmethod
    def decompositions(cls, pairs: Pairs, recipe: RecipeChoices) -> list[tuple[str, Widths]]:
        found: list[tuple[str, Widths]] = [(name, link.widths) for name, link in pairs.moments.items()]
        for layer, shapes in _augmented(pairs):
            (out_s, k_s), (out_t, k_t) = shapes
            found.append((layer.reads, (k_s, k_t) if expands(*shapes, recipe) else (out_s, out_t)))
        return found

    @classmethod
    def gram_sides(cls, pairs: Pairs, recipe: RecipeChoices, links: Iterable[str]) -> dict[str, tuple[int, ...]]:
        """Of both sides, to whiten with."""
        return dict.fromkeys(links, (0, 1)) if recipe.whiten_power else {}

    def as_mapped(self, rows: Rows, link: Link) -> Rows:
        return rows.map(lambda x: x - x.mean(0)) if self.recipe.center else rows

    def needs(self, layers: Iterable[Layer], vectors: Iterable[str]) -> set[str]:
        fed = (la for la in layers if la.role == "head" or self.pairs.blocks[la.block] is not None)
        return {la.reads for la in fed} | {self._norms[n] for n in vectors if n in self._norms}

    @cached_property
    def _norms(self) -> dict[str, str]:
        """The link of every norm's own vectors."""
        every = [norm for place in self.pairs.places for norm in self.pairs.norms(place)]
        return {f"{into}.{part}": name for _, into, name in every for part in ("weight", "bias")}

    def _held(self, name: str) -> bool:
        b = block_of(name)
        return b is not None and b >= self.ahead and not name.endswith(".after")

    def _arrived(self, names: Sequence[str]) -> None:
        for name in names:
            cross = comparable(self.moments[name], self.grams.get(name), self.recipe)
            self.ruleset.add(name, self.polar(cross), self.moments[name].count)

    def _block(self, b: int) -> None:
        for own, layer in self.pairs.layers(b):
            if (space := layer.reads) not in self.moments:
                continue
            moment, weights = self.moments[space], (self.source.augmented(own.name), self.target.augmented(layer.name))
            grams = self.grams.get(space)
            polar, built = output_map(moment, *weights, recipe=self.recipe, grams=grams, polar=self.polar)
            self.ruleset.add(layer.name, polar, moment.count, built)
            self.ruleset.rules[layer.name] = Rule(own.name, space, layer.name, fold=False)
        self._norm_vectors(b)

    def _finish(self) -> None:
        for own, layer in self.pairs.layers(None):
            if self.recipe.head == "move" and "final" in self.seen:
                self.ruleset.rules[layer.name] = Rule(own.name, "final", "identity", fold=False)
        self._norm_vectors(None)

    def _norm_vectors(self, place: int | None) -> None:
        for own, norm, name in self.pairs.norms(place):
            for part in ("weight", "bias") if name in self.seen else ():
                self.ruleset.vectors[f"{norm}.{part}"] = Rule(f"{own}.{part}", "identity", name, fold=False)


def _augmented(pairs: Pairs) -> Iterator[tuple[Layer, tuple[Widths, Widths]]]:
    """Layers of the target inside blocks, and the shapes of the source's augmented weight and of their own."""
    for b in (b for b in pairs.places if b is not None):
        for own, layer in pairs.layers(b):
            (out_s, in_s), (out_t, in_t) = pairs.source.weights()[own.role], pairs.target.weights()[layer.role]
            yield layer, ((out_s, in_s + 1), (out_t, in_t + 1))


def expands(source: Sequence[int], target: Sequence[int], recipe: RecipeChoices) -> bool:
    """Whether two layers make more features than they read: of the shapes [out, in + 1] of augmented weights."""
    return all(out > read for out, read in (source, target)) and recipe.null != "svd"


def comparable(moment: CrossMoment, grams: Grams | None, recipe: RecipeChoices) -> Tensor:
    """What a map is the polar factor of, [dS, dT]: the cross-moment, centred and whitened where the recipe says so.

    Args:
        moment: uncentred; grams: of both sides, where the recipe whitens.
    """
    if recipe.center:
        moment, grams = moment.centred(), grams and {side: gram.centred() for side, gram in grams.items()}
    if grams is None:
        return moment.cross
    return whiten(moment.cross, (grams[0].cross, grams[1].cross), power=recipe.whiten_power, eps=recipe.whiten_eps)


def output_map(
    moment: CrossMoment,
    source: Tensor,
    target: Tensor,
    *,
    recipe: RecipeChoices,
    grams: Grams | None = None,
    polar: Callable[[Tensor], Polar] | None = None,
) -> tuple[Polar, Map]:
    """Map between two layers' outputs, from the moment of their inputs.

    Where both layers expand (out > in + 1), ``[W b] = Q R`` and T = Q_S polar(R_S M R_T^T) Q_T^T: the cross has rank at
    most in + 1, so the small polar factor holds all the data determines.

    Args:
        moment: of the layers' inputs, uncentred (the recipe says whether to centre); grams: of the inputs, both sides.
        source, target: augmented weights [W b], [out_S, in_S + 1] and [out_T, in_T + 1].
        polar: makes the polar factor; by default :func:`procrustes` as the recipe says.

    Returns:
        The polar factor that was computed (the small one where factored), and the map.
    """
    s, t = source.to(moment.cross), target.to(moment.cross)
    if factored := expands(s.shape, t.shape, recipe):
        (q_s, s), (q_t, t) = torch.linalg.qr(s), torch.linalg.qr(t)
    own = grams and {0: grams[0].derive(s, s), 1: grams[1].derive(t, t)}
    polar = polar or partial(procrustes, null=recipe.null, floor=recipe.floor)
    made = polar(comparable(moment.derive(s, t), own, recipe))
    return made, maps.Factored(q_s @ made.map, q_t.T.contiguous()) if factored else maps.Dense(made.map)
