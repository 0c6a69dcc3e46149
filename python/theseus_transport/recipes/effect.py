"""The ``effect`` recipe: the layers that write the residual are fitted to the effect that the tune had on the source.

For a target block: the prior moves the block's part of the update through maps, if it is to; then each writer is fitted
to what is missing of the effect at its write point, the residual right behind it, block after block, each fit seeing
what the fits before it did. Here stand what the maps have to be; `streaming/streams.py` runs the models and fits.

Exact where the prior is: nothing is missing there.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Iterable

from ..activations.links import Pairs
from ..models.geometry import Layer
from .choices import RecipeChoices
from .coherent import Coherent
from .maps import PlannedMap
from .paper import Paper
from .solver import Solver, Widths

FIT = ".fit"  # ends the key that stands for the fit of a layer, beside keys of rules
PRIORS = "auto", "coherent", "paper", "none"


def fit_of(layer: str) -> str:
    """The key of a layer's fit, where keys of rules and vectors are wanted."""
    return layer + FIT


def writers(recipe: RecipeChoices, layers: Iterable[Layer]) -> list[Layer]:
    """Of a target's layers those that are fitted."""
    return [layer for layer in layers if layer.role in recipe.writers.split(",")] if recipe.fit else []


def write_point(pairs: Pairs, layer: Layer) -> str | None:
    """The link whose map is that of the residual behind a writer; None in a block that no block of the source feeds."""
    if layer.role == "head":
        return "final"
    if pairs.blocks[layer.block] is None:
        return None
    return f"{layer.block}.mlp" if layer.role == "output" else pairs.after(layer.block)


class _Fitting(Solver, ABC):
    """What fits need beside what the prior needs."""

    fits = True

    def needs(self, layers: Iterable[Layer], vectors: Iterable[str]) -> set[str]:
        keys = {key.removesuffix(FIT) for key in vectors if key.endswith(FIT)}
        fitted = [layer for layer in self.pairs.target.layers() if layer.name in keys]
        found = super().needs(layers, [key for key in vectors if not key.endswith(FIT)])  # type: ignore[safe-super]
        points = {write_point(self.pairs, layer) or self.behind for layer in fitted}
        return self.with_class_rows(found | points | ({self.behind} if fitted else set()))


class AfterCoherent(_Fitting, Coherent):
    """Behind the recipe ``coherent``."""


class AfterPaper(_Fitting, Paper):
    """Behind the recipe ``paper``."""


class Effect(_Fitting, Coherent):
    """The recipe at work, with nothing moved through maps but embeddings and heads, which correspond row by row.

    Of the two models only the residual has to correspond: heads, neurons, gates and norms may be of any kind.
    """

    alone = True

    @classmethod
    def under(cls, recipe: RecipeChoices) -> type[Solver]:
        found: dict[str, type[Solver]] = {"coherent": AfterCoherent, "paper": AfterPaper}
        return found.get(recipe.prior, cls)

    @classmethod
    def planned_maps(cls, pairs: Pairs, recipe: RecipeChoices) -> list[PlannedMap]:
        residual = {name for name, link in pairs.moments.items() if link.target.norm} | {"token"}
        return [planned for planned in super().planned_maps(pairs, recipe) if _link_of(planned[0]) in residual]

    @classmethod
    def decompositions(cls, pairs: Pairs, recipe: RecipeChoices) -> list[tuple[str, Widths]]:
        links = {**pairs.moments, **pairs.class_rows}
        return [(name, link.widths) for name, link in links.items() if link.target.norm]

    @classmethod
    def gram_sides(cls, pairs: Pairs, recipe: RecipeChoices, links: Iterable[str]) -> dict[str, tuple[int, ...]]:
        return {}

    @property
    def every(self) -> set[str]:
        outside = {name for name in self.pairs.energies if name.startswith("embedding")}
        return outside | {name for name, link in self.links.items() if link.target.norm}

    def _layer_needs(self, layer: Layer) -> set[str]:
        return {"final"} if layer.role == "head" else set()

    def _block(self, b: int) -> None:
        """Nothing of a block moves through maps."""


def _link_of(planned: str) -> str:
    return planned.rpartition("/")[0].removesuffix(".completed")
