"""Four models side by side: source and target, and both as changed, S+ by its tune, T+ by what moved so far.

One block after the other: the block of S+ runs; that of T+ runs with what the prior moved of the update, and each layer
that writes the residual is fitted to what is missing behind it of the effect x(S+) - x(S). Then the block is written.
All are fed the same tokens; nothing is ever run backwards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..activations.effects import EffectMoment
from ..activations.moments import Energy, add_energies
from ..activations.pairing_tokens import Mixings, of_class_token, of_samples
from ..models.forward import state_of
from ..models.geometry import Layer
from ..models.pair import Pair
from ..recipes.effect import write_point, writers
from ..recipes.solver import Solver
from ..updates.computed import ComputedUpdate
from .changed_weights import Scaled, TunedWeights, UpdatedWeights
from .hidden_states import Hidden
from .loop import Loop
from .predictions import Predictions
from .schedule import Visit
from .skeleton import Weights
from .stand_ins import Reached
from .stream import Arrived, Stream, WritePoint, difference
from .writer_fit import solve

JUDGES = 4  # one sample of so many judges the penalty of fits to the others, where it is chosen


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
        streams = self.tuned, self.updated
        self._predictions = Predictions(loop, self._solver, self._update, streams, self._batches)

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
        """Once all blocks ran: fit a head that the tune trained, if one is planned."""
        if self.active:
            self._predictions.fit_head(self._of_tuned)
        self._update.unchanged |= self._update.fits.reached(self._update.fits.heads)

    def judge(self) -> None:
        """Once all blocks ran and all maps are there: how much of the divergence is removed, at every strength."""
        self.judged = True
        if self._loop.held is not None and self.active:
            states: dict[float, tuple[Tensor, Weights]] = {1.0: (self.updated[self._held], self._of_updated)}
            states |= {alpha: (self._tried[alpha], weights) for alpha, weights in self._trials().items()}
            self.removed = self._predictions.removed(states, self._held)

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
                        self._point = self._predictions.corrected(self._point)
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
        solve(self._update, layer, normals, self._recipe, wanted=wanted)
        self._of_updated.forget(*self._update.stored_in(layer.name))

    def _parts(self, rows: Mixings, states: Tensor, count: int) -> list[Mixings]:
        """The rows of a batch that are fitted, and those that judge a penalty that is to be chosen.

        Args:
            states: of the target, [samples, tokens, width]; count: of samples in the batches before.
        """
        if self._recipe.ridge:
            return [rows]
        judge = torch.arange(count, count + len(states), device=self._loop.device) % JUDGES == JUDGES - 1
        return [of_samples(rows, states.shape[1], samples) for samples in (~judge, judge)]

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
        effect, change = (difference(*both, mixing) for both, mixing in zip(pairs, mixings, strict=True))
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
