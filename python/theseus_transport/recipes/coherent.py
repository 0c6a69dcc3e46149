"""The ``coherent`` recipe: one map per space, shared by all that read or write it, scaled by energies.

Exact where the two bases are re-parametrisations of each other: rotated or widened residual, permuted or duplicated
heads and neurons, new gains, per-head scales.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from ..activations.links import Blocks, Link, Pairs, block_of, of_class
from ..activations.moments import CrossMoment
from ..linalg.polar import remote
from ..linalg.procrustes import Polar, leaning
from ..models.base import Base
from ..models.geometry import Geometry, Layer, Role
from . import maps
from .behind_norms import normalised, normalised_rows
from .choices import RecipeChoices
from .coherent_heads import QKV, head_maps, planned_heads, scale_of
from .maps import PlannedMap, doubles
from .regression import fit_input, fit_output
from .ruleset import Rule
from .solver import Rows, Solver, Widths


class Coherent(Solver):
    """The recipe at work."""

    folds = moves_embeddings = reads_energies = reads_class_rows = True

    @classmethod
    def planned_maps(cls, pairs: Pairs, recipe: RecipeChoices) -> list[PlannedMap]:
        links, target = pairs.moments, pairs.target
        dense: list[tuple[str, Widths]] = []
        dense += [(f"{name}/matrix", link.widths) for name, link in links.items() if not name.endswith(".context")]
        if recipe.completion == "deeper":
            first = [name for name in ("0.attention", "embedding") if name in links and _starts(pairs, name)]
            dense += [(f"{name}.completed/matrix", links[name].widths) for name in first]
        if target.family.embedding("token") and target.tied and target.family.norm == "layer":
            dense.append(("token/matrix", (pairs.source.width, target.width)))
        heads = [part for b in pairs.places if b is not None for part in planned_heads(pairs, b, recipe)]
        return doubles(dense) + sorted(heads, key=lambda planned: not planned[0].endswith("/matrix"))  # matrices first

    @classmethod
    def decompositions(cls, pairs: Pairs, recipe: RecipeChoices) -> list[tuple[str, Widths]]:
        heads = [(pairs.source.head_dim, pairs.target.head_dim)] * (2 * pairs.target.kv_heads)  # of v, and of q and k
        found: list[tuple[str, Widths]] = []
        for name, link in {**pairs.moments, **pairs.class_rows}.items():
            by_head = name.removesuffix(of_class("")).endswith(".context")
            found += [(name, each) for each in heads if by_head]
            found += [(name, link.widths)] if recipe.heads == "dense" or not by_head else []
        return found

    @classmethod
    def gram_sides(cls, pairs: Pairs, recipe: RecipeChoices, links: Iterable[str]) -> dict[str, tuple[int, ...]]:
        """Of the target's context: how alike heads are that have to share a source head."""
        share = recipe.heads == "pair" and pairs.target.outnumbers(pairs.source)
        return {name: (1,) for name in links if share and name.endswith(".context")}

    @classmethod
    def leans_on_depth(cls, recipe: RecipeChoices) -> bool:
        return recipe.null == "completed"

    @classmethod
    def diagonal(cls, link: str, target: Geometry) -> int:
        return target.heads if link.endswith(".context") else 1

    def __init__(
        self, source: Base, target: Base, blocks: Blocks, recipe: RecipeChoices, *, toward: Tensor | None = None
    ) -> None:
        super().__init__(source, target, blocks, recipe, toward=toward)
        ratio = target.geometry.width / source.geometry.width
        self._whitened = math.sqrt(ratio) if recipe.scale != "none" else 1.0  # energy of z is its width
        self._layer_norm = target.geometry.family.norm == "layer"
        self._first = "0.attention" if blocks[0] == 0 else self.behind

    def needs(self, layers: Iterable[Layer], vectors: Iterable[str]) -> set[str]:
        fed = (la for la in layers if la.role == "head" or self.pairs.blocks[la.block] is not None)
        found = [*(self._layer_needs(la) for la in fed), *(self._vector_needs.get(name, set()) for name in vectors)]
        return self.with_class_rows(set().union(*found))

    def as_mapped(self, rows: Rows, link: Link) -> Rows:
        behind_norms = link.source.norm and link.target.norm
        return normalised_rows(self.source, self.target, link, rows) if behind_norms else rows

    def _layer_needs(self, layer: Layer) -> set[str]:
        b = layer.block
        match layer.role:
            case "head":
                return {"final"}
            case "output":
                return {f"{b}.context", f"{b}.mlp", layer.name}
            case "expand":
                return {f"{b}.mlp", f"{b}.middle", layer.name}
            case "contract":
                return {f"{b}.middle", self.pairs.after(b), layer.name}
        reads = self._completable(self._first) if b == 0 and self._first == "0.attention" else {f"{b}.attention"}
        return reads | self._head_needs(b, layer.role)

    def _head_needs(self, b: int, role: Role) -> set[str]:
        """Of the outputs of q, k and v; q and k share a map, made from both."""
        shared = role != "value"
        made_of = [la.name for _, la in self.pairs.layers(b) if la.role in (QKV[:2] if shared else ("value",))]
        return {f"{b}.context", *([f"{b}.attention"] if shared else []), *made_of}

    @cached_property
    def _vector_needs(self) -> dict[str, set[str]]:
        written = self._completable(self.behind) | {"embedding.output"}
        found = {into: written for _, into in self.pairs.embeddings()}
        for place in self.pairs.places:
            for _, into, name in self.pairs.unread(place):
                if place is not None:
                    needed = self._head_needs(place, "query")
                else:
                    needed = {"final"} if name == "final" else self._completable(self._first) | {"embedding.norm"}
                found |= {f"{into}.weight": needed, f"{into}.bias": needed}
        return found

    def _completable(self, name: str) -> set[str]:
        """What tells whether a first map is completed: the ranks of both."""
        return self._starts() if self.recipe.completion == "deeper" else {name}

    def _starts(self) -> set[str]:
        return {self._first, self.behind}

    @property
    def wants_together(self) -> bool:
        full = min(la.width for la in (self.pairs.source, self.pairs.target)) - self._layer_norm
        return self.together is not None and any(rank < full for rank in self._ranks().values())

    def _ranks(self) -> dict[str, int]:
        """Of the first maps that were made."""
        return {r.space: r.rank for r in self.ruleset.reports if r.space in self._starts()}

    def _held(self, name: str) -> bool:
        if name in self._starts() and self.together is not None:
            return True
        if (b := block_of(name)) is None:
            return name in ("final", of_class("final")) and self.recipe.scale == "regression"
        return b >= self.ahead and not name.endswith(".after")

    def _arrived(self, names: Sequence[str]) -> None:
        behind_norms = [name for name in names if self.links[name].target.norm and self.links[name].whole]
        if self.recipe.null == "completed" and self.toward is None and behind_norms:
            raise ValueError("null=completed completes toward the sum over depth; give toward=together(...)")
        together = self.toward is None and any(remote(self.moments[name].cross) for name in behind_norms)
        for some in [behind_norms] if together else [[name] for name in behind_norms]:
            zs = [self._z(name) for name in some]
            for name, z, polar in zip(some, zs, self.polars([z.cross for z in zs], toward=self.toward), strict=True):
                self.ruleset.add(name, self._of_class(name, polar), z.count)
                self._add_together(name, z.cross)

    def _add_together(self, name: str, cross: Tensor) -> None:
        """To the sum over depth, while the first map may have to be completed toward it."""
        if self.recipe.completion == "deeper" and (name in self._starts() or self.together is not None):
            self.together = cross if self.together is None else self.together + cross
            if self._ranks().keys() == self._starts() and not self.wants_together:
                self.together = None  # the first maps are whole

    def _z(self, name: str) -> CrossMoment:
        return normalised(self.source, self.target, self.links[name], self.moments[name])

    def _of_class(self, name: str, polar: Polar) -> Polar:
        """A space's map by the class token's rows, where these alone matter, leaning on that of all rows."""
        return self.polar(leaning(self._read(name).cross, polar.map)) if of_class(name) in self.moments else polar

    def _read(self, name: str) -> CrossMoment:
        """The moment of a space by the rows that matter; of z behind norms."""
        name = self._rows(name)
        return self._z(name) if self.links[name].target.norm else self.moments[name]

    def _rows(self, name: str) -> str:
        return of_class(name) if of_class(name) in self.moments else name

    def _written(self, name: str) -> float:
        """Scale of an output that writes the residual."""
        energy = self.energies[name]
        own = energy.centred if self._layer_norm else (float(energy.source.sum()), float(energy.target.sum()))
        return scale_of(*own, self.recipe)

    def _completed(self, name: str) -> str:
        """The name of a first map as it is used, whether it is made already or only at the end."""
        return f"{name}.completed" if self.wants_together else name

    def _block(self, b: int) -> None:
        fed = [(own, layer) for own, layer in self.pairs.layers(b) if self.needs([layer], ()) <= self.seen]
        for own, layer in fed:
            self.ruleset.rules[layer.name] = self._rule(own, layer, b)
        if f"{b}.context" in self.moments:
            head_maps(self, b)
            self.grams.pop(f"{b}.context", None)  # not beside the widest map
        if f"{b}.middle" in self.moments:
            middle = self.moments[f"{b}.middle"]
            polar = self.polar(middle.cross, energies=(middle.source_energy, middle.target_energy))
            self.ruleset.add(f"{b}.middle", self._of_class(f"{b}.middle", polar), middle.count)
        for own_norm, norm, name in self.pairs.unread(b):
            self._norm_vectors(own_norm, norm, name)
        if self.recipe.scale == "regression":
            for own, layer in fed:
                self._fit(own, layer)

    def _rule(self, own: Layer, layer: Layer, b: int) -> Rule:
        match layer.role:
            case "query" | "key" | "value":
                first = b == 0 and self._first == "0.attention"
                reads = self._completed(self._first) if first else f"{b}.attention"
                return Rule(own.name, reads, f"{b}.{layer.role}", self._whitened)
            case "output":
                return Rule(own.name, f"{b}.context", f"{b}.mlp", 1.0, self._written(layer.name))
        middle, seen = self._read(f"{b}.middle"), self.energies[layer.name]
        energies = (middle.source_energy, middle.target_energy)
        if layer.role == "expand":
            alive = [x > self.recipe.floor**2 * x.max() for x in energies]
            scale = scale_of(float(seen.source[alive[0]].sum()), float(seen.target[alive[1]].sum()), self.recipe)
            return Rule(own.name, f"{b}.mlp", f"{b}.middle", self._whitened, scale)
        inner = scale_of(float(energies[0].sum()), float(energies[1].sum()), self.recipe)
        after = self.pairs.after(b)
        return Rule(own.name, f"{b}.middle", after, inner, self._written(layer.name))

    def _fit(self, own: Layer, layer: Layer) -> None:
        """Scales by regression in place of those by energies; at an input whose map is still to come, at the end."""
        rule, link = self.ruleset.rules[layer.name], layer.reads
        if rule.input in self.ruleset.maps:
            rule = fit_input(rule, self.ruleset.maps[rule.input], self._read(link))
        sides, seen = ((self.source, own), (self.target, layer)), self.energies[layer.name]
        read, t = self.moments[self._rows(link)], self.ruleset.maps[rule.output]
        self.ruleset.rules[layer.name] = fit_output(rule, t, read, sides, seen)

    def _finish(self) -> None:
        recipe = self.recipe
        first, behind = self._completed(self._first), self._completed(self.behind)
        if self.wants_together:  # few token types: lean on deeper spaces where the first says nothing
            self._complete()
        self.together = None
        for own, layer in self.pairs.layers(None):
            if recipe.head == "move" and self.needs([layer], ()) <= self.seen:
                rule = Rule(own.name, "final", "identity", self._whitened)
                if recipe.scale == "regression":
                    rule = fit_input(rule, self.ruleset.maps["final"], self._read("final"))
                self.ruleset.rules[layer.name] = rule
        self._embedding_rules(behind)
        for own_norm, norm, name in self.pairs.unread(None):
            self._norm_vectors(own_norm, norm, first if name == "embedding" else name, residual=name == "embedding")

    def embeddings_now(self) -> None:
        if self.given:
            return
        self._embedding_rules(self.behind)
        for own_norm, norm, name in self.pairs.unread(None):
            if name == "embedding":
                self._norm_vectors(own_norm, norm, self._first, residual=True)

    def _embedding_rules(self, behind: str) -> None:
        """Rules of the embeddings through the map ``behind`` them."""
        recipe, source, target = self.recipe, self.pairs.source, self.pairs.target
        token = target.family.embedding("token")
        if token and target.tied and self._layer_norm and behind in self.ruleset.maps:
            # a head reads the mean too: mean goes to mean
            polar_map = self.ruleset.maps[behind](torch.eye(source.width, dtype=torch.float64))
            self.ruleset.put("token", maps.Dense(polar_map + 1 / math.sqrt(source.width * target.width)))
        for name, into in self.pairs.embeddings() if recipe.embeddings == "move" else ():
            if self.needs((), [into]) <= self.seen:
                output = "token" if token and into == token.name and "token" in self.ruleset.maps else behind
                self.ruleset.vectors[into] = Rule(name, "identity", output, 1.0, self._written("embedding.output"))

    def _complete(self) -> None:
        """Complete the first maps, and fit the inputs that waited for them."""
        behind_norms = {name for name, link in self.pairs.moments.items() if link.target.norm}
        if missing := behind_norms - self.seen:
            raise ValueError(f"the first map is completed from all spaces behind norms, {min(missing)} did not arrive")
        for name in sorted(self._starts()):
            z = self._z(name)
            polar = self.polar(z.cross, null="completed", toward=self.together)
            self.ruleset.add(f"{name}.completed", polar, z.count)
            for layer, rule in self.ruleset.rules.items():
                if self.recipe.scale == "regression" and rule.input == f"{name}.completed":
                    self.ruleset.rules[layer] = fit_input(rule, self.ruleset.maps[rule.input], z)

    def _norm_vectors(self, own: str, into: str, output: str, *, residual: bool = False) -> None:
        """Gain and bias that no linear layer can take up: of the final norm (where no head moves), of a norm whose
        output is the residual itself, and of norms inside the heads."""
        if not self.needs((), [f"{into}.weight"]) <= self.seen:
            return
        self.ruleset.vectors[f"{into}.weight"] = Rule(f"{own}.weight", "identity", output, kind="gain")
        self.ruleset.vectors[f"{into}.bias"] = (
            Rule(f"{own}.bias", "identity", output, 1.0, self._written("embedding.norm"))
            if residual
            else Rule(f"{own}.bias", "identity", output, 1.0, self._whitened, kind="shift")
        )


def _starts(pairs: Pairs, name: str) -> bool:
    """Whether a space is the residual's where nothing but embeddings wrote it."""
    return name == "embedding" or pairs.blocks[0] == 0
