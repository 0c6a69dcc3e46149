"""One model as changed, beside its base, and what is known of it where layers write the residual."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..activations.row_mixing import RowMixing
from ..models.forward import state_of
from .hidden_states import Hidden
from .loop import Side
from .skeleton import Weights


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


def difference(after: Tensor, before: Tensor, mixing: RowMixing | None) -> Tensor:
    """Rows of a change of hidden states, as they pair, in float64."""
    rows = (after.to(before) - before).flatten(0, -2).double()
    return rows if mixing is None else mixing(rows)
