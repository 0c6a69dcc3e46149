"""Task vectors and adapters, read lazily, tensor by tensor."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import Checkpoint
from .errors import InputRefused
from .family import Family, Slot
from .models import Tensors, dtype_of, part_of, shape_of, tensors_of

PREFIX = "base_model.model."
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

    def layers(self) -> dict[str, tuple[str, str]]:
        """Layer name in the model (as the adapter spells it) -> keys of its A and B.

        Raises:
            InputRefused: a tensor is neither a LoRA factor of a linear layer nor saved whole.
        """
        found: dict[str, dict[str, str]] = {}
        for key in self.tensors:
            name = key.removeprefix(PREFIX)
            if match := re.fullmatch(r"(.+)\.lora_(A|B)(?:\.default)?\.weight", name):
                found.setdefault(match[1], {})[match[2]] = key
            elif "lora_" in name:
                raise InputRefused(f"{key} is no factor of a linear layer; only linear LoRA layers can be moved")
        for layer, keys in found.items():
            if len(keys) != 2:
                raise InputRefused(f"{layer} has lora_{next(iter(keys))} alone; the adapter is incomplete")
        return {layer: (keys["A"], keys["B"]) for layer, keys in found.items()}

    def whole(self) -> dict[str, str]:
        """Parameters saved whole (``modules_to_save``): name in the model -> key."""
        return {
            re.sub(r"\.modules_to_save(\.default)?|\.base_layer", "", k.removeprefix(PREFIX)): k
            for k in self.tensors
            if "lora_" not in k
        }

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


@dataclass(frozen=True)
class Delta:
    """An update of a base model: a tuned model beside it, or an adapter on it. Nothing is read until it is asked for.

    Attributes:
        base: tensors of the base, as stored.
        tuned: tensors of the tuned model, or None.
        adapter: a LoRA adapter, or None.
    """

    base: Tensors
    tuned: Tensors | None = None
    adapter: Adapter | None = None
    label: str = field(default="", compare=False)

    @classmethod
    def between(cls, base: nn.Module | Tensors, tuned: nn.Module | Tensors) -> Delta:
        """The task vector ``tuned - base``; each a module, a state dict or a lazy checkpoint."""
        return cls(tensors_of(base), tensors_of(tuned))

    @classmethod
    def from_adapter(cls, folder: str | Path, base: nn.Module | Tensors) -> Delta:
        """A PEFT LoRA adapter in ``folder``, trained on ``base``."""
        return cls(tensors_of(base), adapter=Adapter.open(folder), label=str(folder))

    @classmethod
    def from_lora(cls, config: Mapping[str, Any], tensors: Tensors, base: nn.Module | Tensors) -> Delta:
        """A LoRA adapter in memory: PEFT's configuration as a dict, and tensors under PEFT's names."""
        return cls(tensors_of(base), adapter=Adapter(config, tensors))

    def tuned_tensors(self, family: Family) -> Renamed:
        """Canonical name -> tensor of the tuned model, lazily; for an adapter only what it saves whole."""
        if self.tuned is not None:
            return Renamed(self.tuned, family.index(self.tuned))
        assert self.adapter is not None
        whole = self.adapter.whole()
        index = family.index(whole)
        return Renamed(self.adapter.tensors, {n: replace(s, stored=whole[s.stored]) for n, s in index.items()})


class Renamed(Mapping[str, Tensor]):
    """Tensors under canonical names, reading through."""

    def __init__(self, tensors: Tensors, slots: dict[str, Slot]) -> None:
        self._tensors, self.slots = tensors, slots

    def __getitem__(self, name: str) -> Tensor:
        slot = self.slots[name]
        return slot.view(self._tensors[slot.stored])

    def rows(self, name: str, rows: slice) -> Tensor:
        """These rows of a tensor."""
        return part_of(self._tensors, self.slots[name], rows)

    def shape(self, name: str) -> tuple[int, ...]:
        slot = self.slots[name]
        return slot.shape(shape_of(self._tensors, slot.stored))

    def dtype(self, name: str) -> torch.dtype:
        return dtype_of(self._tensors, self.slots[name].stored)

    def __contains__(self, name: object) -> bool:
        return name in self.slots

    def __iter__(self) -> Iterator[str]:
        return iter(self.slots)

    def __len__(self) -> int:
        return len(self.slots)


def _by_pattern(patterns: Mapping[str, Any] | None, layer: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that matches the end of the layer's name decides."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            return value
    return default
