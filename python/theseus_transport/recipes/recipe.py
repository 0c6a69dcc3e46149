"""A recipe: a frozen set of choices under a name, which says who carries them out.

``coherent``: every space has one map, scales included, gains folded into the layers that read them; exact where the
two bases are re-parametrisations of each other. ``paper``: every layer's own input and output, no scales
(arXiv 2602.12952). ``effect``: behind one of these, or nothing, the layers that write the residual are fitted to the
effect that the tune had.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..errors import InputRefused
from ..linalg.procrustes import FLOOR, FLOOR_DOUBLE
from .choices import RecipeChoices
from .registry import DEFAULT, SOLVERS
from .solver import Solver

ALIGNS = {"center": "uncentred activations", "whiten_power": "features as they are"}  # without the choice
FITTING = "prior", "writers", "ridge", "last", "fit"  # choices of recipes that fit


@dataclass(frozen=True)
class Recipe(RecipeChoices):
    """Choices whose name stands in the registry, and which its solver takes; :class:`RecipeChoices` explains each.

    Raises:
        InputRefused: a choice is none, or belongs to another recipe.
    """

    name: str = DEFAULT

    def __post_init__(self) -> None:
        if self.name not in (names := list(SOLVERS)):
            raise InputRefused(f"recipe name is {self.name!r}; choose one of {', '.join(names)}")
        super().__post_init__()
        if not self.solver.fits:
            given = [name for name in FITTING if getattr(self, name) != getattr(RecipeChoices(DEFAULT), name)]
            if given:
                others = " or ".join(name for name, solver in SOLVERS.items() if solver.fits)
                raise InputRefused(f"{given[0]} belongs to the {others} recipe; {self.name} fits nothing")
        for choice, aligned in ALIGNS.items() if not self.solver.whitens else ():
            if getattr(self, choice):
                others = " or ".join(name for name, solver in SOLVERS.items() if solver.whitens)
                raise InputRefused(f"{choice} belongs to the {others} recipe; {self.name} aligns {aligned}")

    @classmethod
    def named(cls, recipe: str | Recipe, **options: object) -> Recipe:
        """A recipe by name with options, or a recipe with options replaced."""
        base = recipe if isinstance(recipe, Recipe) else cls(name=recipe)
        return replace(base, **options)  # type: ignore[arg-type]

    def in_float64(self) -> Recipe:
        """The recipe for two models that compute in float64: the default floor then lies at their rounding."""
        return replace(self, floor=FLOOR_DOUBLE) if self.floor == FLOOR else self

    @property
    def solver(self) -> type[Solver]:
        """What carries the recipe out, and tells what it will need and make."""
        return SOLVERS[self.name].under(self)

    @property
    def fits(self) -> bool:
        """Whether layers that write the residual are fitted to the effect."""
        return self.solver.fits and self.fit

    @property
    def moves_embeddings(self) -> bool:
        return self.solver.moves_embeddings and self.embeddings == "move"
