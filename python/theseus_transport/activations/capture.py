"""Capture: hooks that turn two forward passes into cross-moments, batch by batch, keeping no activation."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputRefused
from ..models.family import Slot
from ..models.forward import Batch, backbone, in_evaluation, run_model
from ..models.geometry import Geometry, Space
from ..models.open_attention import open_attention
from ..models.pair import SIDES, Pair
from .links import Link, Pairs
from .moments import CrossMoment, Energy, Grams, add_energies, update_together
from .pairing_tokens import Mixings, mixings

TOGETHER = 5  # spaces of a block: attention, context, MLP, middle and what follows
ALIGNED = 64  # columns at which a tile may begin on a GPU: whole 16-byte vectors of any dtype, half of a kernel's tile


class Capture:
    """Moments of pairs of spaces and energies of pairs of outputs, of two models whose modules run under its hooks.

    Attributes:
        links: name -> the two spaces compared.
        moments: name -> CrossMoment.
        energies: name -> Energy, empty when the recipe needs none.
        grams: name -> side -> the moment of that side with itself, of those that were asked for.
        kept: None, or name -> (source, target) mixed rows of the spaces; then nothing is added to moments and energies.
    """

    def __init__(
        self,
        models: Pair[nn.Module],
        geometries: Pair[Geometry],
        *,
        moments: Mapping[str, Link],
        outputs: Mapping[str, Link],
        grams: Mapping[str, Sequence[int]],
        device: torch.device,
        tile: tuple[int, int] = (0, 1),
    ) -> None:
        """Prepare to see two backbones: spaces of ``moments`` and outputs of ``outputs``; sums lie on ``device``.

        Args:
            grams: name -> the sides, 0 for the source, whose moments with themselves are wanted.
            tile: (k, n): of every moment the k-th of n tiles of columns, to be :meth:`joined`.
        """
        self._models, self._geometries, self._device, self._tile = models, geometries, device, tile
        self._mixings: Mixings = Pair(None, None)
        self._side = 0  # whose modules run; source and target may be one module
        self._pending: dict[str, Tensor] = {}
        self._waiting: dict[str, Pair[Tensor]] = {}  # pairs of rows that are added together
        self._outputs: dict[str, Tensor] = {}  # and those of the present side whose energies are
        self._together = TOGETHER if device.type == "cuda" else 1  # on the CPU waiting would only take memory
        self._seen: set[tuple[int, str]] = set()
        self.links = {**moments, **outputs}
        self.kept: dict[str, Pair[Tensor]] | None = None

        def columns(width: int) -> int:
            return len(range(width)[self._columns(width)])

        def gram(space: Space) -> CrossMoment:
            return CrossMoment.zeros(space.width, columns(space.width), device)

        spaces = {name: (link.source.width, columns(link.target.width)) for name, link in moments.items()}
        self.moments = {name: CrossMoment.zeros(*size, device) for name, size in spaces.items()}
        self.energies = {name: Energy.zeros(*link.widths, device) for name, link in outputs.items()}
        sides = {name: {s: link[s] for s in grams.get(name, ())} for name, link in moments.items()}
        self.grams: dict[str, Grams] = {n: {s: gram(x) for s, x in own.items()} for n, own in sides.items() if own}

    def to(self, device: torch.device) -> None:
        """Move moments, energies and Grams to ``device``; rows that are kept stay where they are."""
        self.moments = {name: moment.to(device) for name, moment in self.moments.items()}
        self.energies = {name: energy.to(device) for name, energy in self.energies.items()}
        self.grams = {name: {s: gram.to(device) for s, gram in own.items()} for name, own in self.grams.items()}

    def joined(self, tiles: Sequence[Capture]) -> Capture:
        """This capture with the moments of all tiles put together, its own the last; each tile's crosses are freed."""
        self.moments = {n: CrossMoment.joined([tile.moments.pop(n) for tile in tiles]) for n in list(self.moments)}
        for name, own in self.grams.items():
            self.grams[name] = {s: CrossMoment.joined([tile.grams[name].pop(s) for tile in tiles]) for s in list(own)}
        return self

    def behind(self, other: Capture) -> Capture:
        """This capture with what ``other`` saw, of other links, in front of what it saw itself."""
        for name in ("links", "moments", "energies", "grams", "kept"):
            own, before = getattr(self, name), getattr(other, name)
            setattr(self, name, own if before is None else {**before, **own})
        return self

    def run(self, source: Batch, target: Batch) -> None:
        """Forward one pair of batches (keyword arguments of each model's forward pass) and add what was seen.

        Raises:
            InputRefused: a space was not seen exactly once on each side, or the two batches do not correspond.
        """

        def whole(side: int, batch: Batch) -> Callable[[], None]:
            model = self._models[side]
            return lambda: run_model(model, self._geometries[side], batch, next(model.parameters()).device)

        self.add(mixings(self._geometries, source, target), whole(0, source), whole(1, target))

    def add(self, rows: Mixings, source: Callable[[], object], target: Callable[[], object]) -> None:
        """Add what is seen while ``source`` and ``target`` run each model's modules on one pair of batches.

        Args:
            rows: the batches' row mixings.

        Raises:
            InputRefused: a space was not seen exactly once on each side.
        """
        self._pending.clear()
        self._waiting.clear()
        self._outputs.clear()
        self._seen.clear()
        self._mixings = rows.map(lambda mixing: mixing and mixing.to(self._device))
        with torch.no_grad():
            for self._side, run in enumerate((source, target)):
                run()
                self._flush_outputs()
            self._flush()
        if unseen := [name for name in self.links if not {(0, name), (1, name)} <= self._seen]:
            name = min(unseen)
            raise InputRefused(f"{name} was not seen in the forward pass of both models ({len(unseen)} such)")

    def _observe(self, side: int, name: str, space: Space, activation: Tensor) -> None:
        if side != self._side:
            return
        # of one row a copy, or all of them would wait with it
        rows = activation.detach()[:, 0].clone() if space.rows == "class" else activation.detach().flatten(0, -2)
        if rows.shape[1] != space.width:
            raise InputRefused(f"{space.module} is {rows.shape[1]} wide, but the config says {space.width}")
        if (side, name) in self._seen:
            raise InputRefused(f"{space.module} ran more than once in one forward pass of the {SIDES[side]}")
        self._seen.add((side, name))
        rows, mixing = rows.to(self._device), self._mixed(name)[side]
        if mixing is not None and mixing.tokens != len(rows):
            raise InputRefused(
                f"{space.module} of the {SIDES[side]} has {len(rows)} tokens where {mixing.tokens} were expected; "
                "are images of the config's size?"
            )
        if name in self.energies:
            if self.kept is None:
                self._outputs[name] = rows
                if len(self._outputs) == self._together:
                    self._flush_outputs()
        elif side == 0:
            self._pending[name] = rows
        elif name in self._pending:
            self._pair(name, self._pending.pop(name), rows)

    def _pair(self, name: str, source: Tensor, target: Tensor) -> None:
        sides = Pair(source, target)
        if self.kept is not None:
            self.kept[name] = Pair(*(x if m is None else m(x) for x, m in sides.zip(self._mixed(name))))
            return
        self._waiting[name] = sides
        if len(self._waiting) == self._together:
            self._flush()

    def _mixed(self, name: str) -> Mixings:
        """How the rows of a link are mixed: class tokens pair up as they are."""
        return self._mixings if self.links[name].whole else Pair(None, None)

    def _alike(self, names: Iterable[str]) -> Iterator[tuple[Mixings, list[str]]]:
        """Of these links those whose rows are mixed alike, with their mixings."""
        for whole in (True, False):
            if own := [name for name in names if self.links[name].whole is whole]:
                yield self._mixed(own[0]), own

    def _flush(self) -> None:
        """Add what waits to be added."""
        for both, names in self._alike(self._waiting):
            waiting = {name: self._waiting[name] for name in names}
            rows = [(own, other[:, self._columns(other.shape[1])]) for own, other in waiting.values()]
            update_together([self.moments[name] for name in waiting], rows, both)
            for side, mixing in enumerate(both):
                own = {name: pair[side] for name, pair in waiting.items() if side in self.grams.get(name, ())}
                twice = [(x, x[:, self._columns(x.shape[1])]) for x in own.values()]
                if own:
                    update_together([self.grams[name][side] for name in own], twice, (mixing, mixing))
        self._waiting.clear()

    def _flush_outputs(self) -> None:
        """Add the outputs of the present side that wait to their energies."""
        for both, names in self._alike(self._outputs):
            rows = [self._outputs[name] for name in names]
            add_energies([self.energies[name] for name in names], self._side, rows, both[self._side])
        self._outputs.clear()

    def _columns(self, width: int) -> slice:
        k, n = self._tile
        unit = ALIGNED if self._device.type == "cuda" and width >= n * ALIGNED else 1
        first, last = (unit * (i * -(-width // unit) // n) for i in (k, k + 1))
        return slice(first, min(last, width))

    @contextmanager
    def opened(self) -> Iterator[Capture]:
        """A context with the hooks on both models; they are gone afterwards."""
        with ExitStack() as stack:
            for side in (0, 1):
                for handle in self._hook(side):
                    stack.callback(handle.remove)
            yield self

    def _hook(self, side: int) -> Iterator[torch.utils.hooks.RemovableHandle]:
        model, family = self._models[side], self._geometries[side].family
        slots = family.modules(name for name, _ in model.named_modules())
        for name, link in self.links.items():
            space = link[side]
            if space.module not in slots:
                raise InputRefused(f"{type(model).__name__} has no {space.module}; is it a {family.model_type}?")
            slot = slots[space.module]
            norm = model.get_submodule(slots[space.norm].stored) if space.side == "normed" and space.norm else None
            module, observe = model.get_submodule(slot.stored), partial(self._observe, side, name, space)
            if space.side == "input":
                yield module.register_forward_pre_hook(_input_hook(observe))
            else:
                yield module.register_forward_hook(_output_hook(observe, slot, norm))


@contextmanager
def capture(
    source: nn.Module,
    target: nn.Module,
    pairs: Pairs,
    *,
    energies: bool = True,
    grams: Mapping[str, Sequence[int]] = MappingProxyType({}),
    wanted: Collection[str] | None = None,
) -> Iterator[Capture]:
    """Open hooks on both models, in evaluation mode; both are as they were afterwards.

    Args:
        pairs: what of the two models is compared.
        energies: whether the energies of outputs are wanted.
        grams: name -> the sides, 0 for the source, whose moments with themselves are wanted.
        wanted: the links that are, by name; None: all.
    """
    with ExitStack() as stack:
        stack.enter_context(in_evaluation(source, target))
        for model in {id(m): m for m in (source, target)}.values():
            stack.enter_context(open_attention(model))
        inside = Pair(backbone(source, pairs.source), backbone(target, pairs.target))
        device = next(inside.target.parameters()).device
        moments, outputs = (
            {name: link for name, link in links.items() if wanted is None or name in wanted}
            for links in ({**pairs.moments, **pairs.class_rows}, pairs.energies if energies else {})
        )
        seen = Capture(inside, pairs.geometries, moments=moments, outputs=outputs, grams=grams, device=device)
        with seen.opened():
            yield seen


Observe = Callable[[Tensor], None]


def _input_hook(observe: Observe) -> Callable[..., None]:
    return lambda module, args: observe(args[0])


def _output_hook(observe: Observe, slot: Slot, norm: nn.Module | None) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, result: Any) -> None:
        output = result[0] if isinstance(result, tuple) else result
        if norm is not None:
            output = norm.forward(output)  # not a call: its own hooks are for the model's pass
        observe(output.chunk(slot.parts, -1)[slot.part])

    return hook
