"""What 16 bits cost: models run in float32 while they are compared, and what rounding swallows is measured."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor, nn

from ..shown import percent
from .tensors import chunks_of_rows

SHORT = (torch.float16, torch.bfloat16)
LOST = 0.1  # share of an update that rounding may swallow before it is worth a warning
NAMED = 3  # tensors a warning names
CURE = "--out-dtype float32 or --output delta keeps it"


@contextmanager
def in_float32(*models: nn.Module) -> Iterator[None]:
    """A context in which all parameters and buffers of 16 bits are in float32, as the command runs them.

    So activations are not rounded. The copies take twice the memory of the originals, which are put back on leaving,
    the very tensors.
    """
    held: list[tuple[Tensor, Tensor]] = []
    try:
        for model in models:
            tables = _tables(model)
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
                if tensor.dtype in SHORT and not tensor.is_meta:
                    held.append((tensor, tensor.data))
                    exact = tables.get(name, tensor.data).to(tensor.device)
                    known = exact.shape == tensor.shape and torch.equal(exact.to(tensor.dtype), tensor.data)
                    tensor.data = exact.float() if known else tensor.data.float()
        yield
    finally:
        for tensor, data in held:
            tensor.data = data


def widened(tensor: Tensor) -> Tensor:
    """The tensor, in float32 where it has 16 bits: an input of a model that runs :func:`in_float32`."""
    return tensor.float() if tensor.dtype in SHORT else tensor


def _tables(model: nn.Module) -> Mapping[str, Tensor]:
    """By name what a model computes from its config, as rotary frequencies: a cast to 16 bits rounded it for good."""
    kept = model.state_dict().keys()
    made = [name for name, buffer in model.named_buffers() if buffer.dtype in SHORT and name not in kept]
    if not made or not isinstance(model, transformers.PreTrainedModel):
        return {}
    with init_empty_weights(include_buffers=False):
        again = dict(type(model)(model.config).named_buffers())
    return {name: again[name] for name in made if name in again}


@dataclass
class Rounding:
    """What base plus update loses in the dtype it is kept in: |round(W + d) - W - d| / |d|, by tensor.

    Attributes:
        sums: tensor -> sum of squares of what rounding changed, and of the update; JSON, to go on from.
    """

    sums: dict[str, list[float]] = field(default_factory=dict)

    def put(self, into: Tensor, name: str, base: Tensor, change: Tensor) -> None:
        """Make ``into`` the sum of a tensor (or some of its rows) and its update, rounded once; ``into`` may be the
        base. Where the update is 0 the base keeps its bits: a part of a fused tensor that stays has its -0.0."""
        for place, old, by in zip(*(chunks_of_rows(tensor) for tensor in (into, base, change)), strict=True):
            wide = old.to(by.dtype)
            rounded = torch.where(by == 0, wide, wide + by).to(into.dtype)
            lost = float((rounded.double() - old.double() - by.double()).square().sum())
            before = self.sums.get(name, (0.0, 0.0))
            self.sums[name] = [before[0] + lost, before[1] + float(by.double().square().sum())]
            place.copy_(rounded)

    @property
    def shares(self) -> dict[str, float]:
        """The share of its update that rounding took of every tensor that moved: |round(W + d) - W - d| / |d|."""
        return {name: (lost / moved) ** 0.5 for name, (lost, moved) in sorted(self.sums.items()) if moved}

    @property
    def total(self) -> float:
        """|round(W + d) - W - d| / |d| over all tensors; 0 where nothing was added."""
        lost, moved = (math.fsum(part) for part in zip(*self.sums.values(), strict=True)) if self.sums else (0.0, 0.0)
        return (lost / moved) ** 0.5 if moved else 0.0

    def as_dict(self) -> dict[str, Any]:
        return {"total": self.total, "tensors": self.shares}

    def warnings(self, cure: str = CURE) -> list[str]:
        """One sentence that names the worst tensors, if rounding swallows more than a tenth of any."""
        shares = self.shares
        worst = sorted((n for n, share in shares.items() if share > LOST), key=lambda n: -shares[n])
        if not worst:
            return []
        named = ", ".join(f"{name} {percent(shares[name])}" for name in worst[:NAMED])
        told = f"rounding swallows more than {LOST:.0%} of the update of {len(worst)} tensors"
        return [f"{told} ({percent(self.total)} of all), worst {named}; {cure}"]
