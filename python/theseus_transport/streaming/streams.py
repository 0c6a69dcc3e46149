"""Four models side by side: source and target, and both as changed, S+ by its tune, T+ by what moved so far.

One block after the other: the block of S+ runs; that of T+ runs with what the prior moved of the update, and each layer
that writes the residual is fitted to what is missing behind it of the effect x(S+) - x(S). Then the block is written.
All are fed the same tokens; nothing is ever run backwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..activations.effects import EffectMoment
from ..activations.moments import Energy, add_energies
from ..activations.pairing_tokens import Mixings, of_class_token, of_samples
from ..linalg.ridge import Fit, Normal, chosen_ridge, ridge
from ..models.base import Base
from ..models.forward import state_of
from ..models.geometry import Layer
from ..models.pair import Pair
from ..recipes.choices import RecipeChoices
from ..recipes.effect import write_point, writers
from ..recipes.solver import Solver
from ..updates.computed import ComputedUpdate
from .changed_weights import Scaled, TunedWeights, UpdatedWeights
from .head_fit import HeadFit
from .hidden_states import Hidden
from .last_point import AGREE, Heads, agreement, frequencies
from .loop import Loop, Side
from .schedule import Visit
from .skeleton import Weights
from .stand_ins import Reached
from .verdict import Head, Prediction, prediction, removed, shared_head, stored_head

NOTHING = 100.0  # times the square of the recipe's floor: share of the effect's energy below which nothing is missing
JUDGES = 4  # one sample of so many judges the penalty of fits to the others, where it is chosen


@dataclass(frozen=True)
class Arrived:
    """How much of the effect is there at a write point, on rows that no fit has seen: 1 - |missing|^2 / |wanted|^2.

    Attributes:
        layer: of the target, which writes there.
        share: 1 is all of it, 0 as much as without any update.
    """

    layer: str
    share: float


@dataclass
class WritePoint:
    """What is known of the residual behind a layer: the map between the two models there, and the ratio of scales."""

    q: Tensor  # [dS, dT]
    scale: float


class Stream:
    """One model as changed, beside its base: its weights, and its hidden states."""

    def __init__(self, side: Side, weights: Weights, name: str, batches: Sequence[int]) -> None:
        """``batches``: the numbers of those that run through it, in order."""
        self.side, self.weights, self.name = side, weights, name
        self._places = {i: k for k, i in enumerate(batches)}
        self.hidden: Hidden  # of these batches

    def __getitem__(self, i: int) -> Tensor:
        """Hidden states [samples, tokens, width] of batch ``i``."""
        return self.hidden[self._places[i]]

    def put(self, i: int, state: Tensor) -> None:
        """Replace those of batch ``i``; batches come in order."""
        self.hidden.put(self._places[i], state)

    @contextmanager
    def filled(self, b: int) -> Iterator[Callable[..., Any]]:
        """Block ``b`` with this stream's weights."""
        with self.side.skeleton.filled(b, weights=self.weights) as block:
            yield block

    def run(self, block: Callable[..., Any], b: int, i: int) -> Tensor:
        """What block ``b`` makes of batch ``i``; the stream stays where it is."""
        rest, named = self.side.calls[i][b]
        return state_of(block(self[i].to(self.side.device), *rest, **named))

    @contextmanager
    def watched(self, b: int, layer: str) -> Iterator[dict[str, Tensor]]:
        """What block ``b`` shows while it runs: ``read`` by ``layer``, ``between`` attention and MLP."""
        seen: dict[str, Tensor] = {}

        def note(what: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            return lambda module, given: seen.__setitem__(what, given[0])

        f, inside = self.side.geometry.family, self.side.skeleton.inside
        handles = [
            inside(b, layer).register_forward_pre_hook(note("read")),
            inside(b, f.mlp_norm).register_forward_pre_hook(note("between")),
        ]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()


class Streams:
    """The two changed models beside the two of a loop.

    Where the recipe fits, all batches run through them; else the one that is held out, to tell what arrived.

    Attributes:
        active: whether anything has changed yet: until then both changed models are their bases.
        arrived: by write point, how much of the effect is there.
        removed: strength -> share of divergence removed, see `verdict.py`; empty where there are no rows to tell by.
        judged: whether that was found out.
    """

    def __init__(
        self,
        update: ComputedUpdate,
        solver: Solver,
        weights: tuple[TunedWeights, UpdatedWeights],
        *,
        folder: Path,
        resident: bool,
        strengths: Sequence[float] = (),
    ) -> None:
        """
        Args:
            weights: of S+ and of T+.
            strengths: others than 1 at which the update is tried on the rows that are held out.
            folder: for files of hidden states; ``resident``: whether these stay in memory beside.
        """
        self._update, self._solver, self._recipe = update, solver, solver.recipe
        (self._of_tuned, self._of_updated), self._folder, self._resident = weights, folder, resident
        self._fits = {la.name for la in writers(self._recipe, solver.pairs.target.layers())} if solver.fits else set()
        self._fits &= update.fits.planned.keys()
        self._centred = solver.pairs.target.family.norm == "layer"
        self.active, self.arrived = False, list[Arrived]()
        self._strengths, self._tried = strengths, dict[float, Tensor]()  # strength -> hidden states of the held batch
        self.removed, self.judged = dict[float, float](), False
        self._point: WritePoint | None = None
        self._between: Stream | None = None  # of S+, between attention and MLP of the block that ran last
        self._loop: Loop

    @property
    def runs(self) -> bool:
        """Whether there is anything to do: fits to make, or rows to tell by."""
        return bool(self._fits) or self._loop.held is not None

    def beside(self, loop: Loop) -> None:
        """Run beside this loop from here on."""
        self._loop = loop
        held = loop.held
        self._batches = list(range(len(loop.rows))) if self._fits else [] if held is None else [held]
        loop.between = self._batches
        source, target = loop.sides
        self.tuned = Stream(source, self._of_tuned, "tuned", self._batches)
        self.updated = Stream(target, self._of_updated, "updated", self._batches)

    def prepare(self, visit: Visit) -> None:
        """Before a visit's blocks run: from the first block that the tune changed the two models go their own ways."""
        if self.active or visit.source is None:
            return
        if self._of_tuned.changes(self._loop.sides.source.names(visit.source)):
            self.active = True
            for stream in (self.tuned, self.updated):
                stream.hidden = stream.side.hidden.copied(stream.name, self._batches)
            for alpha in self._trials():
                self._tried[alpha] = self.updated[self._held]

    def follow(self, visit: Visit, *, first: bool) -> None:
        """After a visit's maps were made: run the same blocks as changed, and fit what writes the residual."""
        if first:
            self._start()
        elif self.active and visit.source is not None:
            self._run_source(visit.source)
        if visit.target is not None:
            layers = {la.role: la for la in self._solver.pairs.target.layers() if la.block == visit.target}
            if self.active:
                self._run_target(visit, [layers["output"], layers["contract"]])
            names = {layers[role].name for role in ("output", "contract")} & self._update.fits.planned.keys()
            self._update.unchanged |= self._update.fits.reached(names)

    def _start(self) -> None:
        """Behind the embeddings, where these changed."""
        source, target = self._loop.sides
        family = source.geometry.family
        outside = [n for n in source.window if family.block_of(family.canonical(n)) is None and not self._behind(n)]
        if self._solver.behind in self._solver.ruleset.maps:
            self._point = self._found(self._solver.behind)
        if not self._of_tuned.changes(outside):
            return
        self.active = True
        self._solver.embeddings_now()
        for stream in (self.tuned, self.updated):
            stream.hidden = Hidden(self._folder, stream.name, resident=self._resident)
            with stream.side.skeleton.ahead(stream.side.batches, stream.weights) as embed:
                for i in self._batches:
                    stream.hidden.append(embed(i)[0])
        for alpha, weights in self._trials().items():
            with target.skeleton.ahead(target.batches, weights) as embed:
                self._tried[alpha] = embed(self._held)[0].cpu()

    @property
    def _held(self) -> int:
        assert self._loop.held is not None
        return self._loop.held

    def _trials(self) -> dict[float, Weights]:
        """The target's weights at the strengths that are tried, where there are rows to try them on."""
        if self._loop.held is None:
            return {}
        base = self._loop.sides.target.window
        return {alpha: Scaled(base, self._of_updated, alpha) for alpha in self._strengths}

    def fit_heads(self) -> None:
        """Once all blocks ran: fit a head that the tune trained to what is missing of its change of predictions."""
        planned = self._update.fits.heads
        head = self._head() if self.active and planned else None
        name = head and self._solver.pairs.target.family.heads[head.purpose]
        if head is not None and name in planned and self._trained(head):
            each = [self._four(head, i) for i in self._batches if i != self._loop.held]
            read = [torch.cat([batch[k].read for batch in each]) for k in range(4)]
            joined = [replace(one, read=rows) for one, rows in zip(each[0], read, strict=True)]
            outputs = self._update.target.shape(f"{name}.weight")[0]
            bias = f"{name}.bias" in self._update.target
            fit = HeadFit(joined, planned[name].compute, head.outputs, outputs, bias)
            self._update.fits.share[name] = fit.share(name)
            self._update.fits.made[name] = fit
            self._update.forget()
        self._update.unchanged |= self._update.fits.reached(planned)

    def _trained(self, head: Head) -> bool:
        """Whether the tune changed a head whose outputs both bases agree on."""
        stored = str(stored_head(self._solver.source, head.purpose))
        if not self._of_tuned.changes([stored]):
            return False
        return self._agree(head, self._batches[0])

    def _agree(self, head: Head, i: int) -> bool:
        """Whether the heads of both bases have something in common, on batch ``i``."""
        seen = [self._predicted(k, head, s.hidden[i], s.window, i) for k, s in enumerate(self._loop.sides)]
        return agreement(head, *seen) >= AGREE

    def _four(self, head: Head, i: int) -> list[Prediction]:
        """What S+, S, T, and T+ with the head of its base predict of batch ``i``."""
        source, target = self._loop.sides
        updated = self._predicted(1, head, self.updated[i], self._of_updated, i)
        return [
            self._predicted(0, head, self.tuned[i], self._of_tuned, i),
            self._predicted(0, head, source.hidden[i], source.window, i),
            self._predicted(1, head, target.hidden[i], target.window, i),
            replace(updated, weights=target.window),
        ]

    def judge(self) -> None:
        """Once all blocks ran and all maps are there: how much of the divergence is removed, at every strength."""
        self.judged = True
        if self._loop.held is None or not self.active or (head := self._head()) is None:
            return
        (source, target), held = self._loop.sides, self._held
        before = self._predicted(1, head, target.hidden[held], target.window, held)
        base = self._predicted(0, head, source.hidden[held], source.window, held)
        effect = Pair(base, self._predicted(0, head, self.tuned[held], self._of_tuned, held))
        states: dict[float, tuple[Tensor, Weights]] = {1.0: (self.updated[held], self._of_updated)}
        states |= {alpha: (self._tried[alpha], weights) for alpha, weights in self._trials().items()}
        updated = {alpha: self._predicted(1, head, *states[alpha], held) for alpha in sorted(states)}
        self.removed = removed(head, before, effect, updated)

    def _behind(self, name: str) -> bool:
        """Whether a stored tensor of the source lies behind the blocks."""
        family = self._solver.pairs.source.family
        module = family.canonical(name).rpartition(".")[0]
        return module in {family.final_norm, *family.heads.values()}

    def _run_source(self, own: int) -> None:
        stream, family = self.tuned, self.tuned.side.geometry.family
        self._between = Stream(stream.side, stream.weights, "between-tuned", self._batches)
        self._between.hidden = Hidden(self._folder, "between-tuned", resident=self._resident)
        with stream.filled(own) as block, stream.watched(own, family.output) as seen:
            for i in self._batches:
                state = stream.run(block, own, i)
                self._between.hidden.append(seen["between"])
                stream.put(i, state)

    def _run_target(self, visit: Visit, layers: Sequence[Layer]) -> None:
        stream, b = self.updated, visit.target
        assert b is not None
        points: dict[str, WritePoint] = {}
        for layer in layers:
            if visit.source is not None:
                point = write_point(self._solver.pairs, layer)
                if point in self._solver.ruleset.maps:
                    self._point = self._found(point, visit, layer)
                    if point == "final" and self._recipe.last == "heads" and layer.name in self._fits:
                        self._point = self._by_heads(self._point)
            if self._point is None:
                continue
            points[layer.name] = self._point
            if layer.name in self._fits:
                self._fit(visit, layer, self._point)
            if layer.role == "output" and self._fits:
                self._forget_between()
        with stream.filled(b) as block, stream.watched(b, stream.side.geometry.family.output) as seen:
            for i in self._batches:
                after = stream.run(block, b, i)
                if i == self._loop.held:
                    for layer, state in zip(layers, (seen["between"], after), strict=True):
                        if layer.name in points:
                            self._tell(visit, layer, points[layer.name], state)
                stream.put(i, after)
        for alpha, weights in self._trials().items():
            with stream.side.skeleton.filled(b, weights=weights) as block:
                rest, named = stream.side.calls[self._held][b]
                self._tried[alpha] = state_of(block(self._tried[alpha].to(stream.side.device), *rest, **named)).cpu()
        self._of_updated.forget()
        self._update.forget()

    def _forget_between(self) -> None:
        """Of the residuals between attention and MLP only those that are held out are needed behind attention's fit."""
        tuned = [self._between.hidden] if self._between else []
        for states in (*(side.between for side in self._loop.sides), *tuned):
            if states is not None:
                states.keep(self._loop.held)

    def _states(self, visit: Visit, layer: Layer, i: int) -> tuple[Tensor, Tensor]:
        """Residuals of source and target base behind a writer, on batch ``i``."""
        source, target = self._loop.sides
        between, place = layer.role == "output", self._batches.index(i)
        assert target.between is not None
        into = target.between[place] if between else target.hidden[i]
        if visit.source is None or not between:
            return source.hidden[i], into
        assert source.between is not None
        return source.between[place], into

    def _tuned_state(self, visit: Visit, layer: Layer, i: int) -> Tensor:
        if layer.role != "output" or visit.source is None:
            return self.tuned[i]
        assert self._between is not None
        return self._between[i]

    def _by_heads(self, point: WritePoint) -> WritePoint:
        """What is wanted behind the last block, corrected by the heads where these share a vocabulary."""
        head = self._head()
        if head is None or head.purpose != "vocabulary":  # of classes heads read too little, which costs points
            return point
        if not self._agree(head, self._batches[0]):
            return point
        target, windows = self._loop.sides.target, self._loop.sides.map(lambda side: side.window)
        ids = [batch["input_ids"] for batch in target.batches if "input_ids" in batch]
        weight = frequencies(torch.cat([x.flatten() for x in ids]) if ids else None, head.outputs)
        own, other = point.q.shape
        z = (other / own) ** 0.5  # z, unlike the residual, has the energy of its width
        heads = Heads.of(self._bases, windows, head, weight)
        return WritePoint(heads.corrected(z * point.q), point.scale / z)

    @property
    def _bases(self) -> Pair[Base]:
        return Pair(self._solver.source, self._solver.target)

    def _head(self) -> Head | None:
        """The head that both bases have over the same outputs."""
        rows = self._loop.rows[self._batches[0]]
        return shared_head(self._bases, rows, one_tokenizer=self._update.one_tokenizer)

    def _predicted(self, k: int, head: Head, state: Tensor, weights: Weights, i: int) -> Prediction:
        """What a head makes of one side's hidden states behind its last block, on batch ``i``."""
        side = self._loop.sides[k]
        mask = side.batches[i].get("attention_mask")
        return prediction(side, self._bases[k], head, state.to(side.device), weights, self._loop.rows[i][k], mask)

    def _rows(self, b: int | None, i: int) -> Mixings:
        """Which rows of batch ``i`` stand for each other: behind the last block those alone that the models read."""
        rows: Mixings
        if b is not None and self._solver.pairs.reads_one_token(b):
            rows = of_class_token(self._solver.pairs.geometries, len(self._loop.sides.target.hidden[i]))
        else:
            rows = self._loop.rows[i]
        return rows.map(lambda mixing: mixing and mixing.to(self._loop.device))

    def _found(self, link: str, visit: Visit | None = None, layer: Layer | None = None) -> WritePoint:
        """The map of a link, and how much larger the target's residual is there.

        Args:
            visit, layer: whose write point it is; none: behind the embeddings.
        """
        q: Any = self._solver.ruleset.maps[link]
        energy, device = Energy.zeros(*self._solver.links[link].widths, self._loop.device), self._loop.device
        for i in self._batches:
            if i == self._loop.held and len(self._batches) > 1:
                continue
            if visit is None or layer is None:
                states = tuple(side.hidden[i] for side in self._loop.sides)
            else:
                states = self._states(visit, layer, i)
            rows = self._rows(visit.target if visit else None, i)
            for side, (state, mixing) in enumerate(zip(states, rows, strict=True)):
                add_energies([energy], side, [state.to(device).flatten(0, -2)], mixing)
        own, other = energy.centred if self._centred else (float(energy.source.sum()), float(energy.target.sum()))
        return WritePoint(q.matrix.to(device), (other / own) ** 0.5 if own > 0 else 0.0)

    def _fit(self, visit: Visit, layer: Layer, point: WritePoint) -> None:
        """Fit one writer to what is missing behind it; :attr:`ComputedUpdate.fits` has it afterwards."""
        stream, b, device = self.updated, layer.block, self._loop.device
        family = stream.side.geometry.family
        name = family.output if layer.role == "output" else family.contract
        moments, count = list[EffectMoment](), 0  # of the samples that are fitted, and of those that judge
        with stream.filled(b) as block, stream.watched(b, name) as seen:
            for i in self._batches:
                if i == self._loop.held:
                    continue
                after = self._upto(stream, block, b, i, seen, between=layer.role == "output")
                own, other = self._states(visit, layer, i)
                parts = self._parts(self._rows(b, i), after, count)
                count += len(after)
                read = seen["read"].flatten(0, -2)
                if not moments:
                    widths = read.shape[1], own.shape[-1], other.shape[-1]
                    moments = [EffectMoment.zeros(*widths, device) for _ in parts]
                tuned, own, after, other = (
                    state.to(device).flatten(0, -2) for state in (self._tuned_state(visit, layer, i), own, after, other)
                )
                for k, rows in enumerate(parts):
                    moments[k].update(read, tuned, own, after, other, *rows)
                seen.clear()
                del read, tuned, own, after, other  # before the next batch needs memory
        assert moments
        wanted = point.scale**2 * sum(float(moment.source_energy.sum()) for moment in moments)
        normals = [moment.missing(point.scale, point.q, centred=self._centred) for moment in moments]
        moments.clear()  # all but the Grams
        self._solve(layer, normals, wanted=wanted)

    def _parts(self, rows: Mixings, states: Tensor, count: int) -> list[Mixings]:
        """The rows of a batch that are fitted, and those that judge a penalty that is to be chosen.

        Args:
            states: of the target, [samples, tokens, width]; count: of samples in the batches before.
        """
        if self._recipe.ridge:
            return [rows]
        judge = torch.arange(count, count + len(states), device=self._loop.device) % JUDGES == JUDGES - 1
        return [of_samples(rows, states.shape[1], samples) for samples in (~judge, judge)]

    def _solve(self, layer: Layer, normals: list[Normal], *, wanted: float) -> None:
        """Solve for a writer's update, where anything is missing of an effect of energy ``wanted``.

        Args:
            normals: of the rows that are fitted and, where the penalty is chosen, of those that judge it; used up.
        """
        update, into = self._update, self._update.target
        stored = {part: into.slots[n] for part in ("weight", "bias") if (n := f"{layer.name}.{part}") in into}
        planned, rho = update.fits.planned[layer.name], self._recipe.ridge or None
        bias, found = planned is None and "bias" in stored, None
        if rho is None:
            rho = chosen_ridge(*normals, bias=bias) if all(one.count for one in normals) else RecipeChoices.ridge
        normal = reduce(add, normals)
        normals.clear()
        if rho is not None:
            found = ridge(normal, rho, bias=bias)
            if _explained(found, normal) <= NOTHING * self._recipe.floor**2 * wanted:
                found = None
        missing = found is not None
        if found is None:
            if planned is None or not planned.wider:
                return
            found = Fit(torch.zeros_like(normal.cross.mT), None)  # what the prior moved is cut as a fit is
        if layer.scale and layer.scale in into:  # a factor behind the layer: the residual gets it times that
            factor = into.need(layer.scale).to(found.weight)
            factor = torch.where(factor == 0, torch.inf, factor)
            found = Fit(found.weight / factor[:, None], None if found.bias is None else found.bias / factor)
        there = {part: slot for part, slot in stored.items() if update.there(slot.stored)}
        prior = {part: slot.view(update[slot.stored]).double() for part, slot in there.items()}
        update.forget()
        if missing or prior:
            update.fits.put(layer.name, prior, found, normal, rho or RecipeChoices.ridge)
        self._of_updated.forget(*(slot.stored for slot in stored.values()))

    def _upto(
        self, stream: Stream, block: Callable[..., Any], b: int, i: int, seen: Mapping[str, Tensor], *, between: bool
    ) -> Tensor:
        """The residual behind a writer of block ``b``; attention's without the MLP behind it."""
        if not between:
            return stream.run(block, b, i)

        def stop(module: nn.Module, given: tuple[Tensor, ...]) -> None:
            raise Reached(given[0])

        handle = stream.side.skeleton.inside(b, stream.side.geometry.family.mlp_norm).register_forward_pre_hook(stop)
        try:
            stream.run(block, b, i)
        except Reached as reached:
            state: Tensor = reached.state
            return state
        finally:
            handle.remove()
        raise AssertionError("the norm in front of the MLP did not run")

    def _tell(self, visit: Visit, layer: Layer, point: WritePoint, after: Tensor) -> None:
        """How much of the effect is there behind a writer, on the rows that are held out."""
        held = self._held
        own, other = self._states(visit, layer, held)
        mixings = self._rows(visit.target, held)
        pairs = Pair((self._tuned_state(visit, layer, held), own), (after, other))
        effect, change = (_difference(*both, mixing) for both, mixing in zip(pairs, mixings, strict=True))
        if self._centred:
            effect, change = (x - x.mean(1, keepdim=True) for x in (effect, change))
        wanted = point.scale * effect @ point.q
        if self._centred:
            wanted -= wanted.mean(1, keepdim=True)
        total = float(wanted.square().sum())
        if total > 0:
            self.arrived.append(Arrived(layer.name, 1 - float((wanted - change).square().sum()) / total))

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """JSON and tensors from which :meth:`restore` goes on."""
        tensors = {} if self._point is None else {"streams/q": self._point.q}
        tensors |= {f"streams/at/{alpha:g}": state for alpha, state in self._tried.items()}
        told: dict[str, Any] = {"active": self.active, "scale": self._point and self._point.scale}
        told |= {"arrived": [(one.layer, one.share) for one in self.arrived]}
        told |= {"judged": self.judged, "removed": [*self.removed.items()]}
        return {**told, **self._records()}, tensors

    def _records(self) -> dict[str, Any]:
        return {s.name: s.hidden.record() for s in (self.tuned, self.updated)} if self.active else {}

    def restore(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Go on where :meth:`state` was taken; hidden states once the loop is there."""
        self.active, self.arrived = state["active"], [Arrived(*one) for one in state["arrived"]]
        self.judged, self.removed = state["judged"], dict(state["removed"])
        if state["scale"] is not None:
            self._point = WritePoint(tensors["streams/q"], state["scale"])
        there = {alpha: f"streams/at/{alpha:g}" for alpha in self._strengths}
        self._tried = {alpha: tensors[name] for alpha, name in there.items() if name in tensors}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Take up recorded hidden states, :meth:`beside` a loop."""
        for stream in (self.tuned, self.updated) if self.active else ():
            stream.hidden = Hidden.restored(self._folder, stream.name, state[stream.name], resident=self._resident)

    def files(self) -> list[Path]:
        """Files with all hidden states as they are now; call :meth:`committed` once they are durable."""
        return [stream.hidden.save() for stream in (self.tuned, self.updated)] if self.active else []

    def committed(self) -> None:
        for stream in (self.tuned, self.updated) if self.active else ():
            stream.hidden.committed()


def _explained(found: Fit, normal: Normal) -> float:
    """The energy that a fit takes away from what is missing, and its penalty."""
    energy = float((found.weight.T * normal.cross).sum())
    return energy if found.bias is None else energy + float(found.bias @ normal.output_sum)


def _difference(after: Tensor, before: Tensor, mixing: Any) -> Tensor:
    """Rows of a change of hidden states, as they pair, in float64."""
    rows = (after.to(before) - before).flatten(0, -2).double()
    found: Tensor = rows if mixing is None else mixing(rows)
    return found
