"""PEFT's LoRA adapters: which of them are plain ``B A`` updates, their layers and factors, read lazily."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from .checkpoint import Checkpoint
from .errors import InputRefused
from .family import unwrapped
from .models import Tensors

PREFIX = "base_model.model."
SAVE = "save it with PEFT: model.save_pretrained(folder)"
# what PEFT calls the parts of a LoRA layer; state dicts name the adapter in between
PART = re.compile(
    r"(?P<layer>.+)\.(?P<factor>lora_[AB])(\.(?P<name>[^.]+))?\.(?P<kind>weight|bias)"
    r"|(?P<of>.+?)(\.token_adapter)?\.(?P<other>lora_embedding_[AB]|lora_magnitude_vector|trainable_tokens_delta)"
    r"(\.(?!weight$)[^.]+)?(\.weight)?"
)
REFUSED_INIT = (
    "pissa",
    "olora",
    "corda",
    "loftq",
    "lora_ga",
)  # they change the base, so BA is no update of the plain one

REFUSED_OPTIONS = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "monteclora_config",
    "kasa_config",
)


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
        if config.get("peft_type") != "LORA":
            raise InputRefused(f"the adapter is of type {config.get('peft_type')!r}; only LORA adapters can be moved")
        init = config.get("init_lora_weights")
        if isinstance(init, str) and init.lower().startswith(REFUSED_INIT):
            raise InputRefused(
                f"the adapter was initialised by {init}, which changes the base; convert it to plain LoRA first"
            )
        for option in REFUSED_OPTIONS:
            if config.get(option):
                raise InputRefused(f"the adapter uses {option}, which is not a plain B A update; train without it")
        if config.get("bias", "none") != "none":
            raise InputRefused(f"the adapter trains biases (bias={config['bias']!r}); only bias='none' can be moved")
        for option, patterns in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
            by_layer = config.get(patterns) or {}
            if not isinstance(by_layer, Mapping):
                raise InputRefused(f"adapter_config.json: {patterns} is {by_layer!r}, expected names and numbers")
            for name, value in {option: config.get(option), **by_layer}.items():
                if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
                    raise InputRefused(f"adapter_config.json: {name} is {value!r}, expected a positive number")
            try:
                [re.compile(pattern) for pattern in by_layer]
            except re.error as error:
                raise InputRefused(f"adapter_config.json: {patterns} holds no regular expression: {error}") from error

    @classmethod
    def open(cls, folder: str | Path) -> Adapter:
        """Read ``adapter_config.json`` and ``adapter_model.safetensors``.

        Raises:
            InputRefused: a file is missing, unreadable or not a plain LoRA.
        """
        return cls.of(Checkpoint.open(folder))

    @classmethod
    def of(cls, checkpoint: Checkpoint, tensors: Tensors | None = None) -> Adapter:
        """The adapter in an opened PEFT folder, its tensors read through ``tensors``; refuses as :meth:`open`."""
        if not checkpoint.adapter_config:
            raise InputRefused(f"{checkpoint.folder} has no adapter_config.json; is it a PEFT adapter?")
        try:
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
            for part, key in keys.items():
                if part not in ("lora_A", "lora_B"):
                    raise InputRefused(f"{key} is no factor of a linear layer; only linear LoRA layers can be moved")
            if len(keys) != 2:
                raise InputRefused(f"{layer} has {next(iter(keys))} alone; the adapter is incomplete")
        return {layer: (keys["lora_A"], keys["lora_B"]) for layer, keys in self.parts.items()}

    def whole(self) -> dict[str, str]:
        """Parameters saved whole (``modules_to_save``): name in the model -> key."""
        matches = (PART.fullmatch(name) for name in self._names.values())
        named = sorted({match["name"] for match in matches if match and match["name"]} | {"default"})
        saved = re.compile(rf"\.modules_to_save(\.({'|'.join(map(re.escape, named))})(?=\.))?|\.base_layer")
        return {
            saved.sub("", name): key
            for key, name in self._names.items()
            if not PART.fullmatch(name) and ".original_module." not in name
        }

    @cached_property
    def _names(self) -> dict[str, str]:
        """Key -> its name in the model, without what PEFT and wrappers of the model put in front."""
        return {key: re.sub(rf"^({re.escape(PREFIX)})+", "", unwrapped(key)) for key in self.tensors}

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
        if re.match(rf"(.*\.)?({pattern})$", layer):
            return value
    return default
