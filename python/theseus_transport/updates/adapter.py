"""PEFT's LoRA adapters: which of them are plain ``B A`` updates, their layers and factors, read lazily."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import regex
from torch import Tensor

from ..errors import InputRefused
from ..files.checkpoint import Checkpoint
from ..models.family import unwrapped
from ..models.tensors import Tensors, shape_of

PREFIX = "base_model.model."
SAVE = "save it with PEFT: model.save_pretrained(folder)"
MERGING = (
    "--output checkpoint (in Python Delta.merged) merges it into its base and moves that, --output adapter --rank 16 "
    "what of it factors hold"
)
HEAD = re.compile(r"(score|classifier)\.weight$")
PATIENCE = 5  # seconds for one pattern on one name; re would take years over some
# what PEFT calls the parts of a LoRA layer; state dicts name the adapter in between
PART = re.compile(
    r"(?P<layer>.+)\.(?P<factor>lora_[AB])(\.(?P<name>[^.]+))?\.(?P<kind>weight|bias)"
    r"|(?P<of>.+?)(\.token_adapter)?\.(?P<other>lora_embedding_[AB]|lora_magnitude_vector|trainable_tokens_delta)"
    r"(\.(?!weight$)[^.]+)?(\.weight)?"
)
PROMPTS = {"PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "CARTRIDGE"}
UNMERGED = {*PROMPTS, "ADAPTION_PROMPT", "XLORA", "POLY", "LILY", "SHADOW"}  # they act on activations, not on weights
# these change the base in front of training: PEFT makes the first ones again from the plain base, the others by chance
REDONE_INIT, RANDOM_INIT = ("pissa", "olora"), ("pissa_niter", "corda", "lora_ga")
# what PEFT can merge into the base, and what nothing can
MERGED_OPTIONS = ("use_qalora", "use_bdlora", "target_parameters", "monteclora_config", "kasa_config")
STUCK_OPTIONS = {
    "alora_invocation_tokens": "acts on some tokens only, so that no weights could hold it",
    "layer_replication": "makes another base, of more blocks",
    "arrow_config": "chooses among adapters token by token, so that no weights could hold it",
}
TASKS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}  # PEFT's task -> class of transformers
HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}


@dataclass(frozen=True)
class Factors:
    """A LoRA update of one layer, of low rank r: ``delta_W = scaling * B A``, A [r, in], B [out, r]."""

    a: Tensor
    b: Tensor
    scaling: float


@dataclass(frozen=True)
class Adapter:
    """A PEFT LoRA adapter: its configuration and its tensors, as stored."""

    config: Mapping[str, Any]
    tensors: Tensors

    def __post_init__(self) -> None:
        config = self.config
        refuse_unlike(config)
        saved = config.get("modules_to_save")
        names = saved is None or isinstance(saved, (list, tuple, set))
        if not (names and all(isinstance(entry, str) and entry for entry in saved or ())):
            raise InputRefused(f"adapter_config.json: modules_to_save is {saved!r}, expected a list of names")
        for option, patterns in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
            by_layer = config.get(patterns) or {}
            if not isinstance(by_layer, Mapping):
                raise InputRefused(f"adapter_config.json: {patterns} is {by_layer!r}, expected names and numbers")
            for name, value in {option: config.get(option), **by_layer}.items():
                if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
                    raise InputRefused(f"adapter_config.json: {name} is {value!r}, expected a positive number")
            try:
                [regex.compile(pattern) for pattern in by_layer]
            except regex.error as error:
                raise InputRefused(f"adapter_config.json: {patterns} holds no regular expression: {error}") from error

    @classmethod
    def open(cls, folder: str | Path) -> Adapter:
        """Read ``adapter_config.json`` and ``adapter_model.safetensors``.

        Raises:
            InputRefused: a file is missing, unreadable or not of a LoRA.
        """
        return cls.of(Checkpoint.open(folder))

    @classmethod
    def of(cls, checkpoint: Checkpoint, tensors: Tensors | None = None, *, source: Checkpoint | None = None) -> Adapter:
        """The adapter in an opened PEFT folder, its tensors read through ``tensors``; refuses as :meth:`open`.

        Args:
            source: the base, which a cure names.
        """
        if not checkpoint.adapter_config:
            raise InputRefused(
                f"{checkpoint.folder} has no adapter_config.json; PEFT writes it beside the weights: copy it from there"
            )
        try:
            refuse_unlike(checkpoint.adapter_config, checkpoint, source)
            return cls(checkpoint.adapter_config, checkpoint if tensors is None else tensors)
        except InputRefused as error:
            raise InputRefused(f"{checkpoint.folder}: {error}") from error

    def rank(self, layer: str) -> int:
        """The layer's rank by the configuration."""
        return int(_by_pattern(self.config.get("rank_pattern"), layer, self.config["r"]))

    def scaling(self, layer: str) -> float:
        """alpha / r, or alpha / sqrt(r) with rslora, with the layer's own r and alpha where patterns set them."""
        r = self.rank(layer)
        alpha = _by_pattern(self.config.get("alpha_pattern"), layer, self.config["lora_alpha"])
        return float(alpha / math.sqrt(r) if self.config.get("use_rslora") else alpha / r)

    @cached_property
    def parts(self) -> dict[str, dict[str, str]]:
        """Layer, as the adapter spells it -> what of a LoRA it has (``lora_A``, ``lora_magnitude_vector``) -> key.

        Raises:
            InputRefused: a tensor is no part of a LoRA, or of two adapters.
        """
        found: dict[str, dict[str, str]] = {}
        matches = {key: PART.fullmatch(name) for key, name in self._names.items()}
        if len(adapters := {m["name"] for m in matches.values() if m and m["factor"]}) > 1:
            named = ", ".join(sorted(name or "one without a name" for name in adapters))
            raise InputRefused(f"the file holds several adapters ({named}); {SAVE}, one adapter at a time")
        for key, name in self._names.items():
            if match := matches[key]:
                part = match["factor"] or match["other"]
                part += ".bias" if match["kind"] == "bias" else ""
                other = found.setdefault(match["layer"] or match["of"], {}).setdefault(part, key)
                if other != key:
                    raise InputRefused(f"{other} and {key} are one factor, saved twice; {SAVE}")
            elif "lora_" in name:
                raise InputRefused(f"{key} is no part of a LoRA as PEFT saves one; {SAVE}")
        return found

    def layers(self) -> dict[str, tuple[str, str]]:
        """Layer name in the model (as the adapter spells it) -> keys of its A and B.

        Raises:
            InputRefused: a tensor is neither a LoRA factor of a linear layer nor saved whole.
        """
        for layer, keys in self.parts.items():
            if other := sorted(keys.keys() - {"lora_A", "lora_B"}):
                raise InputRefused(f"{keys[other[0]]} is no factor of a linear layer; {MERGING}")
            if len(keys) != 2:
                raise InputRefused(f"{layer} has {next(iter(keys))} alone; the adapter is incomplete")
        return {layer: (keys["lora_A"], keys["lora_B"]) for layer, keys in self.parts.items()}

    def beyond_factors(self) -> list[str]:
        """What else it holds than factors of linear layers and modules saved whole, in words."""
        config, parts = self.config, {part for keys in self.parts.values() for part in keys}
        bias = config.get("bias", "none")
        said = {
            "DoRA": config.get("use_dora") or "lora_magnitude_vector" in parts,
            f"trained biases (bias={bias!r})": bias != "none",
            "biases behind its factors (lora_bias)": config.get("lora_bias") or "lora_B.bias" in parts,
            "trained tokens": config.get("trainable_token_indices") or "trainable_tokens_delta" in parts,
            "factors of an embedding": "lora_embedding_A" in parts or "lora_embedding_B" in parts,
            "factors of a convolution": any(
                len(shape_of(self.tensors, keys["lora_A"])) == 4 for keys in self.parts.values() if "lora_A" in keys
            ),
        }
        return [what for what, held in said.items() if held]

    def whole(self) -> dict[str, str]:
        """Parameters saved whole (``modules_to_save``): name in the model -> key."""
        matches = (PART.fullmatch(name) for name in self._names.values())
        named = sorted({match["name"] for match in matches if match and match["name"]} | {"default"})
        saved = re.compile(rf"\.modules_to_save(\.({'|'.join(map(re.escape, named))})(?=\.))?|\.base_layer")
        found: dict[str, str] = {}
        for key, name in self._names.items():
            if PART.fullmatch(name) or ".original_module." in name:
                continue
            if (other := found.setdefault(saved.sub("", name), key)) != key:
                raise InputRefused(f"{other} and {key} are one parameter, saved twice; {SAVE}")
        return found

    @cached_property
    def _names(self) -> dict[str, str]:
        """Key -> its name in the model, without what PEFT and wrappers of the model put in front."""
        return {key: re.sub(rf"^({re.escape(PREFIX)})+", "", unwrapped(key)) for key in self.tensors}

    def saves(self, name: str) -> str | None:
        """The entry of ``modules_to_save`` (or a head that the task adds) by which PEFT saves a parameter, or None.

        PEFT's rule: a module is saved whole, with all in it, if its name ends as an entry does.
        """
        entries = [*(self.config.get("modules_to_save") or ()), *HEADS.get(str(self.config.get("task_type")), ())]
        parts = name.split(".")[:-1]
        modules = [".".join(parts[: i + 1]) for i in range(len(parts))]
        return next((entry for module in modules for entry in entries if module.endswith(entry)), None)

    def targets(self, layer: str) -> bool:
        """Whether PEFT, by ``target_modules``, gives this layer factors."""
        wanted = self.config.get("target_modules")
        if isinstance(wanted, str):
            try:
                return wanted == "all-linear" or re.fullmatch(wanted, layer) is not None
            except re.error as error:
                raise InputRefused(f"adapter_config.json: target_modules is no regular expression: {error}") from error
        return any(layer == name or layer.endswith(f".{name}") for name in wanted or ())

    def factors(self, layer: str) -> Factors:
        key_a, key_b = self.layers()[layer]
        a, b = self.tensors[key_a], self.tensors[key_b]
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            raise InputRefused(
                f"{layer}: lora_A is {list(a.shape)}, lora_B {list(b.shape)}; they do not multiply as B A"
            )
        if (rank := self.rank(layer)) != a.shape[0]:
            raise InputRefused(
                f"{layer}: lora_A has rank {a.shape[0]}, adapter_config.json says {rank}; edited by hand?"
            )
        return Factors(a, b, self.scaling(layer))


def _by_pattern(patterns: Mapping[str, Any] | None, layer: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that matches the end of the layer's name decides."""
    for pattern, value in (patterns or {}).items():
        try:
            if regex.match(rf"(.*\.)?({pattern})$", layer, timeout=PATIENCE):
                return value
        except TimeoutError:
            raise InputRefused(
                f"adapter_config.json: the pattern {pattern[:80]!r} does not end on {layer!r}; write the name out"
            ) from None
    return default


def refuse_unlike(
    config: Mapping[str, Any], checkpoint: Checkpoint | None = None, source: Checkpoint | None = None
) -> None:
    """Refuse an adapter that is no update ``B A`` of the plain base, with the way to a tune that can be moved.

    Args:
        checkpoint: the adapter's folder; source: its base; a cure names both.
    """
    kind, init = config.get("peft_type"), config.get("init_lora_weights")
    if not isinstance(kind, str):
        raise InputRefused(f"adapter_config.json says peft_type {kind!r}; is it an adapter of PEFT?")
    if kind in UNMERGED:
        acts = "puts trained vectors in front of the input" if kind in PROMPTS else "acts on activations"
        raise InputRefused(f"the adapter is of type {kind}, which {acts}: no weights hold it; train a LoRA instead")
    if kind != "LORA":
        raise InputRefused(f"the adapter is of type {kind!r}; {_peft_merges(config, checkpoint, source)}")
    for option, why in STUCK_OPTIONS.items():
        if config.get(option):
            raise InputRefused(f"the adapter uses {option}, which {why}; train without it")
    for option in MERGED_OPTIONS:
        if config.get(option):
            raise InputRefused(f"the adapter uses {option}; {_peft_merges(config, checkpoint, source)}")
    if isinstance(init, str) and init.lower().startswith(RANDOM_INIT):
        raise InputRefused(
            f"the adapter was initialised by {init}, which changes the base in a way that is not kept; where it was "
            "trained, save it as a plain LoRA: model.save_pretrained(folder, path_initial_model_for_weight_conversion="
            "first), first being the adapter as it was saved before training"
        )
    if isinstance(init, str) and init.lower() == "loftq":
        raise InputRefused(
            "the adapter was initialised by loftq, on a quantised base that SOURCE is not; where it was trained, merge "
            "it into that base (merge_and_unload), dequantise the whole (dequantize) and save that as TUNED"
        )
    if isinstance(init, str) and init.lower().startswith(REDONE_INIT):
        cure = _peft_merges(config, checkpoint, source)
        raise InputRefused(f"the adapter was initialised by {init}, which changes the base; {cure}")


def _peft_merges(config: Mapping[str, Any], checkpoint: Checkpoint | None, source: Checkpoint | None) -> str:
    """The line that merges an adapter into its base with PEFT."""
    base, tuned = (
        str(side.folder.resolve()) if side else name for side, name in ((source, "SOURCE"), (checkpoint, "TUNED"))
    )
    task, kinds = str(config.get("task_type")), source.config.get("architectures") if source else None
    own = kinds[0] if isinstance(kinds, list) and kinds and re.fullmatch(r"\w+", str(kinds[0])) else TASKS["CAUSAL_LM"]
    heads = [shape[0] for name, shape in (checkpoint.shapes if checkpoint else {}).items() if HEAD.search(name)]
    classes = f", num_labels={heads[0]}" if heads and task.endswith("_CLS") else ""
    line = (
        f"from transformers import {TASKS.get(task, own)} as M; from peft import PeftModel as P; "
        f"P.from_pretrained(M.from_pretrained({json.dumps(base)}{classes}), {json.dumps(tuned)})"
        f".merge_and_unload().save_pretrained({json.dumps(f'{tuned}-merged')})"
    )
    return f"merge it into its base with PEFT, then move {tuned}-merged: python -c {shlex.quote(line)}"
