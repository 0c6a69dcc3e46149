"""The geometry of one model: its linear layers, and the activations they read."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from torch import nn

from ..errors import InputRefused
from .families import FAMILIES, unsupported
from .family import Family

DEEPEST = 10_000  # blocks; a record that says more is no model's
Role = Literal["query", "key", "value", "output", "expand", "contract", "head"]
READS = {"output": "context", "expand": "mlp", "contract": "middle"}  # other layers of a block the attention's input


@dataclass(frozen=True)
class Layer:
    """A linear layer.

    Attributes:
        name: canonical.
        role: what it is for; slot: the role, told apart within a block (gate and up) or by the purpose of a head.
        block: its block; the depth for a head.
        norm: the norm whose output it reads, if it reads one.
        scale: the per-feature factor behind it, if the family has one.
    """

    name: str
    role: Role
    slot: str
    block: int
    norm: str | None = None
    scale: str | None = None

    @property
    def reads(self) -> str:
        """The space it reads, by the name of the link that compares it: ``3.context``, or ``final`` of a head."""
        return "final" if self.role == "head" else f"{self.block}.{READS.get(self.role, 'attention')}"


@dataclass(frozen=True)
class Space:
    """An activation: the module to hook, and what of it.

    Attributes:
        module: canonical name.
        side: the module's input or output, or its output behind ``norm`` where the model itself norms one token only.
        width: features.
        norm: the norm whose output the activation is, if it is one; rows: of all tokens, or of the class token alone.
    """

    module: str
    side: Literal["input", "output", "normed"]
    width: int
    norm: str | None = None
    rows: Literal["all", "class"] = "all"


@dataclass(frozen=True)
class Geometry:
    """Geometry of one model of a family; sizes in features, names canonical.

    Attributes:
        positions: tokens of the longest text it can read, or was made for; None where its config does not say.
        one_token: behind the last block it has a head, and that reads the class token alone.
    """

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
    registers: int = 0
    scaled: bool = False
    positions: int | None = None
    one_token: bool = False

    @property
    def words(self) -> str:
        """Family and sizes in one line, for people."""
        return f"{self.family.model_type} of {self.depth} blocks, {self.width} wide"

    @classmethod
    def of(cls, config: Any, names: Iterable[str] = ()) -> Geometry:
        """The geometry of a model, from its transformers config, the config's dict, or the model itself.

        Args:
            names: of its stored tensors, which tell its heads; a model's own are known.

        Raises:
            InputRefused: the family is not supported, or a size is missing or impossible.
        """
        if isinstance(config, nn.Module):
            names = names or [name for name, _ in config.named_parameters()]
            config = getattr(config, "config", None) or _recognised(config)
        values: Mapping[str, Any] = (
            config if isinstance(config, Mapping) else config.to_dict() if hasattr(config, "to_dict") else vars(config)
        )
        kind = values.get("model_type")
        if isinstance(kind, str) and kind in FAMILIES:
            values = FAMILIES[kind].geometry(values)
            kind = values["model_type"]
        if not isinstance(kind, str) or kind not in FAMILIES:
            raise InputRefused(unsupported(values))
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
        tied, positions = values.get("tie_word_embeddings"), values.get("max_position_embeddings")
        return cls(
            family=family,
            depth=size("num_hidden_layers"),
            width=width,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=size("head_dim", width // heads),
            middle=size("intermediate_size"),
            tied=text and (family.tied if tied is None else bool(tied)),
            vocabulary=size("vocab_size") if text else None,
            image=None if text else _pair("image_size", values.get("image_size")),
            patch=None if text else _pair("patch_size", values.get("patch_size")),
            channels=None if text else size("num_channels", 3),
            scaled=bool(family.output_scale) and values.get("layer_scale") is not False,
            registers=0 if text or not family.embedding("register") else size("num_register_tokens"),
            positions=_size("max_position_embeddings", positions) if text and positions is not None else None,
            one_token=values.get("class_pooled") is not False and family.reads_one_token(names),
        )

    def plain(self) -> dict[str, Any]:
        """The geometry as JSON; :meth:`restored` reads it."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {**values, "family": self.family.model_type}

    @classmethod
    def restored(cls, values: Mapping[str, Any]) -> Geometry:
        kind = values["family"]
        if kind not in FAMILIES:
            raise InputRefused(f"family {kind!r} is not known here; register it first (theseus_transport.register)")
        found: dict[str, Any] = {**values, "family": FAMILIES[kind]}
        for name in ("depth", "width", "heads", "kv_heads", "head_dim", "middle"):
            found[name] = _size(name, values[name])
        for name in ("vocabulary", "channels", "positions"):
            found[name] = None if values[name] is None else _size(name, values[name])
        for name in ("image", "patch"):
            found[name] = None if values[name] is None else _pair(name, values[name])
        for name, of in (("registers", int), ("tied", bool), ("scaled", bool), ("one_token", bool)):
            if type(found[name]) is not of or found[name] < 0:
                raise InputRefused(f"{name} is {str(found[name])[:80]}, expected {of.__name__}")
        text = FAMILIES[kind].modality == "text"
        if wrong := [name for name in ("image", "patch", "channels") if (found[name] is None) != text]:
            raise InputRefused(f"{wrong[0]} is {found[wrong[0]]}, which no {FAMILIES[kind].modality} model has")
        if found["depth"] > DEEPEST:
            raise InputRefused(f"depth is {found['depth']}, and no model has more than {DEEPEST} blocks")
        return cls(**found)

    @property
    def grid(self) -> tuple[int, int]:
        """Patches per column and row of an image."""
        assert self.image and self.patch
        return self.image[0] // self.patch[0], self.image[1] // self.patch[1]

    @property
    def ahead(self) -> tuple[int, int]:
        """Class tokens and register tokens in front of an image's patches."""
        return int(self.family.class_token), self.registers

    def outnumbers(self, other: Geometry) -> bool:
        """Whether heads of this model may have to share one of the other's: it has more groups, or larger ones."""
        sizes = self.heads // self.kv_heads, other.heads // other.kv_heads
        return self.kv_heads > other.kv_heads or sizes[0] > sizes[1]

    def block(self, b: int, name: str) -> str:
        return f"{self.family.blocks}.{b}.{name}"

    def layers(self) -> list[Layer]:
        """Every linear layer of the backbone, then the possible heads."""
        f, out = self.family, []
        for b in range(self.depth):
            attention, mlp = self.block(b, f.attention_norm), self.block(b, f.mlp_norm)
            roles: list[tuple[str, Role, str, str | None, str | None]] = [
                (f.query, "query", "query", attention, None),
                (f.key, "key", "key", attention, None),
                (f.value, "value", "value", attention, None),
                (f.output, "output", "output", None, f.output_scale if self.scaled else None),
                *((name, "expand", f"expand.{i}", mlp, None) for i, name in enumerate(f.expand)),
                (f.contract, "contract", "contract", None, f.contract_scale if self.scaled else None),
            ]
            out += [
                Layer(self.block(b, name), role, slot, b, norm, scale and self.block(b, scale))
                for name, role, slot, norm, scale in roles
            ]
        return out + [Layer(n, "head", f"head.{slot}", self.depth, f.final_norm) for slot, n in f.heads.items()]

    def counterpart(self, layer: Layer, block: int | None) -> Layer | None:
        """This model's layer in the same slot of ``block``, or as a head."""
        return self._places.get((layer.slot, self.depth if layer.role == "head" else block))

    @cached_property
    def _places(self) -> dict[tuple[str, int | None], Layer]:
        return {(layer.slot, layer.block): layer for layer in self.layers()}

    def norms(self) -> list[str]:
        """Canonical names of the norms linear layers read, the final one last."""
        f = self.family
        inner = [self.block(b, n) for b in range(self.depth) for n in (f.attention_norm, f.mlp_norm)]
        return [*inner, f.final_norm]

    def space(self, b: int, part: str) -> Space:
        """A space of block ``b``: ``attention``, ``context``, ``mlp`` or ``middle``."""
        f = self.family
        match part:
            case "attention":
                return self._normed(self.block(b, f.attention_norm))
            case "context":
                return Space(self.block(b, f.output), "input", self.heads * self.head_dim)
            case "mlp":
                return self._normed(self.block(b, f.mlp_norm))
            case _:
                return Space(self.block(b, f.contract), "input", self.middle)

    def final(self) -> Space:
        """The final norm's output, over all tokens."""
        name = self.family.final_norm
        if not self.family.pooled_norm:
            return self._normed(name)
        return Space(f"{self.family.blocks}.{self.depth - 1}", "normed", self.width, name)

    def after(self, b: int) -> Space:
        """The first norm's output behind block ``b``: what its MLP writes, as the next reader sees it."""
        return self.space(b + 1, "attention") if b + 1 < self.depth else self.final()

    def first(self) -> Space:
        """The first norm's output behind the embeddings."""
        name = self.family.embedding_norm
        return self._normed(name) if name else self.space(0, "attention")

    def embedded(self) -> Space:
        """The embeddings' sum: what the first norm reads."""
        return Space(self.first().module, "input", self.width)

    def written(self, layer: Layer) -> Space:
        """A linear layer's own output, behind the factor that scales it."""
        out, _ = self.weights()[layer.role]
        return Space(layer.scale.rpartition(".")[0] if layer.scale else layer.name, "output", out)

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

    def _normed(self, norm: str) -> Space:
        return Space(norm, "output", self.width, norm)


def _recognised(model: nn.Module) -> Mapping[str, Any]:
    found = (family.recognise(model) for family in FAMILIES.values())
    return next((config for config in found if config), {})


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
