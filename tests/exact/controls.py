"""Align, transport, add, compare: what every control does."""

from functools import cache
from pathlib import Path

import pytest
import theseus_transport as tt
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from .models import LORA_RANK, Spec, batches, lora_factors, relative_error
from .pairs import Pair

EVALUATION_SEED = 77  # batches no alignment has seen


def cast(data: list[dict], dtype: torch.dtype) -> list[dict]:
    return [{k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()} for batch in data]


@cache
def aligned(
    pair: Pair,
    dtype: torch.dtype,
    recipe: str | tt.Recipe = "coherent",
    depth: str | tuple[int | None, ...] = "similarity",
) -> tt.Alignment:
    """The bases of a pair do not depend on the delta: one alignment serves all its controls."""
    source, _, target, _ = pair.sides("linear")
    data = cast(batches(source, seed=3, **dict(pair.calibration)), dtype)
    data = [(source.seen(batch), target.seen(batch)) for batch in data]
    return tt.align(source.build(dtype), target.build(dtype), data, recipe=recipe, depth=depth)


def error(pair: Pair, kind: str, dtype: torch.dtype = torch.float64, recipe: str | tt.Recipe = "coherent") -> float:
    """Relative error of the moved target against the tuned source, on data the alignment has not seen."""
    source, tuned, target, _ = pair.sides(kind)
    return moved_error(aligned(pair, dtype, recipe), source, tuned, target, dtype)


def moved_error(alignment: tt.Alignment, source: Spec, tuned: Spec, target: Spec, dtype: torch.dtype) -> float:
    data = cast(batches(source, seed=EVALUATION_SEED, count=1), dtype)
    start, end, moved = source.build(dtype), tuned.build(dtype), target.build(dtype)
    tt.transport(alignment, tt.Delta.between(start, end), moved).add_to(moved)
    return relative_error(target.outputs(moved, data), source.outputs(end, data), source.outputs(start, data))


def adapter_error(
    pair: Pair,
    folder: Path,
    dtype: torch.dtype = torch.float64,
    recipe: str | tt.Recipe = "coherent",
    rank: int | None = None,
) -> float:
    """The same through files: a PEFT folder in, a PEFT folder out, loaded by PEFT on the target."""
    source, _, target, _ = pair.sides("lora")
    data = cast(batches(source, seed=EVALUATION_SEED, count=1), dtype)
    start, tuned = source.build(dtype), with_adapter(source, dtype)
    tuned.save_pretrained(folder / "source")
    delta, into = tt.Delta.from_adapter(folder / "source", start), target.build(dtype)
    update = tt.transport(aligned(pair, dtype, recipe), delta, into, rank=rank)
    if target.names.lora:
        update.save_adapter(folder / "target")
        moved = PeftModel.from_pretrained(into, folder / "target").eval()
    else:
        update.add_to(into)
        moved = into
    return relative_error(target.outputs(moved, data), source.outputs(tuned, data), source.outputs(start, data))


def with_adapter(spec: Spec, dtype: torch.dtype) -> PeftModel:
    """A LoRA of scale alpha / rank = 3 whose product is what `lora_factors` says."""
    factors, turned = lora_factors(spec), "down" in spec.names.transposed
    targets = sorted({name.split(".")[-1] for name in factors})
    config = LoraConfig(r=LORA_RANK, lora_alpha=3 * LORA_RANK, target_modules=targets, fan_in_fan_out=turned)
    model = get_peft_model(spec.build(dtype), config).eval()
    for name, (_, a, b) in factors.items():
        layer = model.get_submodule(f"base_model.model.{name}")
        layer.lora_A["default"].weight.data.copy_(a)
        layer.lora_B["default"].weight.data.copy_(b / 3)
    return model


def cases(family: str, table: list[Pair], *, lora: bool) -> list:
    """(pair, kind) with readable ids."""
    kinds = [(pair, kind) for pair in table for kind in pair.deltas if (kind == "lora") == lora]
    return [pytest.param(pair, kind, id=f"{family}-{pair.name}-{kind}") for pair, kind in kinds]
