"""The choices a recipe is made of, field by field."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Literal, get_args, get_origin, get_type_hints

from ..errors import InputRefused
from ..linalg.procrustes import FLOOR, Null


@dataclass(frozen=True)
class RecipeChoices:
    """What a solver is told, each choice checked by itself; a :class:`~.recipe.Recipe` is these under a known name.

    Attributes:
        name: ``effect``, ``coherent`` or ``paper``.
        null: what fills directions the data does not determine: ``partial`` leaves them out, ``completed`` aligns them
            by all depths together, ``svd`` keeps what LAPACK's rounding left there.
        floor: share of the largest singular value below which a direction is undetermined.
        scale: ``norm`` scales by the ratio of energies, ``regression`` by least squares, forward at a layer's output
            and backward at its input, ``none`` does not (``paper`` never does).
        heads: ``pair`` maps head by head, ``dense`` has one map for all of a block's context (plain heads only; exact
            no longer where heads were copied or scaled one by one).
        embeddings, head: ``move`` or ``leave`` (``paper`` always leaves embeddings).
        completion: ``deeper`` completes the first map from deeper spaces where few token types leave it rank-poor.
        center: remove means before aligning (``paper`` only).
        whiten_power: of partial whitening, 0 (none) to 0.5 (whole), ``paper`` only; it costs two more moments a space.
        whiten_eps: smallest eigenvalue to divide by when whitening, in units of sums of squares.
        prior: what moves the update through maps before the effect is fitted (``effect`` only): ``coherent`` or
            ``paper`` as these recipes do, ``none`` nothing; ``auto`` is ``coherent`` where the first blocks' maps hold
            on held-out rows, else ``none``.
        writers: the layers that are fitted (``effect`` only): those that write the residual, attention ``output`` and
            MLP ``contract``, or ``contract`` alone, which takes half of the work.
        ridge: weight of the fit's penalty on the update (``effect`` only), in units of the mean energy of what the
            layer reads; 0 chooses it by the error on a quarter of the samples, no update at all among the choices.
        last: what is wanted behind the last block (``effect`` only), where both models share a vocabulary: ``heads``
            what changes the target's predictions as the source's change, ``residual`` what the map says, as elsewhere.
        fit: fit the effect (``effect`` only); without it the prior alone moves.
    """

    name: str
    null: Null = "partial"
    floor: float = FLOOR
    scale: Literal["norm", "regression", "none"] = "norm"
    heads: Literal["pair", "dense"] = "pair"
    embeddings: Literal["move", "leave"] = "move"
    head: Literal["move", "leave"] = "move"
    completion: Literal["deeper", "none"] = "deeper"
    center: bool = False
    whiten_power: float = 0.0
    whiten_eps: float = 1e-6
    prior: Literal["auto", "coherent", "paper", "none"] = "auto"
    writers: Literal["output,contract", "contract"] = "output,contract"
    ridge: float = 1e-2
    last: Literal["heads", "residual"] = "heads"
    fit: bool = True

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                raise InputRefused(f"recipe {name} is {value!r}; choose one of {', '.join(choices)}")
        for name in ("floor", "whiten_power", "whiten_eps", "ridge"):
            if isinstance(value := getattr(self, name), bool) or not isinstance(value, Real):
                raise InputRefused(f"{name} is {value!r}; give a number")
        for name in ("center", "fit"):
            if not isinstance(value := getattr(self, name), bool):
                raise InputRefused(f"{name} is {value!r}; give True or False")
        if not 0 <= self.floor < 1:
            raise InputRefused(f"floor is {self.floor}; it must be at least 0 and below 1 (default {FLOOR:g})")
        if not 0 <= self.whiten_power <= 0.5:
            raise InputRefused(f"whiten_power is {self.whiten_power}; it must be between 0 (none) and 0.5 (whole)")
        if not 0 <= self.ridge < math.inf:
            raise InputRefused(f"ridge is {self.ridge}; it must be above 0, or 0 to choose it on held-out samples")
        if not 0 < self.whiten_eps < math.inf:
            raise InputRefused(f"whiten_eps is {self.whiten_eps}; it must be above 0 (default 1e-6)")


CHOICES = {
    name: get_args(kind)
    for name, kind in get_type_hints(RecipeChoices).items()
    if get_origin(kind) is Literal  # of strings
}
