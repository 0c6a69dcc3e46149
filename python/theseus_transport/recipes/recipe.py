"""Which map and which scale each layer gets, from moments and energies: the recipes, field by field.

``coherent``: every space has one map, scales included, gains folded into the layers that read them; exact where the
two bases are re-parametrisations of each other. ``paper``: every layer's own input and output, no scales
(arXiv 2602.12952).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from numbers import Real
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from ..errors import InputRefused
from ..linalg.procrustes import FLOOR, FLOOR_DOUBLE, Null, Polar
from ..models.geometry import Geometry
from . import maps
from .head_pairing import HeadPairing
from .maps import Map


@dataclass(frozen=True)
class Recipe:
    """A frozen set of choices.

    Attributes:
        name: ``coherent`` or ``paper``.
        null: what fills directions the data does not determine (see :func:`procrustes`).
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
    """

    name: Literal["coherent", "paper"] = "coherent"
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

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                raise InputRefused(f"recipe {name} is {value!r}; choose one of {', '.join(choices)}")
        for name in ("floor", "whiten_power", "whiten_eps"):
            if isinstance(value := getattr(self, name), bool) or not isinstance(value, Real):
                raise InputRefused(f"{name} is {value!r}; give a number")
        if not isinstance(self.center, bool):
            raise InputRefused(f"center is {self.center!r}; give True or False")
        if not 0 <= self.floor < 1:
            raise InputRefused(f"floor is {self.floor}; it must be at least 0 and below 1 (default {FLOOR:g})")
        if not 0 <= self.whiten_power <= 0.5:
            raise InputRefused(f"whiten_power is {self.whiten_power}; it must be between 0 (none) and 0.5 (whole)")
        if not 0 < self.whiten_eps < math.inf:
            raise InputRefused(f"whiten_eps is {self.whiten_eps}; it must be above 0 (default 1e-6)")
        if self.center and self.name == "coherent":
            raise InputRefused("center belongs to the paper recipe; coherent aligns uncentred activations")
        if self.whiten_power and self.name == "coherent":
            raise InputRefused("whiten_power belongs to the paper recipe; coherent aligns features as they are")

    @classmethod
    def named(cls, recipe: str | Recipe, **options: object) -> Recipe:
        """A recipe by name with options, or a recipe with options replaced."""
        base = recipe if isinstance(recipe, Recipe) else cls(name=recipe)  # type: ignore[arg-type]
        return replace(base, **options)  # type: ignore[arg-type]

    def in_float64(self) -> Recipe:
        """The recipe for two models that compute in float64: the default floor then lies at their rounding."""
        return replace(self, floor=FLOOR_DOUBLE) if self.floor == FLOOR else self

    def grams(self, source: Geometry, target: Geometry, links: Iterable[str]) -> dict[str, tuple[int, ...]]:
        """Link -> the sides (0 the source) whose moment with themselves it needs: both to whiten with; of the target's
        context to tell how alike heads are that have to share a source head."""
        if self.whiten_power:
            return dict.fromkeys(links, (0, 1))
        share = self.name == "coherent" and self.heads == "pair" and target.outnumbers(source)
        return {name: (1,) for name in links if share and name.endswith(".context")}


CHOICES = {
    name: get_args(kind)
    for name, kind in get_type_hints(Recipe).items()
    if get_origin(kind) is Literal  # of strings
}


@dataclass(frozen=True)
class Rule:
    """How one layer's update moves: ``dW_T = s_out / s_in * T_out^T dW_S T_in``, ``db_T = s_out T_out^T db_S``.

    Attributes:
        source: canonical name, in the source, of the layer (or vector) that feeds this one.
        input, output: names of maps.
        fold: whether the norm in front, and a factor behind, are folded into the weight.
        kind: of a vector: ``linear`` moves as a row, ``gain`` and ``shift`` as a norm's own gain and bias.
    """

    source: str
    input: str
    output: str
    scale_in: float = 1.0
    scale_out: float = 1.0
    fold: bool = True
    kind: Literal["linear", "gain", "shift"] = "linear"


@dataclass(frozen=True)
class MapReport:
    """What is known of one map.

    Attributes:
        source, target: features of the two spaces.
        rank: directions that are determined; most: of so many, where heads are paired less than the spaces have.
        gap: smallest kept singular value over the largest.
        tokens: it was made from.
    """

    space: str
    source: int
    target: int
    rank: int
    most: int
    gap: float
    tokens: int

    @property
    def weak(self) -> bool:
        """Fewer than half of the directions are determined."""
        return self.rank < self.most / 2


@dataclass
class Ruleset:
    """What a recipe decides: maps by name, a rule per layer, maps of norms' own vectors, and what to report.

    Attributes:
        kinds: name -> class of every map that was made; a map itself may be deleted once nothing needs it.
    """

    maps: dict[str, Map] = field(default_factory=lambda: {"identity": maps.Identity()})
    rules: dict[str, Rule] = field(default_factory=dict)
    vectors: dict[str, Rule] = field(default_factory=dict)
    reports: list[MapReport] = field(default_factory=list)
    pairings: dict[int, HeadPairing] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=lambda: {"identity": "Identity"})

    def put(self, name: str, built: Map) -> None:
        self.maps[name], self.kinds[name] = built, type(built).__name__

    def add(self, name: str, polar: Polar, tokens: int, built: Map | None = None) -> None:
        """Put a map and report it.

        Args:
            built: what is put, where that is not the polar factor itself; of heads, one factor for each group.
        """
        made = built or maps.Dense(polar.map)
        self.put(name, made)
        source, target = polar.map.shape[-2:]
        ranks = polar.rank, torch.full_like(polar.rank, min(source, target))
        if isinstance(made, maps.Heads):
            source, target = made.heads * source, len(made.source_head) * target
        rank, most = (made.rank(r) if isinstance(made, maps.Heads) else int(r) for r in ranks)
        self.reports.append(MapReport(name, source, target, rank, most, float(polar.gap.min()), tokens))

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """As JSON and tensors; :meth:`restored` reads them."""
        tensors = {f"maps/{name}/{part}": t for name, m in self.maps.items() for part, t in m.tensors().items()}
        plain = {kind: {k: asdict(r) for k, r in getattr(self, kind).items()} for kind in ("rules", "vectors")}
        pairings = {str(b): p.plain() for b, p in self.pairings.items()}
        reports = [asdict(r) for r in self.reports]
        return {
            "maps": list(self.maps),
            "kinds": self.kinds,
            "reports": reports,
            "pairings": pairings,
            **plain,
        }, tensors

    @classmethod
    def restored(cls, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Ruleset:
        found = {}
        for name in state["maps"]:
            parts = maps.parts(kind := state["kinds"][name])
            found[name] = maps.from_tensors(kind, {part: tensors[f"maps/{name}/{part}"] for part in parts})
        rules, vectors = ({k: Rule(**r) for k, r in state[kind].items()} for kind in ("rules", "vectors"))
        reports = [MapReport(**r) for r in state["reports"]]
        pairings = {int(b): HeadPairing.restored(p) for b, p in state["pairings"].items()}
        return cls(found, rules, vectors, reports, pairings, dict(state["kinds"]))
