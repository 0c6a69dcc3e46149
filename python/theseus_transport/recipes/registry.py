"""The recipes there are, by name: to add one, write its solver in a file beside this one and name it here."""

from __future__ import annotations

from .coherent import Coherent
from .effect import Effect
from .paper import Paper
from .solver import Solver

SOLVERS: dict[str, type[Solver]] = {
    "effect": Effect,
    "coherent": Coherent,
    "paper": Paper,
}
DEFAULT = "effect"
