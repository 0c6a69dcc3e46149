"""Capture: hooks that turn two forward passes into cross-moments, batch by batch, keeping no activation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from . import tokens
from .errors import InputRefused
from .moments import CrossMoment, Energy
from .spaces import Layout, Space
from .tokens import RowMixing

Batch = Mapping[str, Any]
Mixings = tuple[RowMixing | None, RowMixing | None]


class Capture:
    """Moments of every space and energies of every output, for two models of one family and equal depth.

    Attributes:
        moments: space name -> CrossMoment.
        energies: layer name -> Energy, empty when the recipe needs none.
    """

    def __init__(self, source: nn.Module, target: nn.Module, layouts: tuple[Layout, Layout], *, energies: bool) -> None:
        self._models = (_backbone(source), _backbone(target))
        self._layouts = layouts
        self._devices = tuple(next(m.parameters()).device for m in self._models)
        self._mixings: Mixings = (None, None)
        self._side = 0  # whose forward pass is running; source and target may be one module
        self._pending: dict[str, Tensor] = {}
        self._done: set[str] = set()
        self._spaces = [_paired(la.spaces(), la.outputs() if energies else []) for la in layouts]
        device = self._devices[1]
        widths = {name: tuple(side[name].width for side in self._spaces) for name in self._spaces[0]}
        outputs = {s.name for s in layouts[0].outputs()}
        self.moments = {n: CrossMoment.zeros(w[0], w[1], device) for n, w in widths.items() if n not in outputs}
        self.energies = {n: Energy.zeros(w[0], w[1], device) for n, w in widths.items() if n in outputs}

    def run(self, source: Batch, target: Batch) -> None:
        """Forward one pair of batches (keyword arguments of each model's forward pass) and add what was seen.

        Raises:
            InputRefused: a space was not seen exactly once on each side, or the two batches do not correspond.
        """
        self._pending.clear()
        self._done.clear()
        self._mixings = tuple(m and m.to(self._devices[1]) for m in mixings(self._layouts, source, target))  # type: ignore[assignment]
        with torch.no_grad():
            for self._side, batch in enumerate((source, target)):
                model, device = self._models[self._side], self._devices[self._side]
                inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items() if k != "offsets"}
                if "input_ids" in inputs:
                    inputs["use_cache"] = False
                model(**inputs)
        if unseen := set(self._spaces[0]) - self._done:
            raise InputRefused(
                f"{sorted(unseen)[0]} was not seen in the forward pass of both models ({len(unseen)} such)"
            )

    def _observe(self, side: int, space: Space, activation: Tensor) -> None:
        if side != self._side:
            return
        rows = activation.detach().flatten(0, -2)
        if rows.shape[1] != space.width:
            raise InputRefused(f"{space.module} is {rows.shape[1]} wide, but the config says {space.width}")
        if side == 0:
            if space.name in self._pending:
                raise InputRefused(f"{space.module} ran more than once in one forward pass of the source")
            self._pending[space.name] = rows.to(self._devices[1])
            return
        if space.name in self._done or space.name not in self._pending:
            raise InputRefused(f"{space.module} ran more than once, or only in the target's forward pass")
        moment = self.moments.get(space.name) or self.energies[space.name]
        moment.update(self._pending.pop(space.name), rows, *self._mixings)
        self._done.add(space.name)

    def _hook(self, side: int) -> Iterator[torch.utils.hooks.RemovableHandle]:
        model = self._models[side]
        names = self._layouts[side].family.index(name for name, _ in model.named_modules())
        for space in self._spaces[side].values():
            if space.module not in names:
                raise InputRefused(
                    f"{type(model).__name__} has no {space.module}; is it a {self._layouts[side].family.model_type}?"
                )
            module = model.get_submodule(names[space.module])
            if space.side == "input":
                yield module.register_forward_pre_hook(_input_hook(self._observe, side, space))
            else:
                yield module.register_forward_hook(_output_hook(self._observe, side, space))


@contextmanager
def capture(
    source: nn.Module, target: nn.Module, layouts: tuple[Layout, Layout], *, energies: bool
) -> Iterator[Capture]:
    """Open hooks on both models, in evaluation mode; both are as they were afterwards."""
    session = Capture(source, target, layouts, energies=energies)
    training = [(m, m.training) for model in (source, target) for m in model.modules()]
    handles: list[torch.utils.hooks.RemovableHandle] = []
    try:
        for side in (0, 1):
            handles.extend(session._hook(side))
        source.eval(), target.eval()
        yield session
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in training:
            module.training = mode


def mixings(layouts: tuple[Layout, Layout], source: Batch, target: Batch) -> Mixings:
    """Which source tokens stand for which target tokens in one pair of batches.

    Images: the source's patch grid is interpolated to the target's. Text of one tokenizer: the unmasked tokens. Text of
    two: ``offsets`` int64 [samples, tokens, 2] on both sides mix source tokens onto target tokens by shared characters.

    Raises:
        InputRefused: the two batches do not hold the same samples or tokens.
    """
    key = "pixel_values" if layouts[0].family.modality == "vision" else "input_ids"
    for side, batch in (("source", source), ("target", target)):
        if key not in batch:
            raise InputRefused(f"the {side} batch has no {key}, only {', '.join(batch) or 'nothing'}")
    samples = len(source[key])
    if samples != len(target[key]):
        raise InputRefused(f"the source batch has {samples} samples, the target batch {len(target[key])}")
    if key == "pixel_values":
        grids = [layout.grid for layout in layouts]
        return (None if grids[0] == grids[1] else tokens.bilinear(*grids).batched(samples), None)
    if "offsets" in source and "offsets" in target:
        return _by_characters(source, target)
    shapes = [tuple(b[key].shape) for b in (source, target)]
    if shapes[0] != shapes[1]:
        raise InputRefused(
            f"source input_ids are {list(shapes[0])}, target input_ids {list(shapes[1])}; they must pair up"
        )
    masks = [b.get("attention_mask") for b in (source, target)]
    if masks[0] is None and masks[1] is None:
        return None, None
    if masks[0] is None or masks[1] is None or not torch.equal(masks[0].cpu().bool(), masks[1].cpu().bool()):
        raise InputRefused("the attention masks of source and target differ; give both models the same masked tokens")
    chosen = tokens.select(masks[1].cpu())
    return chosen, chosen


def _by_characters(source: Batch, target: Batch) -> Mixings:
    """Row mixings of a batch whose two sides were cut by different tokenizers."""
    columns, pointers, weights, kept_rows = [], [torch.zeros(1, dtype=torch.int64)], [], []
    width, entries = source["offsets"].shape[1], 0
    for i, (own, other) in enumerate(zip(source["offsets"], target["offsets"], strict=True)):
        mixing, kept = tokens.overlap(own, other)
        assert mixing.row_ptr is not None and mixing.weight is not None
        columns.append(mixing.column + i * width)
        weights.append(mixing.weight)
        pointers.append(mixing.row_ptr[1:] + entries)
        entries += len(mixing.column)
        kept_rows.append(kept)
    mixed = RowMixing(torch.cat(columns), width * len(columns), torch.cat(pointers), torch.cat(weights))
    return mixed, tokens.select(torch.stack(kept_rows))


def _backbone(model: nn.Module) -> nn.Module:
    """The model without its head: transformers' own ``base_model``."""
    return getattr(model, "base_model", model)


def _paired(spaces: list[Space], outputs: list[Space]) -> dict[str, Space]:
    return {s.name: s for s in (*spaces, *outputs)}


Observe = Callable[[int, Space, Tensor], None]


def _input_hook(observe: Observe, side: int, space: Space) -> Callable[..., None]:
    return lambda module, args: observe(side, space, args[0])


def _output_hook(observe: Observe, side: int, space: Space) -> Callable[..., None]:
    return lambda module, args, result: observe(side, space, result)
