"""An update as users have it: added to a model, or saved."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..errors import InputRefused
from ..models.precision import Rounding
from ..models.tensors import shape_of
from .computed import ComputedUpdate
from .output import write_update

log = logging.getLogger(__name__)


@dataclass(repr=False)
class Update(ComputedUpdate):
    """The update of the target: its parameter name -> dense delta, alpha included, computed when it is asked for.

    Values are float32 (float64 where the target is) on the CPU. ``coverage`` tells the fate of every tensor of the
    source's update, ``warnings`` what to know of single ones.
    """

    def __repr__(self) -> str:
        fates = Counter(told.fate for told in self.coverage)
        told = f"alpha {self.alpha:g}: " + ", ".join(f"{n} {fate}" for fate, n in sorted(fates.items()))
        return f"Update({self.source.geometry.words} -> {self.target.geometry.words}, {told})"

    def add_to(self, model: nn.Module) -> None:
        """Add the update to the target's parameters in place, each sum rounded once; all is computed before any is
        added. What rounding to 16 bits swallows of it is measured, and warned of.

        A head that is new in the tune takes the place of the model's.

        Raises:
            InputRefused: the model is not the target, or not of a class with the tune's head.
        """
        parameters, rounding = dict(model.named_parameters()) | dict(model.named_buffers()), Rounding()
        news = {self.target.slots[name].stored for name in self.new}
        for name in self.as_tensors():
            if name not in parameters or parameters[name].shape != (shape := shape_of(self.target.tensors, name)):
                given = f"give one of the tuned model's class, {list(shape)}" if name in news else "give the target"
                raise InputRefused(f"{type(model).__name__} has no {name} of the target's shape; {given}")
        with torch.no_grad():
            for name, value in list(self.items()):
                if name in news:
                    parameters[name].zero_()
                rounding.put(parameters[name], name, parameters[name], value.to(parameters[name].device))
        for text in rounding.warnings("add it to model.float(), or save_delta keeps it"):
            self.said.append(text)
            log.warning(text)

    def save_adapter(self, folder: str | Path, *, base_name: str | None = None, overwrite: bool = False) -> None:
        """Write a PEFT adapter for the target: of a LoRA in its dtype, of a full tune that was transported at a rank.

        Raises:
            InputRefused: the update has no factors, or ``folder`` is not empty and ``overwrite`` is false.
        """
        write_update(self, folder, "adapter", base_name=base_name, overwrite=overwrite)

    def save_delta(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Write the update itself, in float32 (float64 where the target is): no rounding to the target's dtype.

        Raises:
            InputRefused: ``folder`` is not empty and ``overwrite`` is false.
        """
        write_update(self, folder, "delta", overwrite=overwrite)
