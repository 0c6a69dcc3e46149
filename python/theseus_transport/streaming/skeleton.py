"""A model whose weights come and go: built on the meta device, its blocks filled one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Protocol

import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor, nn

from ..errors import InputRefused
from ..models.base import BELONG
from ..models.forward import Batch, Call, backbone, run_model
from ..models.geometry import Geometry
from ..models.loading import model_of
from .half_blocks import Half, Halves, of_half
from .stand_ins import Recorders, Rows
from .upload import Upload
from .window import Window


class Weights(Protocol):
    """Tensors of one model by the name under which its checkpoint stores them."""

    def __getitem__(self, name: str) -> Tensor: ...

    def take(self, name: str, index: Tensor) -> Tensor:
        """The rows that ``index`` names (int64, ascending, each once), [len(index), ...]."""

    def rows(self, name: str, rows: slice) -> Tensor:
        """Consecutive rows of a tensor, [rows, ...]."""


TOWERS: dict[str, Any] = {"clip": transformers.CLIPVisionModel, "siglip": transformers.SiglipVisionModel}


class Skeleton:
    """The backbone of a checkpoint, for forward passes in float32 (float64 where the checkpoint is), block by block.

    Attributes:
        upload: brings its weights to the device; a window that sends to it has them there ahead of time.
        model: parameters on the meta device, but for the block that is filled and what runs around the blocks.
        blocks: its blocks, first to last.
    """

    def __init__(self, window: Window, geometry: Geometry, device: torch.device) -> None:
        """Raises InputRefused where transformers cannot build it, or tensors are missing (they would be random)."""
        self.geometry, self._window, self._device = geometry, window, device
        self._dtype = window.checkpoint.compute_dtype
        made = getattr(window.checkpoint, "emptied", partial(_built, window, geometry, self._dtype))()
        self.model = backbone(made, geometry).eval()
        for buffer in self.model.buffers():
            buffer.data = buffer.data.to(device)
        family = geometry.family
        stored = {family.canonical(name): name for name in window}
        self._stored = {n: stored.get(family.canonical(n)) for n, _ in self.model.named_parameters()}
        _check_names(window, geometry, self._stored)
        self.upload = Upload(device, filter(None, self._stored.values()))
        spelled = family.spelled(name for name, _ in self.model.named_modules())
        self._block_names = [spelled[f"{family.blocks}.{b}"] for b in range(geometry.depth)]
        self.blocks = [self.model.get_submodule(name) for name in self._block_names]
        self._meta = dict(self.model.named_parameters())
        self._last_halves: tuple[int, Halves] | None = None

    @contextmanager
    def filled(self, b: int, half: Half | None = None, weights: Weights | None = None) -> Iterator[Callable[..., Any]]:
        """Block ``b``, or one half of it, with its weights; they are gone afterwards.

        Args:
            weights: what it is filled with, by stored name, if not with the base's own.
        """
        start = f"{self._block_names[b]}."
        names = of_half(self.geometry, (name for name in self._meta if name.startswith(start)), half)
        try:
            for name in names:
                self._fill(name, weights)
            yield self.blocks[b] if half is None else getattr(self._halves(b), half)
        finally:
            for name in names:
                self._assign(name, self._meta[name])

    def _halves(self, b: int) -> Halves:
        """Of a block; its MLP's half goes on from its attention's, so these are one object's."""
        if self._last_halves is None or self._last_halves[0] != b:
            self._last_halves = b, Halves(self.model, self.geometry, b)
        return self._last_halves[1]

    def inside(self, b: int, name: str) -> nn.Module:
        """The module that computes a canonical layer or norm of block ``b``."""
        slots = self.geometry.family.modules(name for name, _ in self.model.named_modules())
        return self.model.get_submodule(slots[self.geometry.block(b, name)].stored)

    def norm(self, module: str) -> nn.Module:
        """A norm between blocks by its canonical name, with its weights, which stay: they are small."""
        spelled = self.geometry.family.spelled(name for name, _ in self.model.named_modules())[module]
        for name in self._meta:
            if name.startswith(f"{spelled}.") and self.model.get_parameter(name).is_meta:
                self._fill(name)
        return self.model.get_submodule(spelled)

    @contextmanager
    def ahead(
        self, batches: Sequence[Batch], weights: Weights | None = None
    ) -> Iterator[Callable[[int], tuple[Tensor, list[Call]]]]:
        """A function that runs what lies in front of the blocks on a batch, by its number.

        It returns the first block's input [samples, tokens, width] and, by block, what else the model calls it with
        (masks, rotary tables; blocks share tensors). The weights it takes are gone afterwards.

        Args:
            weights: as of :meth:`filled`.
        """
        recorders, token = Recorders(self.geometry.depth), self.geometry.family.embedding("token")
        with ExitStack() as stack:
            for name, recorder in zip(self._block_names, recorders.modules, strict=True):
                stack.enter_context(self._swapped(name, recorder))
            for name, module in list(self.model.named_modules()):
                weight = f"{name}.weight"
                if token and type(module) is nn.Embedding and self.geometry.family.canonical(weight) == token.name:
                    stack.enter_context(self._swapped(name, self._rows(weight, batches, weights)))
                elif next(module.parameters(recurse=False), None) is not None:
                    stack.callback(module.register_forward_pre_hook(self._on_demand(name, weights)).remove)
            stack.callback(self._empty)
            yield lambda i: recorders.caught(lambda: run_model(self.model, self.geometry, batches[i], self._device))

    @contextmanager
    def _swapped(self, name: str, stand_in: nn.Module) -> Iterator[None]:
        parent, _, own = name.rpartition(".")
        place, module = self.model.get_submodule(parent), self.model.get_submodule(name)
        setattr(place, own, stand_in)
        try:
            yield
        finally:
            setattr(place, own, module)

    def _empty(self) -> None:
        """Let go of all weights outside blocks."""
        recorded = dict(self.model.named_parameters())
        for name in recorded.keys() & self._meta.keys():
            self._assign(name, self._meta[name])

    def _on_demand(self, module: str, weights: Weights | None) -> Callable[[nn.Module, Any], None]:
        """A hook that fills a module's own parameters when it runs."""

        def fill(_: nn.Module, args: Any) -> None:
            for own, parameter in self.model.get_submodule(module).named_parameters(recurse=False):
                if parameter.is_meta:
                    self._fill(f"{module}.{own}" if module else own, weights)

        return fill

    def _rows(self, name: str, batches: Sequence[Batch], weights: Weights | None) -> Rows:
        """The token embedding, with the rows that occur alone."""
        ids = torch.cat([batch["input_ids"].flatten() for batch in batches]).unique()
        stored = self._stored[name]
        assert stored is not None
        return Rows(ids.to(self._device), self.upload.bring((weights or self._window).take(stored, ids), self._dtype))

    def _fill(self, name: str, weights: Weights | None = None) -> None:
        stored, meta = self._stored[name], self._meta[name]
        if stored is None:  # it stays behind by rule, as nothing reads it
            return
        if weights is None:
            tensor = self.upload.take(stored, self._window[stored], self._dtype)
        else:
            tensor = self.upload.bring(weights[stored], self._dtype)
        if tensor.shape != meta.shape:
            raise InputRefused(f"{stored} is {list(tensor.shape)}, config.json asks for {list(meta.shape)}; {BELONG}")
        self._assign(name, nn.Parameter(tensor, requires_grad=False))

    def _assign(self, name: str, parameter: nn.Parameter) -> None:
        module, _, own = name.rpartition(".")
        self.model.get_submodule(module)._parameters[own] = parameter


def _built(window: Window, geometry: Geometry, dtype: torch.dtype) -> nn.Module:
    extra = {"add_pooling_layer": False} if geometry.family.model_type == "vit" else {}
    with init_empty_weights(include_buffers=False):
        tower = TOWERS.get(window.config["model_type"])
        model: nn.Module = model_of(window.folder, tower, dtype=dtype, **extra)
    return model


def _check_names(window: Window, geometry: Geometry, stored: Mapping[str, str | None]) -> None:
    family = geometry.family
    lacking = (name for name, found in stored.items() if found is None)
    if missing := sorted(name for name in lacking if not family.why_left(family.canonical(name))):
        raise InputRefused(f"{window.folder} lacks {missing[0]} ({len(missing)} such tensors); is it complete?")
    known = {family.canonical(name) for name in stored}
    inside = [n for n in window if family.canonical(n).startswith(family.blocks)]
    unread = [n for n in inside if family.canonical(n) not in known and not family.why_left(family.canonical(n))]
    if unread:
        raise InputRefused(
            f"{window.folder}: config.json has no place for {min(unread)} ({len(unread)} such); {BELONG}"
        )
