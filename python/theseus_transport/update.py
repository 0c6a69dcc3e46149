"""What a transport yields: the target's delta, lazily by name, and the fate of every tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from .delta import Delta, Factors
from .errors import InputRefused, NumericalError
from .models import Base, dtype_of, shape_of
from .spaces import Family

Fate = Literal["transported", "folded", "unchanged", "left"]


@dataclass(frozen=True)
class Row:
    """The fate of one tensor (or adapted layer) of the update, by its name in the source, and why."""

    tensor: str
    fate: Fate
    note: str = ""


@dataclass
class Update(Mapping[str, Tensor]):
    """The update of the target, as a lazy mapping: the target's parameter name -> dense delta, alpha included.

    Values are computed when asked for, in float64, and handed out in float32 (float64 where the target is float64).

    Attributes:
        coverage: fate of every tensor of the source's update.
        warnings: what the user should know about single tensors; complete once every value was read.
    """

    target: Base
    delta: Delta
    alpha: float
    coverage: list[Row] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    _jobs: dict[str, Callable[[], dict[str, Tensor]]] = field(default_factory=dict)
    _factors: dict[str, Callable[[], Factors]] = field(default_factory=dict)
    _last: tuple[object, dict[str, Tensor]] | None = None

    def __getitem__(self, name: str) -> Tensor:
        job = self._jobs[name]
        if self._last is None or self._last[0] is not job:  # weight and bias of a layer come from one computation
            self._last = (job, job())
        value = self._last[1][name] * self.alpha
        if tuple(value.shape) != (shape := shape_of(self.target.tensors, name)):
            raise InputRefused(f"the update of {name} is {list(value.shape)}, the target's is {list(shape)}")
        if not bool(torch.isfinite(value).all()):
            raise NumericalError(f"the update of {name} holds NaN or Inf; check the tuned model and the alignment")
        return value.to(self.dtype(name))

    def dtype(self, name: str) -> torch.dtype:
        """Of the update's value: float64 where the target is, else float32."""
        return torch.float64 if dtype_of(self.target.tensors, name) == torch.float64 else torch.float32

    def __contains__(self, name: object) -> bool:
        return name in self._jobs

    def __iter__(self) -> Iterator[str]:
        return iter(self._jobs)

    def __len__(self) -> int:
        return len(self._jobs)

    def add_to(self, model: nn.Module) -> None:
        """Add the update to the target's parameters in place; all is computed before anything is added."""
        parameters = dict(model.named_parameters()) | dict(model.named_buffers())
        with torch.no_grad():
            for name, value in list(self.items()):
                parameters[name] += value.to(parameters[name])

    @property
    def family(self) -> Family:
        return self.target.layout.family

    def factor_jobs(self) -> Iterator[tuple[str, Callable[[], Factors]]]:
        """For a LoRA: (layer as an adapter of the target spells it, computation of its moved factors, alpha in B)."""
        for layer, compute in self._factors.items():
            yield layer, partial(_scaled, compute, self.alpha)

    def save_adapter(self, folder: str | Path, *, base_name: str | None = None, overwrite: bool = False) -> None:
        """Write a PEFT adapter for the target: LoRA updates only, same rank, same dtype.

        Raises:
            InputRefused: the update is no LoRA, or ``folder`` is not empty and ``overwrite`` is false.
        """
        from .output import write_update

        write_update(self, folder, "adapter", base_name=base_name, overwrite=overwrite)


def _scaled(compute: Callable[[], Factors], alpha: float) -> Factors:
    moved = compute()
    return Factors(moved.a, moved.b * alpha, moved.scaling)
