"""Families as data: which linear layers a model has, which space each reads, and where they are kept.

Names are canonical: those of transformers' modules, relative to the backbone (``LlamaModel``, ``ViTModel``).
Checkpoints and adapters may spell them otherwise; a family's ``aliases`` bring them back.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from .errors import InputRefused

Role = Literal["query", "key", "value", "output", "expand", "contract", "embedding", "head"]


@dataclass(frozen=True)
class Family:
    """One record per family; adding a family is adding one.

    Attributes:
        model_type: ``config.model_type`` of transformers.
        modality: what the forward pass reads, ``text`` or ``vision``.
        norm: ``rms`` or ``layer`` (LayerNorm removes the mean over features).
        attention_norm, mlp_norm: norms inside a block; final_norm: the one behind the last block.
        query, key, value, output: the attention's linear layers inside a block.
        expand: the layers that read the MLP's norm; contract: the layer that reads the MLP's middle.
        embedding_module: the module whose output enters the first block.
        embeddings: parameters [rows, width] or [width, ...] that make that output, with the axis of the width.
        heads: layers outside the backbone that read the final norm, onto a vocabulary or classes both sides share.
        left: parameters that stay by rule, with the reason.
        aliases: (pattern, replacement) that turn older spellings into canonical names.
    """

    model_type: str
    modality: Literal["text", "vision"]
    norm: Literal["rms", "layer"]
    attention_norm: str
    mlp_norm: str
    final_norm: str
    query: str
    key: str
    value: str
    output: str
    expand: tuple[str, ...]
    contract: str
    embedding_module: str
    embeddings: Mapping[str, int]
    heads: tuple[str, ...]
    prefix: str
    blocks: str = "layers"
    left: Mapping[str, str] = field(default_factory=dict)
    aliases: tuple[tuple[str, str], ...] = ()

    def canonical(self, name: str) -> str:
        """The canonical name of a tensor or module, whatever its spelling."""
        name = name.removeprefix(f"{self.prefix}.")
        for pattern, replacement in self.aliases:
            name = re.sub(pattern, replacement, name)
        return name

    def index(self, names: Iterable[str]) -> dict[str, str]:
        """Canonical name -> the spelling used in ``names``.

        Raises:
            InputRefused: two names mean the same tensor.
        """
        found: dict[str, str] = {}
        for name in names:
            other = found.setdefault(self.canonical(name), name)
            if other != name:
                raise InputRefused(f"{other} and {name} both mean {self.canonical(name)}; keep one of them")
        return found


LLAMA = Family(
    model_type="llama",
    modality="text",
    norm="rms",
    prefix="model",
    attention_norm="input_layernorm",
    mlp_norm="post_attention_layernorm",
    final_norm="norm",
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    output="self_attn.o_proj",
    expand=("mlp.gate_proj", "mlp.up_proj"),
    contract="mlp.down_proj",
    embedding_module="embed_tokens",
    embeddings={"embed_tokens.weight": 1},
    heads=("lm_head", "score"),
    left={r"rotary_emb\.inv_freq$": "a buffer the target computes itself"},
)

VIT = Family(
    model_type="vit",
    modality="vision",
    norm="layer",
    prefix="vit",
    attention_norm="layernorm_before",
    mlp_norm="layernorm_after",
    final_norm="layernorm",
    query="attention.q_proj",
    key="attention.k_proj",
    value="attention.v_proj",
    output="attention.o_proj",
    expand=("mlp.fc1",),
    contract="mlp.fc2",
    embedding_module="embeddings",
    embeddings={
        "embeddings.patch_embeddings.projection.weight": 0,
        "embeddings.patch_embeddings.projection.bias": 0,
        "embeddings.cls_token": 2,
        "embeddings.position_embeddings": 2,
    },
    heads=("classifier",),
    left={
        r"^pooler\.": "the pooler's output leaves the model; nothing says which features correspond",
        r"^embeddings\.mask_token$": "read only in masked pre-training",
    },
    aliases=(
        (r"^encoder\.layer\.", "layers."),
        (r"\.attention\.attention\.(q|k|v)(uery|ey|alue)\b", r".attention.\1_proj"),
        (r"\.attention\.output\.dense\b", ".attention.o_proj"),
        (r"\.intermediate\.dense\b", ".mlp.fc1"),
        (r"(layers\.\d+)\.output\.dense\b", r"\1.mlp.fc2"),
    ),
)

FAMILIES = {family.model_type: family for family in (LLAMA, VIT)}


@dataclass(frozen=True)
class Layer:
    """A parameterised layer: its canonical name, what it is for, its block, and the norm whose output it reads."""

    name: str
    role: Role
    block: int
    norm: str | None = None


@dataclass(frozen=True)
class Space:
    """An activation that linear layers read: the module to hook, and whether it is that module's input or output."""

    name: str
    module: str
    side: Literal["input", "output"]
    width: int


@dataclass(frozen=True)
class Layout:
    """Geometry of one model of a family; sizes in features, names canonical."""

    family: Family
    depth: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    middle: int
    tied: bool
    vocabulary: int | None
    image: tuple[int, int] | None
    patch: tuple[int, int] | None
    channels: int | None

    @classmethod
    def of(cls, config: Any) -> Layout:
        """From a transformers config or its dict.

        Raises:
            InputRefused: the family is not supported, or a size is missing or impossible.
        """
        values: Mapping[str, Any] = config if isinstance(config, Mapping) else config.to_dict()
        kind = values.get("model_type")
        if not isinstance(kind, str) or kind not in FAMILIES:
            raise InputRefused(f"model_type is {kind!r}; supported families are {', '.join(sorted(FAMILIES))}")
        family = FAMILIES[kind]
        text = family.modality == "text"

        def size(key: str, default: int | None = None) -> int:
            return _size(key, default if values.get(key) is None else values[key])

        width, heads = size("hidden_size"), size("num_attention_heads")
        kv_heads = size("num_key_value_heads", heads)
        if heads % kv_heads or (values.get("head_dim") is None and width % heads):
            raise InputRefused(
                f"hidden_size {width}, {heads} attention heads and {kv_heads} key-value heads do not divide; "
                "was config.json edited?"
            )
        return cls(
            family=family,
            depth=size("num_hidden_layers"),
            width=width,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=size("head_dim", width // heads),
            middle=size("intermediate_size"),
            tied=bool(values.get("tie_word_embeddings")) and text,
            vocabulary=size("vocab_size") if text else None,
            image=None if text else _pair("image_size", values.get("image_size")),
            patch=None if text else _pair("patch_size", values.get("patch_size")),
            channels=None if text else size("num_channels", 3),
        )

    @property
    def grid(self) -> tuple[int, int]:
        """Patches per column and row of an image."""
        assert self.image and self.patch
        return self.image[0] // self.patch[0], self.image[1] // self.patch[1]

    def block(self, b: int, name: str) -> str:
        return f"{self.family.blocks}.{b}.{name}"

    def layers(self) -> list[Layer]:
        """Every linear layer of the backbone, then the possible heads."""
        f, out = self.family, []
        for b in range(self.depth):
            attention, mlp = self.block(b, f.attention_norm), self.block(b, f.mlp_norm)
            roles: list[tuple[str, Role, str | None]] = [
                (f.query, "query", attention),
                (f.key, "key", attention),
                (f.value, "value", attention),
                (f.output, "output", None),
                *((name, "expand", mlp) for name in f.expand),
                (f.contract, "contract", None),
            ]
            out += [Layer(self.block(b, name), role, b, norm) for name, role, norm in roles]
        return out + [Layer(name, "head", self.depth, f.final_norm) for name in f.heads]

    def norms(self) -> list[str]:
        """Canonical names of all norms, the final one last."""
        f = self.family
        inner = [self.block(b, n) for b in range(self.depth) for n in (f.attention_norm, f.mlp_norm)]
        return [*inner, f.final_norm]

    def spaces(self) -> list[Space]:
        """The four spaces of each block and the final norm's output, in the order a forward pass meets them."""
        f, out = self.family, []
        for b in range(self.depth):
            out += [
                Space(f"{b}.attention", self.block(b, f.attention_norm), "output", self.width),
                Space(f"{b}.context", self.block(b, f.output), "input", self.heads * self.head_dim),
                Space(f"{b}.mlp", self.block(b, f.mlp_norm), "output", self.width),
                Space(f"{b}.middle", self.block(b, f.contract), "input", self.middle),
            ]
        return [*out, Space("final", f.final_norm, "output", self.width)]

    def outputs(self) -> list[Space]:
        """The outputs whose energies set the scales: every linear layer of a block and the embedding."""
        widths = {role: out for role, (out, _) in self.weights().items()}
        layers = [Space(la.name, la.name, "output", widths[la.role]) for la in self.layers() if la.role in widths]
        return [Space("embedding", self.family.embedding_module, "output", self.width), *layers]

    def weights(self) -> dict[Role, tuple[int, int]]:
        """[out, in] of the weights of a block, by role."""
        context, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "query": (context, self.width),
            "key": (kv, self.width),
            "value": (kv, self.width),
            "output": (self.width, context),
            "expand": (self.middle, self.width),
            "contract": (self.width, self.middle),
        }


def _size(key: str, value: Any) -> int:
    if type(value) is not int or value < 1:  # a bool is no size
        raise InputRefused(f"{key} is {value!r}, expected a positive integer; is config.json complete?")
    return value


def _pair(key: str, value: Any) -> tuple[int, int]:
    """(height, width) of a config, which gives one number for squares."""
    sides = list(value) if isinstance(value, (list, tuple)) else [value, value]
    if len(sides) != 2:
        raise InputRefused(f"{key} is {value!r}, expected one side or [height, width]")
    return _size(key, sides[0]), _size(key, sides[1])
