"""What fits made of layers that write the residual: the whole update of such a layer, in place of what maps moved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from ..linalg.ridge import Fit, Normal, low_rank
from ..recipes.effect import fit_of
from ..shown import percent
from .adapter import Factors
from .coverage import ADDED
from .fates import Computation, TensorFate

ROUNDING = 1e-9  # of a share that is 1


class Dense(Protocol):
    """The update of one layer of the target, what the prior moved included."""

    def dense(self, layer: str, rows: slice | None = None) -> dict[str, Tensor]:
        """Canonical name -> the update of a tensor of ``layer``, of ``rows`` alone where given."""


@dataclass(frozen=True)
class Fitted:
    """The update of one layer of the target, what the prior moved included, in float64.

    Attributes:
        weight: [out, in]; None where it is factors.
        bias: [out], where the layer's bias was fitted too.
        factors: of an adapter.
    """

    weight: Tensor | None = None
    bias: Tensor | None = None
    factors: Factors | None = None

    def dense(self, layer: str, rows: slice | None = None) -> dict[str, Tensor]:
        """Canonical name -> the update of a tensor of ``layer``, of ``rows`` alone where given."""
        if self.factors is not None:
            b = self.factors.b if rows is None else self.factors.b[rows]
            return {f"{layer}.weight": (b @ self.factors.a).mul_(self.factors.scaling)}
        assert self.weight is not None
        found = {"weight": self.weight} | ({} if self.bias is None else {"bias": self.bias})
        return {f"{layer}.{part}": value if rows is None else value[rows] for part, value in found.items()}


@dataclass(frozen=True)
class AsFactors:
    """How a fitted layer becomes factors of an adapter.

    Attributes:
        rank, scaling: of them.
        wider: what the prior moves has more directions, so that it is cut even where nothing is missing.
    """

    rank: int
    scaling: float
    wider: bool


@dataclass
class Fits:
    """The fits of one update: what is planned, what is there now, and what is told of all.

    Attributes:
        planned: canonical names of the layers of the target that may be fitted -> the factors an adapter gets; None: it
            becomes a tensor of the target.
        made: layer -> its fit, while it is needed.
        heads: heads that may be fitted -> what maps move of them.
        done: layers that were reached, whether or not anything was missing there.
        share: layer -> share of its update's norm that came from the fit, of those that were fitted.
        kept: layer -> share of its update that is left at the rank of its factors: of the effect where it was fitted,
            |X dW^T|^2 + lambda |dW|^2, else of the squared norm.
        rank: of factors, as it was asked for, if it was.
        sources: canonical names of the source's tensors that move through fits alone.
        feeds: layer of the source -> the layer of the target that is fitted in its place.
    """

    planned: dict[str, AsFactors | None] = field(default_factory=dict)
    made: dict[str, Dense] = field(default_factory=dict)
    heads: dict[str, Computation] = field(default_factory=dict)
    done: set[str] = field(default_factory=set)
    share: dict[str, float] = field(default_factory=dict)
    kept: dict[str, float] = field(default_factory=dict)
    rank: int | None = None
    sources: set[str] = field(default_factory=set)
    feeds: dict[str, str] = field(default_factory=dict)

    def state(self) -> dict[str, Any]:
        """What is told, as JSON; fits themselves are used up within a visit."""
        return {"done": sorted(self.done), "share": self.share, "kept": self.kept}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.done, self.share, self.kept = set(state["done"]), dict(state["share"]), dict(state["kept"])

    def told(self) -> dict[str, dict[str, float]]:
        """What people should know of all fits and cuts: by layer of the target."""
        return {"share": dict(self.share), "kept": dict(self.kept)}

    def settled(self, row: TensorFate, moved: Mapping[str, str]) -> TensorFate:
        """A fate with what is known of the layer of the target that the tensor is, or moves into.

        Args:
            moved: tensor of the source -> that of the target it becomes through maps.
        """
        if row.fate not in ("transported", "fitted") or row.tensor.endswith(".bias"):
            return row
        own = row.tensor.removesuffix(".weight")
        layer = moved.get(f"{own}.weight", "").removesuffix(".weight") or self.feeds.get(own, "")
        if row.note.startswith(ADDED):
            layer = own
            if layer in self.done - self.share.keys():
                return TensorFate(row.tensor, "unchanged", "nothing was missing behind it that a fit could make up for")
        share, kept = self.share.get(layer, 0.0), self.kept.get(layer, 1.0)
        known = {
            f"{percent(share)} of it fitted": share > 0 and row.fate == "transported",
            f"its rank keeps {percent(kept)}": kept < 1 - ROUNDING,
        }
        said = [words for words, true in known.items() if true and words not in row.note]
        return TensorFate(row.tensor, row.fate, "; ".join(filter(None, (row.note, *said))))

    def reached(self, layers: Iterable[str]) -> set[str]:
        """Layers are done with; returns the keys of those where nothing was missing."""
        self.done |= (names := set(layers))
        return {fit_of(name) for name in names - self.share.keys()}

    def put(self, layer: str, prior: Mapping[str, Tensor], fit: Fit, normal: Normal, rho: float) -> None:
        """Add a fit to what the prior moved of a layer, and cut the sum to the rank that an adapter gets.

        Args:
            prior: ``weight`` [out, in] and ``bias`` [out], as far as these move.
            normal, rho: what the fit was made from.
        """
        weight, moved = fit.weight, prior.get("weight")
        size, before = float(weight.norm()), 0.0 if moved is None else float(moved.norm())
        self.share[layer] = size / (size + before) if size else 0.0
        total = weight if moved is None else weight + moved.to(weight)
        if (how := self.planned[layer]) is not None:
            a, b, self.kept[layer] = low_rank(total, normal, rho, how.rank, bias=False)
            self.made[layer] = Fitted(factors=Factors(a, b / how.scaling, how.scaling))
            return
        bias = None if fit.bias is None else fit.bias + (0 if prior.get("bias") is None else prior["bias"].to(fit.bias))
        self.made[layer] = Fitted(total, bias)
