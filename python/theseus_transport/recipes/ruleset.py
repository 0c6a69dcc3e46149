"""What a recipe decides: maps by name, the rule of every layer and vector, and what is told of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ..linalg.procrustes import Polar
from . import maps
from .head_pairing import HeadPairing
from .maps import Map


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
        """The ruleset as JSON and tensors; :meth:`restored` reads them."""
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
