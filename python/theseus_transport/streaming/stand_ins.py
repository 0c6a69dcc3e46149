"""What stands in for parts of a model: an embedding of some rows, blocks that take notes, no attention."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputRefused
from ..models.forward import Call, hidden_of


class Reached(Exception):  # noqa: N818 - no error: the forward pass has come as far as it is wanted
    """A forward pass is cut short here, at these hidden states."""

    def __init__(self, state: Any) -> None:
        super().__init__()
        self.state = state


class Rows(nn.Module):
    """An embedding of which only some rows are there."""

    def __init__(self, ids: Tensor, weight: Tensor) -> None:
        """An embedding of the sorted ids [n] that occur, with their rows [n, width]."""
        super().__init__()
        self.ids, self.weight = ids, weight

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(torch.searchsorted(self.ids, ids), self.weight)


class Recorders:
    """Stand-ins for blocks that note what they are called with and hand hidden states on."""

    def __init__(self, depth: int) -> None:
        self.modules = [Recorder(self, b) for b in range(depth)]
        self.first: Tensor | None = None
        self.wrapped = False  # whether the model expects a tuple of a block
        self.calls: list[Call] = []

    def caught(self, run: Callable[[], object]) -> tuple[Tensor, list[Call]]:
        """The first block's input, and what else each block is called with, when the model runs."""
        for _ in range(2):  # once more where it turns out that blocks return tuples
            self.calls, self.first = [], None
            with suppress(Reached):
                run()
            if self.first is not None and len(self.calls) == len(self.modules):
                return self.first, self.calls
            self.wrapped = True
        raise InputRefused(f"block {len(self.calls)} of {len(self.modules)} did not run; is the depth the config's?")


class Recorder(nn.Module):
    """In place of one block: notes what it is called with, and hands hidden states on."""

    def __init__(self, recorders: Recorders, b: int) -> None:
        super().__init__()
        self._recorders, self._b = (recorders,), b  # in a tuple: no module of this one

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        (recorders,) = self._recorders
        hidden, rest = hidden_of(args, kwargs), args[1:]
        named = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        recorders.first = hidden if recorders.first is None else recorders.first
        if not isinstance(hidden, Tensor) or hidden.shape != recorders.first.shape:
            raise Reached(hidden)
        recorders.calls.append((rest, named))
        if self._b + 1 == len(recorders.modules):
            raise Reached(hidden)
        return (hidden,) if recorders.wrapped else hidden


class Nothing(nn.Module):
    """In place of attention: returns zeros of the shape of the hidden states, which the residual takes."""

    def __init__(self, parts: int) -> None:
        """Return a tuple of ``parts``, of which the first is the zeros, the others None; 0: the zeros by themselves."""
        super().__init__()
        self._parts = parts

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        zero = torch.zeros_like(hidden_of(args, kwargs))
        return (zero, *[None] * (self._parts - 1)) if self._parts else zero
