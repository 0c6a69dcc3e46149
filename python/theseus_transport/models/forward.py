"""One forward pass of a model, and what goes into it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .geometry import Geometry
from .precision import widened

MAIN_INPUT = {"text": "input_ids", "vision": "pixel_values"}
Batch = Mapping[str, Any]


def samples_of(batch: Batch) -> int:
    """Samples of one side's batch."""
    return len(next(batch[key] for key in MAIN_INPUT.values() if key in batch))


def backbone(model: nn.Module, geometry: Geometry) -> nn.Module:
    """The model without its head."""
    inside = getattr(model, geometry.family.prefix, None) if geometry.family.prefix else None
    return inside if isinstance(inside, nn.Module) else model


@contextmanager
def in_evaluation(*models: nn.Module) -> Iterator[None]:
    """Models in evaluation mode; every module is in the mode it was in afterwards."""
    before = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in before:
            module.training = training


def run_model(model: nn.Module, geometry: Geometry, batch: Batch, device: torch.device) -> None:
    """One forward pass, 16 bits widened as the model is; arguments it does not know by name are given by position."""
    inputs = {k: widened(v).to(device) if isinstance(v, Tensor) else v for k, v in batch.items() if k != "offsets"}
    known = inspect.signature(model.forward).parameters
    if "use_cache" in known and geometry.family.modality == "text":
        inputs["use_cache"] = False
    key = MAIN_INPUT[geometry.family.modality]
    anything = any(p.kind is p.VAR_KEYWORD for p in known.values())
    first = [] if key in known or anything else [inputs.pop(key)]
    model(*first, **inputs)


Call = tuple[tuple[Any, ...], dict[str, Any]]  # what a block is called with beside hidden states


def hidden_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Hidden states [samples, tokens, width] among the arguments that a block, or attention, is called with."""
    return args[0] if args else kwargs["hidden_states"]


def state_of(result: Any) -> Tensor:
    """Hidden states [samples, tokens, width] of what a block returns: itself, or the first of a tuple."""
    state: Tensor = result[0] if isinstance(result, tuple) else result
    return state
