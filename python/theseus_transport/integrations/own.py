"""The maps of ``paper`` for any module: of every tensor, from what its own module reads and writes."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Set
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..activations.moments import CrossMoment, Grams
from ..linalg.procrustes import procrustes
from ..recipes.maps import Dense, Factored, Map
from ..recipes.paper import comparable
from ..recipes.recipe import Recipe
from .taps import Tap, Taps

log = logging.getLogger(__name__)
LEFT = ("class_embedding", "positional_embedding", "conv1.weight")  # the paper leaves embeddings
FUSED = ("in_proj_weight", "in_proj_bias")


@dataclass(frozen=True)
class Place:
    """Where a tensor's maps come from.

    Attributes:
        reads: what its input features are, or None for a vector.
        writes: what its output features are; several where it keeps several layers.
        transposed: it is kept [in, out].
    """

    reads: Tap | None
    writes: tuple[Tap, ...]
    transposed: bool = False

    @property
    def taps(self) -> tuple[Tap, ...]:
        return self.writes if self.reads is None else (self.reads, *self.writes)


def place(name: str, ndim: int, opened: Set[str] = frozenset()) -> Place | None:
    """The place of the tensor of that name within its scope, or None where the tensor stays.

    Args:
        opened: names of attentions whose fused q, k, v is a module ``in_proj`` of theirs.
    """
    module, _, parameter = name.rpartition(".")
    if name in LEFT or ndim not in (1, 2):
        return None
    if name == "proj" and ndim == 2:  # OpenCLIP's, read behind the last norm; its output leaves the tower
        return Place(Tap("ln_post", "out"), (Tap("", "out"),), transposed=True)
    parts = 1
    if module in opened and parameter in FUSED:
        module, parts = f"{module}.in_proj", 3
    reads = Tap(module, "in") if ndim == 2 else None
    return Place(reads, tuple(Tap(module, "out", i, parts) for i in range(parts)))


@dataclass(frozen=True)
class OwnMaps:
    """Maps by tap, and sizes (source, target) of the features they map."""

    maps: Mapping[Tap, Map]
    sizes: Mapping[Tap, tuple[int, int]]
    opened: Set[str]

    @classmethod
    def of(cls, taps: Taps, scopes: tuple[nn.Module, nn.Module], recipe: Recipe, opened: Set[str]) -> OwnMaps:
        """The maps of every tap that was seen in both models."""
        modules = [dict(scope.named_modules()) for scope in scopes]
        maps: dict[Tap, Map] = {}
        for tap, moment in taps.moments.items():
            bases = None
            if tap.side == "out" and tap.parts == 1 and recipe.null != "svd":
                bases = _bases(*(found[tap.module] for found in modules))
            maps[tap] = own_map(moment, taps.grams.get(tap), bases, recipe)
        return cls(maps, {tap: tuple(m.cross.shape) for tap, m in taps.moments.items()}, opened)  # type: ignore[misc]

    def move(self, delta: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The delta moved to the target, by name within the scope; a tensor that stays is missing.

        Args:
            delta: tensors of the source; target: the target's tensors of the same names.
        """
        moved, unmoved = {}, []
        for name, change in delta.items():
            found = place(name, change.ndim, self.opened)
            value = self._move(found, change, target[name]) if found else None
            if value is not None:
                moved[name] = value
            elif name not in LEFT:
                unmoved.append(name)
        if unmoved:
            log.warning("%d tensors have no maps and stay zero, first %s", len(unmoved), ", ".join(unmoved[:5]))
        return moved

    def _move(self, where: Place, change: Tensor, target: Tensor) -> Tensor | None:
        """T_out^T change T_in in float64, or None where the maps do not fit."""
        kept = [t.mT if where.transposed else t for t in (change.detach().to("cpu", torch.float64), target)]
        source, into = (t.chunk(len(where.writes)) for t in kept)
        if change.ndim != target.ndim or not len(source) == len(into) == len(where.writes):
            return None
        parts = []
        for tap, part, other in zip(where.writes, source, into, strict=True):
            features = [tap] if where.reads is None else [tap, where.reads]
            if [self.sizes.get(t) for t in features] != list(zip(part.shape, other.shape, strict=True)):
                return None
            if where.reads is not None:
                part = self.maps[where.reads](part)
            parts.append(self.maps[tap](part.T).T if part.ndim == 2 else self.maps[tap](part))
        return torch.cat(parts).mT if where.transposed else torch.cat(parts)


def own_map(moment: CrossMoment, grams: Grams | None, bases: tuple[Tensor, Tensor] | None, recipe: Recipe) -> Map:
    """The polar factor of what was observed, in float32 as the reference rounds it.

    Args:
        grams: of both sides, to whiten with.
        bases: orthonormal [d_S, k_S] and [d_T, k_T] that span all the activations can be; the map is then theirs.
    """
    if bases is None:
        return Dense(_polar(moment, grams, recipe).float().cpu())
    q_s, q_t = (basis.to(moment.cross) for basis in bases)
    s, t = (torch.cat([q.T, q.new_zeros(q.shape[1], 1)], 1) for q in (q_s, q_t))  # coordinates: [W b] with b = 0
    own = grams and {0: grams[0].derive(s, s), 1: grams[1].derive(t, t)}
    return Factored((q_s @ _polar(moment.derive(s, t), own, recipe)).float().cpu(), q_t.T.float().cpu())


def _polar(moment: CrossMoment, grams: Grams | None, recipe: Recipe) -> Tensor:
    return procrustes(comparable(moment, grams, recipe), null=recipe.null, floor=recipe.floor).map


def _bases(source: nn.Module, target: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Where two linear layers expand (out > in + 1): orthonormal bases of their outputs, from [W b]."""
    bases = []
    for module in (source, target):
        if type(module) is not nn.Linear or module.out_features <= module.in_features + 1:
            return None
        bias = module.weight.new_zeros(module.out_features) if module.bias is None else module.bias
        augmented = torch.cat([module.weight, bias[:, None]], 1).detach()
        bases.append(torch.linalg.qr(augmented.double())[0])
    return bases[0], bases[1]
