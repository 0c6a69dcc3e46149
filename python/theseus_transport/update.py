"""What a transport yields: the target's delta, lazily by name, and the fate of every tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from .delta import Delta, Factors
from .errors import InputRefused, NumericalError
from .family import Family
from .models import Base, dtype_of, shape_of

Job = Callable[[], dict[str, Tensor]]  # canonical name -> update, float64
Fate = Literal["transported", "folded", "unchanged", "left"]


@dataclass(frozen=True)
class Row:
    """The fate of one tensor (or adapted layer) of the update, by its name in the source, and why."""

    tensor: str
    fate: Fate
    note: str = ""


@dataclass(frozen=True)
class MovedFactors:
    """A moved LoRA of one layer of the target: its rank, [out, in], dtype of A and B, and computation."""

    rank: int
    shape: tuple[int, int]
    dtype: torch.dtype
    scaling: float
    compute: Callable[[], Factors]


@dataclass
class Update(Mapping[str, Tensor]):
    """The update of the target, as a lazy mapping: the target's parameter name -> dense delta, alpha included.

    Values are computed when asked for, in float64, and handed out in float32 (float64 where the target is float64).

    Attributes:
        coverage: fate of every tensor of the source's update.
        warnings: what the user should know about single tensors; complete once every value was read.
        moved: canonical name of every tensor of the source that moves -> that of the target's it becomes.
        factors: for a LoRA, the layer as an adapter of the target spells it -> its moved factors, alpha not included.
    """

    source: Base
    target: Base
    delta: Delta
    alpha: float
    coverage: list[Row] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    factors: dict[str, MovedFactors] = field(default_factory=dict)
    moved: dict[str, str] = field(default_factory=dict)
    _jobs: dict[str, dict[str, Job]] = field(default_factory=dict)  # stored name -> canonical name -> job
    _last: dict[Job, dict[str, Tensor]] = field(default_factory=dict)
    _kept: dict[str, list[str]] = field(default_factory=dict)  # stored name -> canonical names

    def __post_init__(self) -> None:
        for canonical, slot in self.target.slots.items():
            self._kept.setdefault(slot.stored, []).append(canonical)

    def plan(self, name: str, job: Job) -> None:
        """Have ``job`` compute the canonical tensor ``name`` (and maybe others)."""
        self._jobs.setdefault(self.target.slots[name].stored, {})[name] = job

    def __getitem__(self, name: str) -> Tensor:
        value = self._stored(name) * self.alpha
        if tuple(value.shape) != (shape := shape_of(self.target.tensors, name)):
            raise InputRefused(f"the update of {name} is {list(value.shape)}, the target's is {list(shape)}")
        if not bool(torch.isfinite(value).all()):
            raise NumericalError(f"the update of {name} holds NaN or Inf; check the tuned model and the alignment")
        return value.to(self.dtype(name))

    def _stored(self, name: str) -> Tensor:
        """The update of a stored tensor; parts of a fused one that do not move are zero."""
        jobs, parts, turned = self._jobs[name], {}, False
        for canonical in self._kept[name]:
            slot = self.target.slots[canonical]
            zero = None if canonical in jobs else torch.zeros(self.target.shape(canonical), dtype=torch.float64)
            parts[slot.part] = self._value(canonical, jobs[canonical]) if zero is None else zero
            turned = slot.transposed
        fused = torch.cat([parts[i] for i in range(len(parts))]) if len(parts) > 1 else parts[0]
        return fused.mT.contiguous() if turned and fused.ndim == 2 else fused

    def _value(self, canonical: str, job: Job) -> Tensor:
        if job not in self._last:  # weight and bias of a layer, and the parts of a fused one, come one after another
            while len(self._last) >= 3:
                del self._last[next(iter(self._last))]
            self._last[job] = job()
        return self._last[job][canonical]

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
    def source_family(self) -> Family:
        return self.source.layout.family

    @property
    def family(self) -> Family:
        return self.target.layout.family

    def save_adapter(self, folder: str | Path, *, base_name: str | None = None, overwrite: bool = False) -> None:
        """Write a PEFT adapter for the target: LoRA updates only, same rank, same dtype.

        Raises:
            InputRefused: the update is no LoRA, or ``folder`` is not empty and ``overwrite`` is false.
        """
        from .output import write_update

        write_update(self, folder, "adapter", base_name=base_name, overwrite=overwrite)
