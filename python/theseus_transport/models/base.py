"""A base model as the method sees it: tensors by canonical name, checked against its geometry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputRefused
from .family import Slot
from .geometry import Geometry
from .tensors import CPU, Tensors, double, fresh, part_of, shape_of, tensors_of

BELONG = "do config.json and the tensors belong together?"


def canonical_shapes(geometry: Geometry, tensors: Tensors) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor by canonical name, nothing read where the mapping knows shapes."""
    return {name: slot.shape(shape_of(tensors, slot.stored)) for name, slot in geometry.family.index(tensors).items()}


@dataclass(frozen=True)
class Base:
    """Tensors of one model under canonical names; reads lazily, computes in float64.

    Attributes:
        geometry: sizes and names, which its tensors were checked against.
        tensors: as stored.
        slots: canonical name -> where it is stored. A tied head is no tensor of its own.
        device: where it computes; tensors are copied there one at a time.
    """

    geometry: Geometry
    tensors: Tensors
    slots: dict[str, Slot]
    device: torch.device = CPU

    @classmethod
    def of(
        cls,
        model: nn.Module | Tensors,
        geometry: Geometry | None = None,
        config: Any = None,
        *,
        device: torch.device = CPU,
    ) -> Base:
        """A base of a module, or of tensors (a state dict, a lazy checkpoint) with their geometry or a config.

        Raises:
            InputRefused: the config is of no family, or the tensors have other shapes than it says.
        """
        tensors = tensors_of(model)
        if geometry is None:
            own: Any = model if isinstance(model, nn.Module) else {}
            geometry = Geometry.of(own if config is None else config, tensors)
        slots = geometry.family.index(tensors)
        if geometry.tied:
            slots.pop(f"{geometry.family.heads.get('vocabulary')}.weight", None)
        return cls(geometry, tensors, slots, device)

    def __contains__(self, name: str) -> bool:
        return name in self.slots

    def shape(self, name: str) -> tuple[int, ...]:
        slot = self.slots[name]
        return slot.shape(shape_of(self.tensors, slot.stored))

    def get(self, name: str, rows: slice | None = None) -> Tensor | None:
        """The tensor, or these of its rows, in its own dtype; None where there is none."""
        slot = self.slots.get(name)
        return None if slot is None else part_of(self.tensors, slot, rows)

    def need(self, name: str, rows: slice | None = None) -> Tensor:
        """The tensor, or these of its rows, in float64 on the device.

        Raises:
            InputRefused: the model has no such tensor.
        """
        tensor = self.get(name, rows)
        if tensor is None:
            raise InputRefused(f"the model has no tensor {name}; is the checkpoint complete?")
        return double(tensor, self.device)

    def vector(self, name: str, size: int, default: float, rows: slice | None = None) -> Tensor:
        """A gain or bias [size] in float64, or ``default`` everywhere where the model has none."""
        tensor = self.get(name, rows)
        if tensor is None:
            return torch.full((size,), default, dtype=torch.float64, device=self.device)
        return fresh(tensor, self.device)  # an update may be added to the model while others are still computed

    def norm(self, name: str | None, size: int) -> tuple[Tensor, Tensor]:
        """(gain, bias) of a norm, both [size]; (1, 0) where there is none."""
        return self.vector(f"{name}.weight", size, 1.0), self.vector(f"{name}.bias", size, 0.0)

    def augmented(self, layer: str) -> Tensor:
        """[W b] of a linear layer, [out, in + 1]."""
        weight = self.need(f"{layer}.weight")
        return torch.cat([weight, self.vector(f"{layer}.bias", len(weight), 0.0).to(weight)[:, None]], 1)


def check_shapes(
    geometry: Geometry, shapes: Mapping[str, Sequence[int]], *, says: str = "config.json", cure: str = BELONG
) -> None:
    """Compare shapes, by canonical name, with what ``says`` promised, before anything of that size is made."""
    blocks = {geometry.family.block_of(name) for name in shapes} - {None}
    if len(blocks) != geometry.depth:
        raise InputRefused(f"{says} says {geometry.depth} blocks, the tensors are of {len(blocks)}; {cure}")
    roles, width = geometry.weights(), geometry.width
    expected: dict[str, tuple[int, ...]] = {
        f"{layer.name}.weight": roles[layer.role] for layer in geometry.layers() if layer.role in roles
    }
    positions = geometry.ahead[0] + geometry.grid[0] * geometry.grid[1] if geometry.patch else geometry.positions
    for e in geometry.family.embeddings:
        rows = {"token": geometry.vocabulary, "position": positions}.get(e.slot)
        if e.slot == "patch":
            expected[e.name] = (width, geometry.channels or 0, *(geometry.patch or ()))
        elif rows:
            expected[e.name] = (1, rows, width)[2 - e.axis :]
    for name, shape in expected.items():
        if name not in shapes:
            raise InputRefused(f"there is no tensor {name}; is the checkpoint complete?")
        if tuple(shapes[name]) != shape:
            raise InputRefused(f"{name} is {list(shapes[name])}, {says} asks for {list(shape)}; {cure}")
