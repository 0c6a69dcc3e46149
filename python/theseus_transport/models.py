"""A base model as the method sees it: its geometry, and its tensors by canonical name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .errors import InputRefused
from .family import Slot
from .spaces import Layout

Tensors = Mapping[str, Tensor]
BELONG = "do config.json and the tensors belong together?"


def tensors_of(model: nn.Module | Tensors) -> Tensors:
    """The parameters and buffers of a module, or the mapping itself (a state dict, a lazy checkpoint)."""
    if hasattr(model, "peft_config"):
        raise InputRefused("this is a PEFT model: give its base, and the adapter's folder to Delta.from_adapter")
    return model.state_dict() if isinstance(model, nn.Module) else model


def shape_of(tensors: Tensors, name: str) -> tuple[int, ...]:
    """Shape of a tensor, without reading it where the mapping knows shapes."""
    shapes = getattr(tensors, "shapes", None)
    return tuple(shapes[name] if shapes is not None else tensors[name].shape)


def dtype_of(tensors: Tensors, name: str) -> torch.dtype:
    """Dtype of a tensor, without reading it where the mapping knows dtypes."""
    dtypes = getattr(tensors, "dtypes", None)
    return dtypes[name] if dtypes is not None else tensors[name].dtype


def double(tensor: Tensor) -> Tensor:
    """Detached, in float64 on the CPU, where updates are computed."""
    return tensor.detach().to("cpu", torch.float64)


def canonical_shapes(layout: Layout, tensors: Tensors) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor by canonical name, nothing read where the mapping knows shapes."""
    return {name: slot.shape(shape_of(tensors, slot.stored)) for name, slot in layout.family.index(tensors).items()}


@dataclass(frozen=True)
class Base:
    """Tensors of one model under canonical names; reads lazily, computes in float64 on the CPU.

    Attributes:
        layout: geometry.
        tensors: as stored.
        slots: canonical name -> where it is stored. A tied head is no tensor of its own.
    """

    layout: Layout
    tensors: Tensors
    slots: dict[str, Slot]

    @classmethod
    def of(cls, model: nn.Module | Tensors, layout: Layout | None = None, config: Any = None) -> Base:
        """From a module, or from tensors with a layout or a config."""
        if layout is None:
            layout = Layout.of(config if config is not None else model if isinstance(model, nn.Module) else {})
        tensors = tensors_of(model)
        slots = layout.family.index(tensors)
        if layout.tied:
            slots.pop(f"{layout.family.heads.get('vocabulary')}.weight", None)
        return cls(layout, tensors, slots)

    def __contains__(self, name: str) -> bool:
        return name in self.slots

    def shape(self, name: str) -> tuple[int, ...]:
        slot = self.slots[name]
        return slot.shape(shape_of(self.tensors, slot.stored))

    def get(self, name: str) -> Tensor | None:
        """The tensor in its own dtype, or None."""
        slot = self.slots.get(name)
        return None if slot is None else slot.view(self.tensors[slot.stored].detach())

    def need(self, name: str) -> Tensor:
        """The tensor in float64 on the CPU.

        Raises:
            InputRefused: the model has no such tensor.
        """
        tensor = self.get(name)
        if tensor is None:
            raise InputRefused(f"the model has no tensor {name}; is the checkpoint complete?")
        return double(tensor)

    def vector(self, name: str, size: int, default: float) -> Tensor:
        """A gain or bias [size] in float64, or ``default`` everywhere where the model has none."""
        tensor = self.get(name)
        if tensor is None:
            return torch.full((size,), default, dtype=torch.float64)
        return double(tensor).clone()  # an update may be added to the model while others are still computed

    def norm(self, name: str | None, size: int) -> tuple[Tensor, Tensor]:
        """(gain, bias) of a norm, both [size]; (1, 0) where there is none."""
        return self.vector(f"{name}.weight", size, 1.0), self.vector(f"{name}.bias", size, 0.0)

    def augmented(self, layer: str) -> Tensor:
        """[W b] of a linear layer, [out, in + 1]."""
        weight = self.need(f"{layer}.weight")
        return torch.cat([weight, self.vector(f"{layer}.bias", len(weight), 0.0).to(weight)[:, None]], 1)


def check_shapes(
    layout: Layout, shapes: Mapping[str, Sequence[int]], *, says: str = "config.json", cure: str = BELONG
) -> None:
    """Compare shapes, by canonical name, with what ``says`` promised, before anything of that size is made."""
    inside = re.compile(rf"{re.escape(layout.family.blocks)}\.(\d+)\.")
    blocks = {match[1] for name in shapes if (match := inside.match(name))}
    if len(blocks) != layout.depth:
        raise InputRefused(f"{says} says {layout.depth} blocks, the tensors are of {len(blocks)}; {cure}")
    roles, width = layout.weights(), layout.width
    expected: dict[str, tuple[int, ...]] = {
        f"{layer.name}.weight": roles[layer.role] for layer in layout.layers() if layer.role in roles
    }
    patches = layout.grid[0] * layout.grid[1] if layout.patch else 0
    for e in layout.family.embeddings:
        rows = {"token": layout.vocabulary, "position": patches and sum(layout.ahead[:1]) + patches}.get(e.slot)
        if e.slot == "patch":
            expected[e.name] = (width, layout.channels or 0, *(layout.patch or ()))
        elif rows:
            expected[e.name] = (1, rows, width)[2 - e.axis :]
    for name, shape in expected.items():
        if name not in shapes:
            raise InputRefused(f"there is no tensor {name}; is the checkpoint complete?")
        if tuple(shapes[name]) != shape:
            raise InputRefused(f"{name} is {list(shapes[name])}, {says} asks for {list(shape)}; {cure}")
