"""Of which class of transformers a moved model is, where the tune has a head that the target's class does not have."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto

from ..errors import InputRefused
from ..files.checkpoint import Checkpoint
from ..updates.computed import ComputedUpdate

TASKS = {  # of an adapter's configuration -> as classes of transformers are named
    "SEQ_CLS": "SequenceClassification",
    "TOKEN_CLS": "TokenClassification",
    "CAUSAL_LM": "CausalLM",
}
CLASSES: dict[str, Mapping[str, Any]] = {
    "SequenceClassification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "TokenClassification": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "ImageClassification": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    "CausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
}
OF_LABELS = ("id2label", "label2id", "num_labels", "problem_type")


@dataclass(frozen=True)
class NewHead:
    """A head that is new in the tune.

    Attributes:
        name: canonical, in the target.
        task: what transformers calls the task, as in ``AutoModelFor...``.
        outputs: of the head.
        replaces: whether the target has a head of that name, of other outputs maybe.
    """

    name: str
    task: str
    outputs: int
    replaces: bool

    @classmethod
    def of(cls, update: ComputedUpdate, tuned: Checkpoint, target: Checkpoint) -> NewHead | None:
        """The new head of an update, if it has one.

        Raises:
            InputRefused: transformers has no class of the target's kind with such a head.
        """
        weights = [name for name in update.new if name.endswith(".weight")]
        if not weights:
            return None
        name, family = weights[0].removesuffix(".weight"), update.family
        task = _task(tuned, "CausalLM" if name == family.heads.get("vocabulary") else "", family.modality)
        kind = target.config.get("model_type")
        if kind in CONFIG_MAPPING and kind not in CLASSES[task]:
            raise InputRefused(
                f"{name} is new in TUNED, and transformers has no {kind} for {task}; --leave '{name}*' leaves it behind"
            )
        there = [own for own in target if family.canonical(own) == weights[0]]
        return cls(name, task, update.target.shape(weights[0])[0], bool(there))

    @property
    def told(self) -> dict[str, str]:
        """How to load the result: the class, and what the target needs to be of it."""
        return {"target_class": f"AutoModelFor{self.task}", "target_options": self.options}

    @property
    def options(self) -> str:
        """Arguments of ``from_pretrained`` of the target, as text, with which it has such a head."""
        if self.task == "CausalLM":
            return ""
        other_size = ", ignore_mismatched_sizes=True" if self.replaces else ""
        return f", num_labels={self.outputs}{other_size}"

    def config(self, target: Mapping[str, Any], tuned: Mapping[str, Any]) -> dict[str, Any]:
        """The target's configuration as that of the class with the head; what its outputs mean is the tune's."""
        found = {k: v for k, v in target.items() if k not in OF_LABELS} if self.options else dict(target)
        if kind := CLASSES[self.task].get(str(target.get("model_type"))):
            found["architectures"] = [kind if isinstance(kind, str) else kind[0]]
        if not self.options:
            return found
        labels = {str(i): f"LABEL_{i}" for i in range(self.outputs)}
        if isinstance(own := tuned.get("id2label"), Mapping) and len(own) == self.outputs:
            labels = {str(i): str(label) for i, label in own.items()}
        found |= {"id2label": labels, "label2id": {label: int(i) for i, label in labels.items() if i.isdecimal()}}
        return found | {k: tuned[k] for k in ("problem_type",) if tuned.get(k)}


def config_of(
    head: NewHead | None, target: Checkpoint, tuned: Checkpoint, carried: Mapping[str, Any], dtype: str
) -> str:
    """config.json of what is written: the target's, with a new head, what of the tune's is carried, and a dtype."""
    config = {**(head.config(target.config, tuned.config) if head else target.config), **carried}
    if dtype:
        config = {name: value for name, value in config.items() if name != "torch_dtype"} | {"dtype": dtype}
    return json.dumps(config, indent=2)


def _task(tuned: Checkpoint, known: str, modality: str) -> str:
    if known:
        return known
    classes = tuned.config.get("architectures")
    named = re.search(r"For(\w+)$", str(classes[0])) if isinstance(classes, list) and classes else None
    task = named[1] if named else TASKS.get(str(tuned.adapter_config.get("task_type")), "")
    default = "ImageClassification" if modality == "vision" else "SequenceClassification"
    return task if task in CLASSES and task != "CausalLM" else default
