"""What a transport yields: the target's delta, lazily by name, and the fate of every tensor."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import InputRefused, NumericalError
from ..files.checkpoint import count_nonfinite
from ..models.base import Base
from ..models.family import Family
from ..models.tensors import chunks_of_rows, dtype_of, growing, row_tiles, rows_of, shape_of
from ..recipes.effect import FIT
from .adapter import PREFIX
from .arguments import check_number
from .available import Available
from .coverage import GUESSED, TIES
from .delta import Delta, Renamed
from .fates import Computation, MovedFactors, TensorFate
from .fits import Fits
from .layer_moves import Carried

log = logging.getLogger(__name__)


@dataclass
class ComputedUpdate(Mapping[str, Tensor]):
    """The update of the target, as a lazy mapping: the target's parameter name -> dense delta, alpha included.

    Values are computed when asked for, in float64 on the device of the bases, and handed out on the CPU in float32
    (float64 where the target is float64); large tables tile by tile of rows. Where changes are presumed, names are
    those not yet known to stay.

    Attributes:
        coverage: fate of every tensor of the source's update; of presumed changes final once :meth:`settled`.
        factors: for a LoRA, the layer as an adapter of the target spells it -> its moved factors, alpha not included.
        moved: canonical name of every tensor of the source that moves -> that of the target's it becomes.
        available: the rules and maps it is computed with.
        tuned: the tuned tensors that may move, by canonical name.
        presumed: of these, what counts as changed without having been compared.
        unchanged: what was presumed to have changed, and turned out to be the base's.
        new: canonical names, in the target, of a head new in the tune: it moves whole and replaces the target's.
        shared: a head as an adapter names it -> the target's tensor it is kept in, where both tie it.
        apart: canonical names of the source's tensors that stay because the target ties its head to the embedding.
        lone: the embedding of a tune whose head is not it, where the target ties the two.
        dense: it is to become the target's own tensors.
        fits: of layers that are fitted.
        one_tokenizer: rows of one index mean the same token in both vocabularies, though their numbers differ.
        left: whether a canonical tensor of the source is left behind on request.
        carried_apart: of a LoRA on a head that the target ties: layer of the source -> its name in :attr:`factors`.
    """

    source: Base
    target: Base
    delta: Delta
    alpha: float
    available: Available = field(default_factory=Available)
    coverage: list[TensorFate] = field(default_factory=list)
    factors: dict[str, MovedFactors] = field(default_factory=dict)
    moved: dict[str, str] = field(default_factory=dict)
    tuned: Renamed = field(default_factory=lambda: Renamed({}, {}))
    presumed: set[str] = field(default_factory=set)
    unchanged: set[str] = field(default_factory=set)
    new: set[str] = field(default_factory=set)
    shared: dict[str, str] = field(default_factory=dict)
    apart: set[str] = field(default_factory=set)
    carried_apart: dict[str, str] = field(default_factory=dict)
    lone: str = ""
    dense: bool = False
    said: list[str] = field(default_factory=list)
    carried: Carried = field(default_factory=Carried)
    fits: Fits = field(default_factory=Fits)
    left: Callable[[str], bool] = lambda name: False
    one_tokenizer: bool = False
    _computations: dict[str, dict[str, Computation]] = field(
        default_factory=dict
    )  # stored name -> canonical name -> computation
    _last: dict[tuple[Computation, int | None], dict[str, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_number(self.alpha)

    @property
    def warnings(self) -> list[str]:
        """What the user should know about single tensors; complete once every value was read."""
        tied = sorted(self.apart - self.unchanged)
        told = [f"{name}: {TIES}, so the tune's own head stays behind; an untied target takes it" for name in tied]
        dense = self.dense or self.delta.adapter is None
        if dense and self.lone in self.moved.keys() - self.unchanged and not tied:
            told = [f"{self.lone}: {TIES}, so the head moves with it; that of the tune did not"]
        return [*self.said, *told, *self.carried.warnings()]

    @property
    def planned(self) -> list[str]:
        """Stored names of all that was planned to move, whatever comparing finds."""
        return list(self._computations)

    def plan(self, name: str, computation: Computation) -> None:
        """Have ``computation`` compute the canonical tensor ``name`` (and maybe others)."""
        self._computations.setdefault(self.target.slots[name].stored, {})[name] = computation

    def leave(self, name: str) -> None:
        """Have the canonical tensor ``name`` of the target stay as it is."""
        stored = self.target.slots[name].stored
        del self._computations[stored][name]
        if not self._computations[stored]:
            del self._computations[stored]

    @property
    def into(self) -> set[str]:
        """Canonical names of the target's tensors that are planned to move."""
        return {part for computations in self._computations.values() for part in computations}

    def computations(self, name: str) -> dict[str, Computation]:
        """Canonical name -> computation of what moves in a stored tensor, or in one an adapter saves (PEFT's name)."""
        stored = name.removeprefix(PREFIX)
        computations = self._computations.get(self.shared.get(stored, stored), {})
        return {
            part: computation for part, computation in computations.items() if not computation.sources <= self.unchanged
        }

    def needs(self, name: str) -> frozenset[str]:
        """Keys of the alignment's rules and vectors that a stored tensor, or a factor of an adapter, waits for."""
        if factors := self._factors_of(name):
            return factors.needs
        return frozenset().union(*(computation.needs for computation in self.computations(name).values()))

    def _factors_of(self, name: str) -> MovedFactors | None:
        factor = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_[AB]\.weight", name)
        return self.factors.get(factor[1]) if factor else None

    def ready(self, key: str) -> bool:
        """Whether a rule is there with both its maps, or a fit was made where it had to be."""
        fitted = key.removesuffix(FIT)
        return fitted in self.fits.done if fitted != key else self.available.ready(key)

    def stored_in(self, layer: str) -> set[str]:
        """Stored names of the target's tensors of a layer."""
        slots = self.target.slots
        return {slots[name].stored for part in ("weight", "bias") if (name := f"{layer}.{part}") in slots}

    def there(self, name: str) -> bool:
        """Whether a stored tensor of the target moves, and what maps need for it is there; a fit may be to come."""
        return name in self and all(self.ready(key) for key in self.needs(name) if not key.endswith(FIT))

    def sources(self, name: str) -> frozenset[str]:
        """Canonical names of the source that decide whether a stored tensor moves, or that factors are made of."""
        if factors := self._factors_of(name):
            return factors.sources
        return frozenset().union(*(computation.sources for computation in self.computations(name).values()))

    def tiles(self, name: str) -> tuple[slice, ...]:
        """The rows in which a stored tensor of the target is computed, or copied; none: in one piece."""
        shape = shape_of(self.target.tensors, name)
        if computations := self._computations.get(name):
            return next(iter(computations.values())).tiles if len(shape) > 1 else ()
        return row_tiles(shape)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self:
            raise KeyError(name)
        if not (tiles := self.tiles(name)):
            return self._value(name, None)
        value = torch.empty(shape_of(self.target.tensors, name), dtype=self.dtype(name))
        for rows in tiles:
            value[rows] = self._value(name, rows)
        return value

    def rows(self, name: str, rows: slice) -> Tensor:
        """One of a value's :meth:`tiles`."""
        if rows not in self.tiles(name):
            raise ValueError(f"{rows} is no tile of {name}; tiles gives them")
        return self._value(name, rows)

    def forget(self) -> None:
        """Free the layer computed last, which is kept for its bias and for other strengths."""
        self._last.clear()

    def _value(self, name: str, rows: slice | None) -> Tensor:
        """The update of a stored tensor; parts of a fused one that do not move are zero."""
        computations, (length, *width) = self.computations(name), shape_of(self.target.tensors, name)
        value = torch.zeros(rows.stop - rows.start if rows else length, *width, dtype=self.dtype(name))
        wanted = {_key(computation, rows) for computation in computations.values()}
        for key in self._last.keys() - wanted:  # weight and bias of a layer, and all strengths, come one after another
            del self._last[key]
        for part, computation in computations.items():
            place, moved = self.target.slots[part].view(value), self._moved(part, computation, rows)
            if moved.shape != place.shape:
                raise InputRefused(f"the update of {name} is {list(moved.shape)}, the target's is {list(place.shape)}")
            for into, piece in zip(chunks_of_rows(place), chunks_of_rows(moved), strict=True):
                strength = 1.0 if part in self.new else self.alpha
                into.copy_((piece * strength).to(into.dtype))  # converted before it leaves the device
        if any(count_nonfinite(value)):
            told = f"the update of {name} holds NaN or Inf in {value.dtype} at alpha {self.alpha:g}"
            raise NumericalError(f"{told}; a smaller --alpha avoids overflow, else check the tuned model")
        return value

    def _moved(self, part: str, computation: Computation, rows: slice | None) -> Tensor:
        if rows is None and computation.tiles:  # the bias of a layer whose weight is made by tiles
            return torch.cat([computation.compute(tile)[part] for tile in computation.tiles])
        key = _key(computation, rows)
        if key not in self._last:
            self._last[key] = computation.compute(rows)
        return self._last[key][part]

    def compare(self, names: Iterable[str]) -> None:
        """Compare those of the presumed changes with their base; a large table up to its first rows that differ."""
        for name in sorted(self.presumed.intersection(names)):
            if self.same(name):
                self.unchanged.add(name)
            self.presumed.discard(name)

    def same(self, name: str) -> bool:
        """Whether a tuned tensor is its base; of what differs early, little is read."""
        turned = self.source.slots[name].transposed or self.tuned.slots[name].transposed
        for rows in [None] if turned else growing(self.source.shape(name)):
            before, after = self.source.get(name, rows), rows_of(self.tuned, name, rows)
            if before is None or not torch.equal(before.to(after), after):
                return False
        return True

    def settled(self) -> list[TensorFate]:
        """The final coverage, once all is compared; what was not is compared now.

        Raises:
            InputRefused: nothing moves.
        """
        self.compare(set(self.presumed))
        for name in list(self._computations):
            self._computations[name] = self.computations(name)
            if not self._computations[name]:
                del self._computations[name]
        into = self.into
        for name in [name for name, part in self.moved.items() if part not in into]:
            del self.moved[name]
        same = self.unchanged
        fates = [
            TensorFate(told.tensor, "unchanged") if told.tensor in same else self.fits.settled(told, self.moved)
            for told in self.coverage
        ]
        self.coverage[:] = fates
        reasons = sorted({told.note for told in fates if told.fate == "left"})
        if not (self._computations or self.carried_apart or any(reason.endswith(GUESSED) for reason in reasons)):
            left = f"every changed tensor was left behind ({'; '.join(reasons)})"
            what = left if reasons else "no tensor differs from the base"
            what += ", and no fit helps on samples it has not seen (fixed by --ridge 1e-2)" if self.fits.done else ""
            raise InputRefused(f"nothing to transport: {what}; was the right base given?")
        return fates

    def state(self) -> dict[str, Any]:
        """What was found out so far, as JSON; :meth:`restore` takes it up in another process."""
        known = {"presumed": sorted(self.presumed), "unchanged": sorted(self.unchanged)}
        carried = {layer: dict(sums) for layer, sums in self.carried.sums.items()}
        return {**known, "carried": carried, "fits": self.fits.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        for known, names in ((self.presumed, state["presumed"]), (self.unchanged, state["unchanged"])):
            known.clear()
            known.update(names)
        self.carried.sums.clear()
        self.carried.sums.update(state["carried"])
        self.fits.restore(state["fits"])

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a stored tensor's update: float64 where the target's is float64, else float32."""
        return torch.float64 if dtype_of(self.target.tensors, name) == torch.float64 else torch.float32

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._computations and bool(self.computations(name))

    def __iter__(self) -> Iterator[str]:
        return iter([name for name in self._computations if self.computations(name)])

    def __len__(self) -> int:
        return len(list(iter(self)))

    def as_tensors(self) -> ComputedUpdate:
        """This update, as one of the target's own tensors: without what only an adapter carries beside them."""
        self.dense, lost, self.carried_apart = True, self.carried_apart, {}
        self.fits.planned = dict.fromkeys(self.fits.planned)  # of full rank
        self.apart |= lost.keys()
        self.factors = {name: factors for name, factors in self.factors.items() if name not in lost.values()}
        self.coverage[:] = [TensorFate(r.tensor, "left", TIES) if r.tensor in lost else r for r in self.coverage]
        if lost:
            self.settled()
        return self

    @property
    def source_family(self) -> Family:
        return self.source.geometry.family

    @property
    def family(self) -> Family:
        return self.target.geometry.family


def _key(computation: Computation, rows: slice | None) -> tuple[Computation, int | None]:
    """What tells results apart that are kept: a tile's first row stands for the slice, which is no key of a dict."""
    return computation, None if rows is None else rows.start
