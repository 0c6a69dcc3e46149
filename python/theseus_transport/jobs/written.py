"""One folder that a job writes: what belongs beside its tensors, and what it tells of itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..files.companions import has_tokenizer
from ..files.writer import Ending
from ..updates.alpha import Strength
from ..updates.output import Written
from .model_card import model_card
from .outcome import Outcome, told_in_manifest
from .prepared import Prepared
from .settings import DTYPES
from .task_classes import config_of


def written(prepared: Prepared, place: Path, alpha: float) -> Written:
    """A folder to write, with what belongs beside the tensors."""
    inputs, behaviour = prepared.inputs, prepared.behaviour
    job, target, tuned = inputs.job, inputs.bases.target, inputs.tuned
    files, whole = dict[str, Any](), inputs.kind != "adapter"
    if whole:
        dtype = job.out_dtype if DTYPES[job.out_dtype] and inputs.kind == "checkpoint" else ""
        files["config.json"] = config_of(prepared.head, target, tuned, behaviour.config, dtype)
    if whole or has_tokenizer(tuned.folder):
        files |= behaviour.beside(target.folder, whole=whole)
    return Written(place, alpha, files)


def strength(asked: Strength, output: Written) -> dict[str, Any]:
    """What is told of one strength, once its folder is written."""
    known = {"asked": asked.asked, "alpha": output.alpha, "written": str(output.folder)}
    return {**known, "rounding": output.rounding.as_dict()}


def told_of(outcome: Outcome, i: int, output: Written, said: list[str]) -> Outcome:
    """The outcome as one folder tells it, once its tensors are written."""
    one, said = {**outcome.job, "alpha": output.alpha}, [*said, *output.rounding.warnings()]
    return replace(outcome, job=one, alphas=[outcome.alphas[i]], warnings=said)


def ending(outcome: Outcome, provenance: Mapping[str, Any]) -> Ending:
    """The card and the manifest's part of one folder."""
    return Ending({"README.md": model_card(outcome)}, {"outcome": told_in_manifest(outcome), "provenance": provenance})
