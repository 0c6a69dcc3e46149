"""Alignment x delta -> the target's delta: which tensor gets which move, decided before any is computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..alignment.alignment import Alignment
from ..errors import InputRefused
from ..machine import named_device
from ..models.arguments import check_kinds
from ..models.base import Base, check_shapes
from ..models.family import Slot
from ..models.tensors import Tensors, device_of, row_tiles, tensors_of
from ..recipes.ruleset import Rule
from .adapter import MERGING, Adapter, Factors
from .arguments import check_direction, check_whole
from .available import Available
from .changes import changes, leaving, leaving_alone
from .coverage import ADDED, BY_EFFECT, NO_FACTORS, TIES, Stays
from .delta import Delta
from .embeddings_and_heads import Ends
from .factored import at_rank, held_by_adapters
from .fates import Computation, Fate, TensorFate
from .fit_plans import plan_fits
from .fused_factors import Piece, fused, module_in, product
from .layer_moves import Move
from .trained_on import changed_by, check_layers
from .update import Update
from .vector_moves import VectorMove


def transport(
    alignment: Alignment,
    delta: Delta,
    target: nn.Module | Tensors,
    *,
    alpha: float = 1.0,
    leave: Sequence[str] = (),
    presumed: bool = False,
    one_tokenizer: bool = False,
    rank: int | None = None,
    only_targeted: bool = False,
    device: torch.device | str | None = None,
) -> Update:
    """Move an update of the source to the target.

    Args:
        alignment: of the two bases; its rules and maps become the update's ``available``, read when values are made.
        delta: the update, with the source base it belongs to.
        target: the target base; alpha: the strength of the update.
        leave: glob patterns of canonical tensor names to leave behind.
        presumed: count every tensor of a full tune as changed, unread, until :meth:`Update.compare` finds otherwise;
            only what has no rule is compared at once.
        one_tokenizer: rows of one index are one token in both vocabularies, though one is padded further: the rows
            they share move. Else embeddings and heads of another number of rows stay.
        rank: the most directions of every layer of a moved adapter; None: its own. A full tune becomes factors of this
            rank where it is given; what no factors hold stays.
        only_targeted: where a recipe fits layers, of an adapter only those of the kinds it has factors of.
        device: where moves are computed, in float64 always; None: the GPU the target lies on, else the CPU. Bases,
            tune and maps may lie anywhere: of each, what one layer needs is copied there and freed behind it. Values
            are handed out on the CPU; :meth:`Update.add_to` adds them wherever the model lies.

    Raises:
        InputRefused: a changed tensor has no rule, nothing changed at all, an argument does not fit the others.

    Source: arXiv 2602.12952 (the map of an update), and the fields of ``Recipe`` for gains, biases and scales.
    """
    check_kinds(alignment=(alignment, Alignment), delta=(delta, Delta))
    check_whole(**({} if rank is None else {"rank": (rank, 1)}))
    tensors = tensors_of(target)
    place = device_of(tensors) if device is None else named_device(device)
    how: dict[str, Any] = {"presumed": presumed, "one_tokenizer": one_tokenizer, "device": place}
    return _Fates(alignment, delta, tensors, alpha, leave, **how).plan(rank, only_targeted=only_targeted)


class _Fates:
    """Decides the fate of every tensor; the arithmetic is in `layer_moves.py` and `vector_moves.py`."""

    def __init__(
        self,
        alignment: Alignment,
        delta: Delta,
        target: Tensors,
        alpha: float,
        leave: Sequence[str],
        *,
        presumed: bool,
        one_tokenizer: bool,
        device: torch.device,
    ) -> None:
        self.alignment, self.delta, self.stays = alignment, delta, Stays(alignment, leave)
        self.family = alignment.source.family
        source = Base.of(delta.base, alignment.source, device=device)
        into = Base.of(target, alignment.target, device=device)
        for side, base in (("source", source), ("target", into)):
            shapes = {name: base.shape(name) for name in base.slots}
            check_shapes(base.geometry, shapes, says=f"the alignment's {side}", cure="was the right base given?")
        check_direction(alignment.provenance, delta, source, delta.tuned_tensors(self.family))
        self.ends = Ends(source, into, delta, self.stays, one_tokenizer)
        self.source, self.target, self.tuned = self.ends.source, self.ends.target, self.ends.tuned
        available = Available.of(alignment)
        self.update = Update(self.source, self.target, delta, alpha, available, tuned=self.tuned, new=self.ends.new)
        self.update.shared, self.update.said, self.update.lone = self.ends.shared, self.ends.said, self.ends.lone
        self.update.left, self.update.one_tokenizer = self.stays.asked, one_tokenizer
        self.fates: dict[str, TensorFate] = {}
        self.added: list[TensorFate] = []  # layers of the target, in a moved adapter, that the tune has no factors of
        self.moves = self._paired_layers()
        for name in [n for n in self.tuned.slots if self.stays.asked(n)]:
            del self.tuned.slots[name]  # as if the tuned model had not changed it
            self._decide(name, "left", "left on request")
        for name, why in self.ends.left.items():
            self._decide(name, "left", why)
        self.presumed = presumed and delta.adapter is None
        self.changed = changes(self.update, self.stays, presumed=self.presumed)

    def _paired_layers(self) -> dict[str, Move]:
        """Source layer name -> its move."""
        a = self.alignment
        own = {layer.name: layer for layer in a.source.layers()}
        rest = (self.update.available, self.source, self.target, self.update.carried)
        fed = [(into, a.rules[into.name].source) for into in a.target.layers() if into.name in a.rules]
        return {name: Move(own[name], into, *rest) for into, name in fed}

    def plan(self, rank: int | None, *, only_targeted: bool) -> Update:
        self._check_complete()
        for move in self.moves.values():
            self._plan_layer(move)
        for name, rule in self.alignment.vectors.items():
            self._plan_vector(rule, name)
        self._plan_factors()
        if rank is not None and self.delta.adapter is None:
            self._keep_what_adapters_hold()
        self._plan_fits(rank, only_targeted=only_targeted)
        if rank is not None:
            at_rank(self.update, rank)
        self._settle()
        order = {name: i for i, name in enumerate(self.source.slots)}
        told = sorted(self.fates.values(), key=lambda f: order.get(self.family.canonical(f.tensor), -1))
        self.update.coverage = [*told, *(self.added if self.delta.adapter else ())]
        if not (self.update or self.presumed or self.alignment.draft):
            self.update.settled()
        return self.update

    def _plan_fits(self, rank: int | None, *, only_targeted: bool) -> None:
        """Layers that are fitted, among them such as the tune has no update of."""
        self.update.fits.rank = rank
        for name in plan_fits(self.update, self.alignment, only_targeted=only_targeted):
            self.added.append(TensorFate(name, "fitted", ADDED))

    def _keep_what_adapters_hold(self) -> None:
        """What no adapter holds of a full tune stays; where fits see its effect, it moves through them."""
        update, recipe = self.update, self.alignment.recipe
        for into in [name for name in update.into if not held_by_adapters(update, name)]:
            update.leave(into)
            update.new.discard(into)
        gone = [name for name, into in update.moved.items() if into not in update.into]
        gone += [name for name, told in self.fates.items() if told.fate == "folded" and name.endswith(".bias")]
        for name in gone:
            update.moved.pop(name, None)
            if self._by_effect(name) or (recipe.fits and self.stays.is_embedding(name)):
                self._decide(name, "fitted", f"{BY_EFFECT}; {NO_FACTORS}")
                update.fits.sources.add(name)
            else:
                self._decide(name, "left", NO_FACTORS)

    def _check_complete(self) -> None:
        if self.delta.tuned is not None:
            for name in self.source.slots.keys() - self.tuned.slots.keys() - self.fates.keys():
                if not self.stays.by_rule(name) and not self.stays.asked(name) and not self.stays.of_head(name):
                    raise InputRefused(
                        f"the tuned model has no tensor {name}; is it complete, and is it a tune of the source?"
                    )

    def _decide(self, name: str, fate: Fate, note: str = "") -> None:
        self.fates[name] = TensorFate(name, fate, note)

    def _plan_layer(self, move: Move) -> None:
        own, into, rule = move.own, move.into, move.rule
        weight, bias, its_bias = f"{own.name}.weight", f"{own.name}.bias", f"{into.name}.bias"
        around = {f"{own.norm}.weight", f"{own.norm}.bias", f"{own.scale}"} & self.changed if rule.fold else set()
        if not ({weight, bias} | around) & self.changed:
            return
        if reason := self._unfit(move):
            for name in {weight, bias} & self.changed:
                self._decide(name, "left", reason)
            if reason == TIES and weight in self.changed:
                self.update.apart.add(weight)
            return
        if around and self.delta.adapter is not None:
            raise InputRefused(f"the adapter saves {sorted(around)[0]} whole, which no moved adapter can; {MERGING}")
        norm = self.alignment.target.family.norm
        takes_bias = its_bias in self.target or (norm == "layer" and rule.fold and into.norm is not None)
        if bias in self.changed and not takes_bias:
            self._decide(bias, "left", "the target has no bias to take it")
            if not ({weight} | around) & self.changed:
                return
        kept = {part for part in ("weight", "bias") if self.stays.asked(f"{own.name}.{part}")}
        moving = [n for n in ("weight", "bias") if f"{into.name}.{n}" in self.target and n not in kept]
        if not moving:
            return
        deciding = ({weight, bias} if takes_bias else {weight}) | around
        tiles = self._tiles(f"{into.name}.weight") if into.role == "head" else ()  # whose outputs both sides share
        computation = Computation(
            partial(self._dense, move), frozenset({into.name}), frozenset(deciding & self.changed), tiles
        )
        for part in moving:
            self.update.plan(f"{into.name}.{part}", computation)
            if f"{own.name}.{part}" in self.source:
                self.update.moved[f"{own.name}.{part}"] = f"{into.name}.{part}"
        for name in ({weight, bias} & self.changed) - self.fates.keys():
            self._decide(name, "transported", self.ends.notes.get(name, ""))
        for name in around:
            self._decide(name, "folded", "into the layer in front" if name == own.scale else "into its readers")

    def _unfit(self, move: Move) -> str | None:
        weight, into = f"{move.own.name}.weight", f"{move.into.name}.weight"
        if why := self.stays.by_rule(weight):
            return why
        for side, base, name in (("source base", self.source, weight), ("target", self.target, into)):
            if name not in base:
                tied = base is self.target and base.geometry.tied and move.own.slot == "head.vocabulary"
                return TIES if tied else f"the {side} has no such tensor"
        rows = self.source.shape(weight)[0], self.target.shape(into)[0]
        if move.own.role == "head" and rows[0] != rows[1]:
            return f"the source has {rows[0]} outputs, the target {rows[1]}"
        return None

    def _dense(self, move: Move, rows: slice | None) -> dict[str, Tensor]:
        return {f"{move.into.name}.{part}": value for part, value in move.dense(self.tuned, rows).items()}

    def _tiles(self, into: str) -> tuple[slice, ...]:
        """Row tiles of a tensor of the target, where its rows are kept as rows of a tensor of its own."""
        slot = self.target.slots[into]
        return () if slot.transposed or slot.parts > 1 else row_tiles(self.target.shape(into))

    def _plan_vector(self, rule: Rule, into: str) -> None:
        """An embedding, or a norm's own gain or bias where no linear layer took it up."""
        name = rule.source
        if name not in self.changed or (name in self.fates and rule.kind != "linear"):
            return
        if why := self.stays.by_rule(name):
            return self._decide(name, "left", why)
        if name not in self.source or into not in self.target:
            side = "target" if name in self.source else "source base"
            return self._decide(name, "left", f"the {side} has no such tensor")
        move = VectorMove(into, self.update.available, self.source, self.target)
        if why := move.unfit():
            return self._decide(name, "left", why)
        computation = Computation(
            lambda rows: {into: move(self.tuned, rows)}, frozenset({into}), frozenset({name}), move.tiles
        )
        self.update.plan(into, computation)
        self.update.moved[name] = into
        self._decide(name, "transported", "; ".join(filter(None, (move.note, self.ends.notes.get(name)))))

    def _plan_factors(self) -> None:
        adapter = self.delta.adapter
        if adapter is None:
            return
        check_layers(adapter, self.source, self.moves)
        found: dict[str, list[Piece]] = {}
        for spelled in adapter.layers():
            name = self.family.canonical(spelled)
            if self.stays.asked(name) or self.stays.asked(f"{name}.weight"):
                self._decide(name, "left", "left on request")
                continue
            for part, slot in self.family.parts(name).items():
                if self.stays.asked(part) or self.stays.asked(f"{part}.weight"):
                    self._decide(part, "left", "left on request")
                else:
                    self._plan_piece(adapter, spelled, part, slot, found)
        for own, pieces in found.items():
            self.update.factors[own] = fused(pieces)
        names = {piece.needs: piece.spelled for pieces in found.values() for piece in pieces}
        silent = [told.tensor for told in self.fates.values() if told.fate == "unchanged"]
        if silent and len(silent) == len(names) and not self.changed:
            raise InputRefused(
                "nothing to transport: every LoRA of the adapter is zero (lora_B is as it was made); was it trained?"
            )
        if silent:
            self.update.said.append(f"the LoRA of {len(silent)} layers is zero, first {silent[0]}: nothing moves there")

    def _plan_piece(self, adapter: Adapter, spelled: str, part: str, slot: Slot, found: dict[str, list[Piece]]) -> None:
        """One layer of the adapter, or the part of a fused one."""
        move = self.moves.get(part)
        if move is None and self._by_effect(part):
            factors = adapter.factors(spelled)
            zero = not (bool(factors.a.any()) and bool(factors.b.any()))
            return self._decide(part, *(("unchanged", "its factors are zero") if zero else ("fitted", BY_EFFECT)))
        if move is None:
            if why := self.stays.by_rule(f"{part}.weight"):
                return self._decide(part, "left", why)
            cure = leaving(part) if changed_by(adapter, self.family) & self.moves.keys() else "nothing of it can move"
            raise InputRefused(f"the adapter changes {spelled}, which has no rule; {cure}")
        weight, into = f"{part}.weight", f"{move.into.name}.weight"
        if weight in self.changed:
            raise InputRefused(f"the adapter both factors {spelled} and saves it whole")
        if (reason := self._unfit(move)) and reason != TIES:
            return self._decide(part, "left", reason)
        factors, columns = adapter.factors(spelled), self.source.shape(weight)[1]
        rows = self.source.shape(weight)[0] * slot.parts
        if (len(self.ends.fitted(part, factors.b)), factors.a.shape[1]) != (rows, columns):
            raise InputRefused(
                f"the adapter's {spelled} is {[len(factors.b), factors.a.shape[1]]}, the base's {[rows, columns]}; "
                "was the right base given?"
            )
        compute = partial(self._moved_factors, move, spelled, part, slot)
        tied = self.target.geometry.vocabulary or 0, self.target.geometry.width
        kept = len(factors.a), factors.a.dtype, tied if reason else self.target.shape(into), factors.scaling
        name, place = module_in(self.target, move.into.name)
        found.setdefault(name, []).append(Piece(spelled, place, *kept, compute, move.into.name))
        zero = not (bool(factors.a.any()) and bool(factors.b.any()))
        self._decide(part, *(("unchanged", "its factors are zero") if zero else ("transported", "as factors")))
        if reason:  # no tensor of the target, but an adapter carries it
            self.update.carried_apart[part] = name
            return
        moved = partial(product, into, compute)
        needs = frozenset({move.into.name})
        self.update.plan(into, Computation(moved, needs, frozenset({weight}), self._tiles(into)))
        self.update.moved[weight] = into

    def _moved_factors(self, move: Move, spelled: str, part: str, slot: Slot) -> Factors:
        assert self.delta.adapter is not None
        factors = self.delta.adapter.factors(spelled)
        return move.factors(replace(factors, b=self.ends.fitted(part, factors.b.chunk(slot.parts)[slot.part])))

    def _by_effect(self, name: str) -> bool:
        """Whether what no map moves is taken up by fits: all that comes before a write point of the target."""
        paired = [own for own in self.alignment.blocks if own is not None]
        block = self.family.block_of(f"{name}.")
        return self.alignment.recipe.fits and block is not None and block <= max(paired)

    def _settle(self) -> None:
        """Every tensor has a fate; a changed one without a rule is an error."""
        for name in {**self.source.slots, **dict.fromkeys(self.tuned)}:
            if name in self.fates or (self.delta.adapter is not None and name not in self.tuned):
                continue
            why = self.stays.by_rule(name) or self.stays.unmoved(name, is_new=name not in self.source)
            if not why:
                self.update.compare([name])
            if name not in self.changed - self.update.unchanged:
                self._decide(name, "unchanged")
            elif self._by_effect(name):
                self._decide(name, "fitted", BY_EFFECT)
                self.update.fits.sources.add(name)
            elif why:
                self._decide(name, "left", why)
            else:
                raise InputRefused(f"{name} changed but has no rule; {leaving_alone(self.update, name)}")
