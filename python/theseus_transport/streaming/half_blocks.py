"""A block in two halves, attention and then the MLP, each with the weights of its own half only.

The first half ends where the norm in front of the MLP is called: what that is given is the residual between the two.
The second begins with it, and with a stand-in for attention that adds zero. Every number is that of the whole block.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any, Literal

from torch import Tensor, nn

from ..models.forward import state_of
from ..models.geometry import Geometry
from .stand_ins import Nothing, Reached

Half = Literal["attention", "mlp"]
HALVES: tuple[Half, Half] = ("attention", "mlp")
ROLES = {"attention": {"query", "key", "value", "output"}, "mlp": {"expand", "contract"}}


def layers_of(geometry: Geometry, half: Half) -> set[str]:
    """Canonical names of all linear layers of one half."""
    return {layer.name for layer in geometry.layers() if layer.role in ROLES[half]}


def of_half(geometry: Geometry, names: Iterable[str], half: Half | None) -> list[str]:
    """Those of the stored ``names`` of blocks' tensors that one half needs; norms and factors serve both halves."""
    family = geometry.family
    other = set[str]().union(*(layers_of(geometry, each) for each in HALVES if half not in (None, each)))
    return [n for n in names if not other & family.parts(family.canonical(n).rpartition(".")[0]).keys()]


class Halves:
    """The two halves of one block, called as the block is; both return hidden states."""

    def __init__(self, model: nn.Module, geometry: Geometry, b: int) -> None:
        family = geometry.family
        slots = family.modules(name for name, _ in model.named_modules())
        inside = [slots[geometry.block(b, name)].stored for name in (family.query, family.output)]
        name, _, self._own = os.path.commonprefix([f"{n}." for n in inside]).rpartition(".")[0].rpartition(".")
        self._parent = model.get_submodule(name)
        self._norm = model.get_submodule(slots[geometry.block(b, family.mlp_norm)].stored)
        self._block = model.get_submodule(slots[f"{family.blocks}.{b}"].stored)
        self._parts = 0

    def attention(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run the block up to the residual in front of the MLP, [samples, tokens, width], and return that."""

        def stop(module: nn.Module, given: tuple[Tensor, ...]) -> None:
            raise Reached(given[0])

        def note(module: nn.Module, given: Any, result: Any) -> None:
            self._parts = len(result) if isinstance(result, tuple) else 0

        handles = (
            self._norm.register_forward_pre_hook(stop, prepend=True),
            getattr(self._parent, self._own).register_forward_hook(note),
        )
        try:
            self._block(*args, **kwargs)
        except Reached as reached:
            between: Tensor = reached.state
            return between
        finally:
            for handle in handles:
                handle.remove()
        raise AssertionError("the norm in front of the MLP did not run")

    def mlp(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run the rest of the block, after :meth:`attention`, which shows how attention returns its result."""
        attention = getattr(self._parent, self._own)
        setattr(self._parent, self._own, Nothing(self._parts))
        try:
            return state_of(self._block(*args, **kwargs))
        finally:
            setattr(self._parent, self._own, attention)
