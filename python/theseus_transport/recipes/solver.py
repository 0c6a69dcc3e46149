"""A recipe at work: what it says of itself, and what all solvers share. Evidence in, block by block; maps out."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from ..activations.links import Blocks, Link, Pairs, block_of, of_class
from ..activations.moments import CrossMoment, Energy, Grams
from ..errors import InputRefused, NumericalError
from ..linalg.procrustes import ITERATE_FROM, Method, Polar, procrustes
from ..models.base import Base
from ..models.geometry import Geometry, Layer
from ..models.pair import Pair
from .choices import RecipeChoices
from .maps import PlannedMap
from .ruleset import Ruleset

log = logging.getLogger(__name__)
T = TypeVar("T")
Widths = tuple[int, int]  # of source and target
Rows = Pair[Tensor]  # as they pair
PARTS = [f.name for f in fields(CrossMoment) if f.name != "count"]


class Solver(ABC):
    """A recipe at work: maps and rules as evidence arrives, block by block, in the order of :attr:`Pairs.arrivals`.

    For every portion :meth:`add` what was seen; then :meth:`block`, where it is a block's; at the end :meth:`finish`.
    What never arrives yields no rule. A moment is held while something needs it.

    The class says, before anything is computed, what the recipe does; what it does not say it does not do.

    Attributes:
        folds: norms' gains and biases are folded into the layers that read them, and move by themselves only where
            more than linear layers reads them; else every norm's own vectors move as rows.
        moves_embeddings: embeddings move, where the recipe's choice is not to leave them.
        reads_energies: it wants the energies of :attr:`Pairs.energies`; reads_class_rows: and :attr:`Pairs.class_rows`.
        whitens: it takes the choices ``center`` and ``whiten_power``.
        fits: behind its maps the layers that write the residual are fitted to the effect of the tune.
        alone: nothing of a block moves through maps; only fits are made there.
        any_module: a layer's maps come from what that layer reads and writes alone, so that libraries get them for any
            module, of whatever family (:mod:`theseus_transport.integrations`).
        ruleset: filled as evidence arrives. Maps outside :attr:`keep` may be deleted from it.
        moments, energies, grams: what is held, by link.
        seen: names of all that arrived.
        ahead: the first target block whose rules are not made yet.
        given: all maps and rules were there to begin with; nothing arrives, nothing is made.
        method: of decompositions with a smaller side from ``ITERATE_FROM`` (see :func:`procrustes`).
    """

    folds: ClassVar[bool] = False
    moves_embeddings: ClassVar[bool] = False
    reads_energies: ClassVar[bool] = False
    reads_class_rows: ClassVar[bool] = False
    whitens: ClassVar[bool] = False
    any_module: ClassVar[bool] = False
    fits: ClassVar[bool] = False
    alone: ClassVar[bool] = False

    @classmethod
    def under(cls, recipe: RecipeChoices) -> type[Solver]:
        """The class that carries out a recipe of this name with these choices."""
        return cls

    @classmethod
    @abstractmethod
    def planned_maps(cls, pairs: Pairs, recipe: RecipeChoices) -> list[PlannedMap]:
        """All tensors that an alignment's maps may hold, from geometry and pairing alone, before any is made.

        Completed maps are among them wherever the recipe could complete one; few token types decide whether it does.
        """

    @classmethod
    @abstractmethod
    def decompositions(cls, pairs: Pairs, recipe: RecipeChoices) -> list[tuple[str, Widths]]:
        """(link, size) of every polar factor, with the link whose moment it is made of: what its time depends on."""

    @classmethod
    def gram_sides(cls, pairs: Pairs, recipe: RecipeChoices, links: Iterable[str]) -> dict[str, tuple[int, ...]]:
        """Link -> the sides, 0 the source, whose moment with themselves is wanted; of these ``links``."""
        return {}

    @classmethod
    def leans_on_depth(cls, recipe: RecipeChoices) -> bool:
        """Whether the sum over depth, :func:`together`, has to be there before any map is made."""
        return False

    @classmethod
    def diagonal(cls, link: str, target: Geometry) -> int:
        """The number of blocks along its diagonal into which the map of a link falls."""
        return 1

    def __init__(
        self, source: Base, target: Base, blocks: Blocks, recipe: RecipeChoices, *, toward: Tensor | None = None
    ) -> None:
        """
        Args:
            blocks: for every target block the source block that feeds it, or None.
            toward: where the recipe :meth:`leans_on_depth`: :func:`together` of all moments.
        """
        self.source, self.target, self.recipe, self.toward = source, target, recipe, toward
        self.pairs = Pairs(source.geometry, target.geometry, blocks)
        self.links = {**self.pairs.moments, **(self.pairs.class_rows if self.reads_class_rows else {})}
        self.ruleset = Ruleset()
        self.moments: dict[str, CrossMoment] = {}
        self.energies: dict[str, Energy] = {}
        self.grams: dict[str, Grams] = {}
        self.seen: set[str] = set()
        self.ahead, self.finished, self.given = 0, False, False
        self.method: Method = "auto"
        self.together: Tensor | None = None  # sum of z crosses so far, where the first map may have to be completed

    @classmethod
    def of_maps(cls, source: Base, target: Base, blocks: Blocks, recipe: RecipeChoices, made: Ruleset) -> Solver:
        """A solver that has finished: all that it would make is there."""
        solver = cls(source, target, blocks, recipe)
        solver.ruleset, solver.finished, solver.given = made, True, True
        return solver

    def add(
        self,
        moments: Mapping[str, CrossMoment],
        energies: Mapping[str, Energy] | None = None,
        grams: Mapping[str, Grams] | None = None,
    ) -> None:
        """Take evidence, whole: all batches of a link at once. Maps of single spaces are made here.

        Raises:
            NumericalError: activations were not finite, or a map fails its certificate.
            InputRefused: a norm has gain zero, or its output is zero everywhere.
        """
        for name in (n for n in self.links if n in moments):  # in one order, that of sums
            m = moments[name]
            if not all(bool(x.isfinite().all()) for x in (m.cross, m.source_sum, m.target_sum)):
                raise NumericalError(
                    f"activations of space {name} held NaN or Inf; check both bases and the calibration"
                )
            self._check_alive(name, m)
            self.moments[name] = m
            if grams and name in grams:
                self.grams[name] = grams[name]
        self._arrived([name for name in self.links if name in moments])
        self.energies |= energies or {}
        self.seen |= {*moments, *(energies or {})}
        self._release()

    def _check_alive(self, name: str, m: CrossMoment) -> None:
        """Refuse a norm's output that is zero, from which nothing could move; warn of any other activation."""
        energies = {"source": m.source_energy, "target": m.target_energy}
        dead = [side for side, energy in energies.items() if not bool((energy != 0).any())]
        if not dead:
            return
        where = f"activations of space {name} are zero in the {' and the '.join(dead)}"
        if self.links[name].target.norm:
            cure = "are all its weights in the checkpoint"
            if len(dead) > 1:
                cure = "are all weights there, and does any token of one stand for a token of the other (offsets)"
            raise InputRefused(f"{where}; {cure}?")
        log.warning("%s: the layers that read or make them get no update there", where)

    def block(self, b: int) -> None:
        """Make the rules of target block ``b`` from what arrived; its moments, and those before, are held no more."""
        if self.given:
            return
        self._block(b)
        self.ahead = b + 1
        self._release()
        for layer in (layer for layer in self.target.geometry.layers() if layer.block <= b):
            self.energies.pop(layer.name, None)

    def finish(self) -> None:
        """Make what no visit made: rules of blocks that did not run, the first map's completion, embeddings, heads.

        A block that need not run may still have layers whose input arrived, with the block before.
        """
        if self.given:
            return
        for b in (b for b in self.pairs.places if b is not None and b >= self.ahead):
            self.block(b)
        self._finish()
        self.finished = True
        self._release()

    def embeddings_now(self) -> None:  # noqa: B027 - most recipes move no embeddings
        """Make the rules of embeddings from what arrived with them; :meth:`finish` makes them again, completed."""

    def as_mapped(self, rows: Rows, link: Link) -> Rows:
        """Rows [rows, dS] and [rows, dT] of a link as its map maps them."""
        return rows

    @abstractmethod
    def needs(self, layers: Iterable[Layer], vectors: Iterable[str]) -> set[str]:
        """Links whose moments and energies the rules of these need; known from geometry and recipe alone.

        Args:
            layers: of the target. vectors: names of tensors of the target, as in ``ruleset.vectors``.
        """

    def with_class_rows(self, names: set[str]) -> set[str]:
        """These links, and of those whose class token alone matters the links that compare it."""
        return names | {own for own in map(of_class, names) if own in self.links}

    def needed(self, keys: Collection[str]) -> set[str]:
        """:meth:`needs` of keys of an alignment's rules (layers) and vectors."""
        if self.given:
            return set()
        layers = [layer for layer in self.target.geometry.layers() if layer.name in keys]
        return self.needs(layers, set(keys) - {layer.name for layer in layers})

    @property
    def every(self) -> set[str]:
        """All links the recipe can use."""
        return {*self.links, *(self.pairs.energies if self.reads_energies else ())}

    @property
    def behind(self) -> str:
        """The link of the residual right behind the embeddings."""
        return "embedding" if "embedding" in self.links else "0.attention"

    @property
    def wants_together(self) -> bool:
        """Whether the links behind norms of all blocks must arrive, whatever layers are asked for."""
        return False

    @property
    def keep(self) -> set[str]:
        """Maps that rules still to come will name, or the solver itself reads."""
        late = {n for n in self.links if (b := block_of(n)) is None or b >= self.ahead} | self._starts()
        return set() if self.finished else self.ruleset.maps.keys() & late

    def whole(self, moments: dict[str, CrossMoment], energies: dict[str, Energy], grams: dict[str, Grams]) -> Ruleset:
        """The ruleset from all evidence, given as block after block would bring it; the three are emptied meanwhile."""
        for place, names in self.pairs.arrivals:
            self.add(_taken(moments, names), _taken(energies, names), _taken(grams, names))
            if place is not None:
                self.block(place)
        self.finish()
        return self.ruleset

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """JSON and tensors from which :meth:`restore` goes on, to the bit."""
        if self.given:
            return {}, {}
        ruleset, tensors = self.ruleset.state()
        for name, moment in self.moments.items():
            own = {1 + side: gram for side, gram in self.grams.get(name, {}).items()}
            for i, m in {0: moment, **own}.items():
                tensors |= {f"moments/{name}/{i}/{part}": getattr(m, part) for part in PARTS}
        for name, e in self.energies.items():
            tensors |= {f"energies/{name}/source": e.source, f"energies/{name}/target": e.target}
            tensors[f"energies/{name}/centred"] = e.totals
        tensors |= {n: t for n, t in (("together", self.together), ("toward", self.toward)) if t is not None}
        return {
            "ruleset": ruleset,
            "counts": {name: moment.count for name, moment in self.moments.items()},
            "energies": list(self.energies),
            "seen": sorted(self.seen),
            "ahead": self.ahead,
            "finished": self.finished,
        }, tensors

    def restore(
        self, state: Mapping[str, Any], tensors: Mapping[str, Tensor], *, device: torch.device | str = "cpu"
    ) -> None:
        """Go on where :meth:`state` was taken, in a solver of the same bases, blocks and recipe.

        Args:
            device: where moments and energies lay.
        """

        if self.given:
            return

        def held(name: str) -> Tensor:
            return tensors[name].to(device)

        self.ruleset = Ruleset.restored(state["ruleset"], tensors)
        self.moments, self.grams, self.energies = {}, {}, {}
        for name, count in state["counts"].items():
            there = [i for i in range(3) if f"moments/{name}/{i}/cross" in tensors]
            found = {i: {part: held(f"moments/{name}/{i}/{part}") for part in PARTS} for i in there}
            own = {i - 1: CrossMoment(**parts, count=count) for i, parts in found.items()}
            self.moments[name] = own.pop(-1)
            if own:
                self.grams[name] = own
        for name in state["energies"]:
            self.energies[name] = Energy(*(held(f"energies/{name}/{part}") for part in ("source", "target", "centred")))
        self.together, self.toward = (held(n) if n in tensors else None for n in ("together", "toward"))
        self.seen, self.ahead, self.finished = set(state["seen"]), state["ahead"], state["finished"]

    def _starts(self) -> set[str]:
        """Spaces of the residual where nothing but embeddings wrote it; their maps serve until the end."""
        return set()

    def polar(self, cross: Tensor, **options: Any) -> Polar:
        """The polar factor as the recipe wants it, and as this run makes large ones."""
        method = self.method if min(cross.shape[-2:]) >= ITERATE_FROM else "auto"
        return procrustes(cross, **{"null": self.recipe.null, **options}, floor=self.recipe.floor, method=method)

    def polars(self, crosses: Sequence[Tensor], **options: Any) -> list[Polar]:
        """:meth:`polar` of several crosses of one shape: on a device together."""
        if len(crosses) == 1:
            return [self.polar(crosses[0], **options)]
        found = self.polar(torch.stack(list(crosses)), **options)
        parts = zip(found.map, found.rank, found.gap, strict=True)
        return [Polar(t.clone(), rank, gap) for t, rank, gap in parts]  # so that each can be freed by itself

    @abstractmethod
    def _arrived(self, names: Sequence[str]) -> None:
        """Make the maps of spaces that have one of their own."""

    @abstractmethod
    def _block(self, b: int) -> None: ...

    @abstractmethod
    def _finish(self) -> None: ...

    @abstractmethod
    def _held(self, name: str) -> bool:
        """Whether the moment of a link that arrived is still needed."""

    def _release(self) -> None:
        for name in [n for n in self.moments if self.finished or not self._held(n)]:
            del self.moments[name]
            self.grams.pop(name, None)


def _taken(store: dict[str, T], names: Iterable[str]) -> dict[str, T]:
    return {name: store.pop(name) for name in names if name in store}
