"""What a family of models is: which linear layers it has, which norm each reads, how a checkpoint keeps them.

Names are canonical: those of the model's modules, relative to the backbone. Checkpoints and adapters may spell them
otherwise; a family's ``aliases`` bring them back, and ``fused`` and ``transposed`` say what is kept otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from ..errors import InputRefused

Sizes = Callable[[Mapping[str, Any]], Mapping[str, Any]]
# what torch.compile, FSDP, activation checkpointing and, in front of all, data parallelism add to names
WRAPPED = re.compile(r"^(module\.)+|(^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def unwrapped(name: str) -> str:
    """A tensor's name without what wrappers of the module it was saved from added to it."""
    while (bare := WRAPPED.sub("", name)) != name:
        name = bare
    return name


@dataclass(frozen=True)
class Slot:
    """Where a canonical tensor is kept: in all of a stored tensor, or in one of its equal parts, or transposed.

    Attributes:
        stored: name of the stored tensor.
        part, parts: which of how many equal parts along the output features.
        transposed: the stored matrix is [in, out].
    """

    stored: str
    part: int = 0
    parts: int = 1
    transposed: bool = False

    def shape(self, stored: Sequence[int]) -> tuple[int, ...]:
        """Shape of the canonical tensor, from the stored one's."""
        if not stored:
            return ()
        rows, *rest = reversed(stored) if self.transposed and len(stored) == 2 else stored
        if rows % self.parts:
            raise InputRefused(f"{self.stored} has {rows} output features, which {self.parts} layers cannot share")
        return rows // self.parts, *rest

    def view(self, stored: Tensor) -> Tensor:
        """The canonical tensor, as a view of the stored one."""
        rows = stored.mT if self.transposed and stored.ndim == 2 else stored
        return rows.chunk(self.parts)[self.part] if self.parts > 1 else rows


@dataclass(frozen=True)
class Embedding:
    """A parameter that makes the first block's input: what for, its canonical name, the axis of the width."""

    slot: Literal["token", "position", "class", "register", "patch", "patch_bias", "type"]
    name: str
    axis: int


@dataclass(frozen=True)
class Family:
    """One record per family; adding a family is adding one, in ``text_families.py`` or ``vision_families.py``, or with
    ``theseus_transport.register``.

    Attributes:
        model_type: ``config.model_type``.
        modality: what the forward pass reads, ``text`` (``input_ids``) or ``vision`` (``pixel_values``).
        norm: ``rms`` or ``layer`` (LayerNorm removes the mean over features).
        prefix: name of the backbone inside a model with a head.
        blocks: canonical name of the list of blocks; the next names are relative to a block.
        attention_norm, mlp_norm: the norms in front of the attention and the MLP.
        query, key, value, output: the attention's linear layers.
        expand: the layers that read the MLP's norm, the gate first; contract: the one that reads the MLP's middle.
        query_norm, key_norm: norms over each head of q and k, if the family has them.
        output_scale, contract_scale: per-feature factors behind the two layers that write the residual, if any.
        final_norm: the norm behind the last block; pooled_norm: it reads one token only.
        embedding_norm: a norm between the embeddings and the first block, if any.
        embeddings: the parameters that make that output.
        heads: layers that read the final norm, by purpose; features of one purpose are the same on both sides.
        classes_read: how many times the head over classes reads the final norm's output, each time other tokens of it.
        class_heads: purposes of heads that read the class token alone.
        tied: whether ``tie_word_embeddings`` is meant where a config does not say.
        class_token: images have one in front.
        fused: layer that keeps several -> names of the layers in it, in order; all relative to a block.
        transposed: patterns of layers whose stored weight is [in, out].
        adapters: whether PEFT can wrap its layers.
        left: patterns of parameters that stay by rule, with the reason.
        aliases: (pattern, replacement) that turn other spellings into canonical names.
        geometry: turns a config into the sizes ``Geometry.of`` reads, in transformers' usual names.
        recognise: config of a module that carries none, or None if the module is no such model.
    """

    model_type: str
    modality: Literal["text", "vision"]
    norm: Literal["rms", "layer"]
    blocks: str
    attention_norm: str
    mlp_norm: str
    query: str
    key: str
    value: str
    output: str
    expand: tuple[str, ...]
    contract: str
    final_norm: str
    embeddings: tuple[Embedding, ...]
    heads: Mapping[str, str] = field(default_factory=dict)
    classes_read: int = 1
    class_heads: tuple[str, ...] = ()
    prefix: str = ""
    query_norm: str | None = None
    key_norm: str | None = None
    output_scale: str | None = None
    contract_scale: str | None = None
    pooled_norm: bool = False
    embedding_norm: str | None = None
    tied: bool = False
    class_token: bool = False
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    transposed: tuple[str, ...] = ()
    adapters: bool = True
    left: Mapping[str, str] = field(default_factory=dict)
    aliases: tuple[tuple[str, str], ...] = ()
    geometry: Sizes = dict
    recognise: Callable[[Any], Mapping[str, Any] | None] = lambda module: None

    def block_of(self, name: str) -> int | None:
        """The number of the block in which a canonical name of a tensor or module lies; None outside the blocks."""
        inside = re.match(rf"{re.escape(self.blocks)}\.(\d{{1,9}})\.", name)  # a file may name any number
        return int(inside[1]) if inside else None

    def embedding(self, slot: str) -> Embedding | None:
        """The embedding in a slot, if the family has one."""
        return next((e for e in self.embeddings if e.slot == slot), None)

    def reads_one_token(self, names: Iterable[str]) -> bool:
        """Whether a head that reads the class token alone is among these stored tensors."""
        heads = {f"{self.heads.get(purpose)}.weight" for purpose in self.class_heads}
        return bool(heads) and any(self.canonical(name) in heads for name in names)

    def canonical(self, name: str) -> str:
        """The canonical name of a stored tensor or a module, whatever its spelling."""
        name = unwrapped(name).removeprefix(f"{self.prefix}.")
        for pattern, replacement in self.aliases:
            name = re.sub(pattern, replacement, name)
        return name

    def by_block(self, names: Iterable[str]) -> dict[int, list[str]]:
        """Stored tensors by the block they lie in; those outside blocks are not among them."""
        found: dict[int, list[str]] = {}
        for name in names:
            if (block := self.block_of(self.canonical(name))) is not None:
                found.setdefault(block, []).append(name)
        return found

    def spelled(self, names: Iterable[str]) -> dict[str, str]:
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

    def index(self, names: Iterable[str]) -> dict[str, Slot]:
        """Canonical tensor name -> where it is kept among ``names``; a fused tensor is found under each part's name."""
        found: dict[str, Slot] = {}
        for name, stored in self.spelled(names).items():
            layer, dot, kind = name.rpartition(".")
            for part, slot in self.parts(layer, stored).items():
                found[f"{part}{dot}{kind}"] = slot
        return found

    def modules(self, names: Iterable[str]) -> dict[str, Slot]:
        """Canonical layer or module name -> the module that computes it, and which part of its output it is."""
        spelled = self.spelled(names).items()
        return {part: slot for layer, stored in spelled for part, slot in self.parts(layer, stored).items()}

    def parts(self, layer: str, stored: str = "") -> dict[str, Slot]:
        """The canonical layers kept in a stored layer: itself, or those of a fused one."""
        block = self.block_of(layer)
        start = "" if block is None else f"{self.blocks}.{block}."
        names = self.fused.get(layer.removeprefix(start), ())
        turned = any(re.search(pattern, layer) for pattern in self.transposed)
        if block is None or not names:
            return {layer: Slot(stored, transposed=turned)}
        return {f"{start}{name}": Slot(stored, i, len(names), turned) for i, name in enumerate(names)}

    def home(self, layer: str) -> tuple[str, Slot]:
        """The module that computes a canonical layer, and which part of its output the layer is."""
        for fused, names in self.fused.items():
            for i, name in enumerate(names):
                if name.startswith(f"{fused}.") and layer.endswith(f".{name}"):
                    module = layer.removesuffix(name) + fused
                    return module, Slot(module, i, len(names))
        return layer, Slot(layer)

    def why_left(self, name: str) -> str | None:
        """The reason a parameter stays behind by rule, or None."""
        return next((why for pattern, why in self.left.items() if re.search(pattern, name)), None)
