"""The block loop: both models run block by block, so that no more than a pair of blocks is ever in memory."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..activations.capture import Capture
from ..activations.pairing_tokens import mixings
from ..models.forward import Batch, Call, state_of
from ..models.geometry import Geometry
from ..models.pair import SIDES, Pair
from .half_blocks import Half, layers_of
from .hidden_states import Hidden
from .schedule import Visit
from .skeleton import Skeleton
from .window import Window

Step = Callable[[], object]
Run = Callable[..., Any]  # a block, or a half of it


class Side:
    """One model between two blocks: its weights, its hidden states, and what its blocks are called with."""

    def __init__(self, window: Window, geometry: Geometry, batches: Sequence[Batch], device: torch.device) -> None:
        self.window, self.geometry, self.batches, self.device = window, geometry, batches, device
        self.skeleton = Skeleton(window, geometry, device)
        window.send_to(self.skeleton.upload)
        self.calls: list[list[Call]] = []
        self.hidden: Hidden
        self.between: Hidden | None = None  # residuals in front of the MLP of the block that ran last, if they are kept
        self._seen_between: Tensor | None = None
        self._kept: Collection[int] = ()
        self._names = geometry.family.by_block(window)

    def names(self, b: int | None) -> list[str]:
        """The stored tensors of a block; none where there is no such block."""
        return [] if b is None else self._names.get(b, [])

    def step(self, block: Run, b: int, i: int, norms: Sequence[nn.Module] = (), *, stay: bool = False) -> Tensor:
        """Run block ``b`` on batch ``i``, and ``norms`` on its result; ``stay``: hidden states remain as they are."""
        rest, named = self.calls[i][b]
        state = state_of(block(self.hidden[i].to(self.device), *rest, **named))
        if not stay:
            self.hidden.put(i, state)
            if self.between is not None and self._seen_between is not None and i in self._kept:
                self.between.append(self._seen_between)
        for norm in norms:
            norm(state)
        return state

    @contextmanager
    def keeping_between(
        self, b: int, batches: Collection[int], folder: Path, name: str, *, resident: bool
    ) -> Iterator[None]:
        """Keep the residual in front of the MLP of block ``b`` of those of these batches that run through it."""
        self._kept = batches
        self.between = Hidden(folder, f"between-{name}", resident=resident)

        def note(module: nn.Module, given: tuple[Tensor, ...]) -> None:
            self._seen_between = given[0]

        norm = self.skeleton.inside(b, self.geometry.family.mlp_norm)
        handle = norm.register_forward_pre_hook(note)
        try:
            yield
        finally:
            handle.remove()
            self._seen_between = None


class Loop:
    """Two models run side by side.

    Attributes:
        sides: source and target.
        rows: of every pair of batches, which source tokens stand for which target tokens.
        held: the number of the pair that is held out, if one is.
        between: numbers of those of which the residuals in front of the MLP of the blocks that ran last are kept.
    """

    def __init__(
        self,
        windows: Pair[Window],
        geometries: Pair[Geometry],
        batches: Sequence[Pair[Batch]],
        *,
        held: int | None,
        grams: Mapping[str, Sequence[int]],
        device: torch.device,
        folder: Path,
        resident: bool,
        tiles: int = 1,
        halves: bool = False,
    ) -> None:
        """
        Args:
            batches: pairs of batches; ``held``: the number of the one that is kept rather than added up, if any.
            grams: as of :class:`Capture`.
            folder: for files of hidden states; ``resident``: whether these stay in memory beside.
            tiles: of columns in which moments are added up, each in a pass of the blocks, and put together on the host.
            halves: attention and MLP of a block run one after the other, over all batches each.
        """
        sides = zip(windows, geometries, zip(*batches, strict=True), strict=True)
        self.sides = Pair(*(Side(window, geometry, own, device) for window, geometry, own in sides))
        self._geometries, self.held, self._grams, self.device = geometries, held, grams, device
        self.rows = [mixings(geometries, *pair) for pair in batches]
        self._folder, self._resident, self._tiles = folder, resident, tiles
        self._halves = halves
        self.between: Collection[int] = ()

    def visit(self, visit: Visit, *, first: bool, done: Step = lambda: None) -> Capture:
        """Run a visit's blocks on all batches (the embeddings, where it is the ``first``); returns what was seen.

        Args:
            done: called after every batch.
        """
        if first:
            return self._embed(visit, done)
        for side, b in self.sides.zip(visit.blocks):
            side.window.hold(side.names(b))
        if not self._halves or visit.blocks == (None, None):
            return self._run(visit, None, done)
        attention, mlp = visit.halved(layers_of(self._geometries.target, "attention"))
        seen = self._run(attention, "attention", lambda: None)
        return self._run(mlp, "mlp", done).behind(seen)

    def _run(self, visit: Visit, half: Half | None, done: Step) -> Capture:
        """All batches through what a visit runs, or through one half of it."""
        with ExitStack() as stack:
            runs = []
            for name, side, b, norms in zip(SIDES, self.sides, visit.blocks, visit.norms, strict=True):
                if self.between and b is not None and half != "attention":
                    how = {"resident": self._resident}
                    stack.enter_context(side.keeping_between(b, self.between, self._folder, name, **how))
                filled = None if b is None else stack.enter_context(side.skeleton.filled(b, half))
                runs.append((side, filled, b, [side.skeleton.norm(name) for name in sorted(norms)]))
            count, tiles = self._tiles if visit.moments else 1, list[Capture]()
            for k in range(count):
                last = k + 1 == count
                seen = self._capture(visit if last else replace(visit, outputs={}), (k, count))
                with seen.opened():
                    for i, rows in enumerate(self.rows):
                        if i == self.held and not last:
                            break
                        self._keep(seen, i)
                        seen.add(rows, *(_step(*run, i, stay=not last) for run in runs))
                        if last:
                            done()
                if count > 1:
                    seen.to(torch.device("cpu"))
                tiles.append(seen)
        return seen if count == 1 else seen.joined(tiles)

    def _embed(self, visit: Visit, done: Step) -> Capture:
        seen = self._capture(visit)
        for side, name in self.sides.zip(SIDES):
            side.hidden, side.calls = Hidden(self._folder, name, resident=self._resident), []
        with ExitStack() as stack:
            stack.enter_context(seen.opened())
            runs = []
            for side, names in self.sides.zip(visit.norms):
                norms = [side.skeleton.norm(name) for name in sorted(names)]
                runs.append((side, stack.enter_context(side.skeleton.ahead(side.batches)), norms))
            for i, rows in enumerate(self.rows):
                self._keep(seen, i)
                seen.add(rows, *(_embedding(*run, i) for run in runs))
                done()
        return seen

    def _capture(self, visit: Visit, tile: tuple[int, int] = (0, 1)) -> Capture:
        models = self.sides.map(lambda side: side.skeleton.model)
        links: dict[str, Mapping[str, Any]] = {"moments": visit.moments, "outputs": visit.outputs}
        return Capture(models, self._geometries, **links, grams=self._grams, device=self.device, tile=tile)

    def _keep(self, seen: Capture, i: int) -> None:
        """From the batch that is held out on, rows are kept."""
        if i == self.held:
            seen.kept = {}

    def files(self) -> list[Path]:
        """Files with all hidden states as they are now; call :meth:`committed` once they are durable."""
        return [side.hidden.save() for side in self.sides]

    def committed(self) -> None:
        for side in self.sides:
            side.hidden.committed()

    def record(self) -> dict[str, Any]:
        """What :meth:`resume` needs beside the files of hidden states, as JSON."""
        return {name: side.hidden.record() for name, side in SIDES.zip(self.sides)}

    @torch.no_grad()
    def resume(self, record: Mapping[str, Any]) -> None:
        """Go on from recorded hidden states; what blocks are called with is found again by running the embeddings."""
        for name, side in SIDES.zip(self.sides):
            side.hidden = Hidden.restored(self._folder, name, record[name], resident=self._resident)
            with side.skeleton.ahead(side.batches) as embed:
                side.calls = [embed(i)[1] for i in range(len(side.batches))]


def _step(side: Side, block: Run | None, b: int | None, norms: Sequence[nn.Module], i: int, *, stay: bool) -> Step:
    def run() -> None:
        if block is not None and b is not None:
            side.step(block, b, i, norms, stay=stay)
        else:
            for norm in norms:
                norm(side.hidden[i].to(side.device))

    return run


def _embedding(side: Side, embed: Callable[[int], Any], norms: Sequence[nn.Module], i: int) -> Step:
    def run() -> None:
        state, calls = embed(i)
        side.calls.append(calls)
        side.hidden.append(state)
        for norm in norms:
            norm(state)

    return run


def alone(
    window: Window, geometry: Geometry, batches: Sequence[Batch], device: torch.device, folder: Path | None = None
) -> Side:
    """One model with its embeddings run, for a pass by itself; hidden states lie in ``folder``, or in memory."""
    side = Side(window, geometry, batches, device)
    side.hidden = Hidden(folder or Path(), "alone", resident=folder is None)
    with torch.no_grad(), side.skeleton.ahead(batches) as embed:
        for i in range(len(batches)):
            _embedding(side, embed, (), i)()
    return side
