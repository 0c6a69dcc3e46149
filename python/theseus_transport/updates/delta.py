"""Task vectors, read lazily, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputRefused
from ..models.family import Family, Slot
from ..models.geometry import Geometry
from ..models.tensors import Tensors, dtype_of, part_of, shape_of, tensors_of
from .adapter import MERGING, Adapter
from .merged import Merged


@dataclass(frozen=True)
class Delta:
    """An update of a base model: a tuned model beside it, or an adapter on it. Nothing is read until it is asked for.

    Attributes:
        base: tensors of the base, as stored.
        tuned: tensors of the tuned model, or None.
        adapter: a LoRA adapter, or None.
        adapted: of tuned tensors that are the base's own, changed by an adapter, which these are; else None.
        config: of the tuned model, where it is known.
    """

    base: Tensors
    tuned: Tensors | None = None
    adapter: Adapter | None = None
    adapted: Merged | None = field(default=None, compare=False)
    config: Any = field(default=None, compare=False)

    def __repr__(self) -> str:
        if self.adapter is None:
            return f"Delta(full tune, {len(self.tuned or ())} tensors)"
        return f"Delta(LoRA adapter, {len(self.adapter.tensors)} tensors)"

    @classmethod
    def between(cls, base: nn.Module | Tensors, tuned: nn.Module | Tensors) -> Delta:
        """The task vector ``tuned - base``; each a module, a state dict or a lazy checkpoint."""
        return cls(tensors_of(base), tensors_of(tuned), config=getattr(tuned, "config", None))

    @classmethod
    def from_adapter(cls, folder: str | Path, base: nn.Module | Tensors) -> Delta:
        """A PEFT LoRA adapter in ``folder``, trained on ``base``."""
        return cls(tensors_of(base), adapter=Adapter.open(folder))

    @classmethod
    def from_lora(cls, config: Mapping[str, Any], tensors: Tensors, base: nn.Module | Tensors) -> Delta:
        """A LoRA adapter in memory: PEFT's configuration as a dict, and tensors under PEFT's names."""
        return cls(tensors_of(base), adapter=Adapter(config, tensors))

    def needs_merging(self, family: Family) -> bool:
        """Whether this is an adapter that holds more than factors and saved heads."""
        if self.adapter is None:
            return False
        f = family
        norms = (f.attention_norm, f.mlp_norm, f.query_norm, f.key_norm, f.final_norm, f.embedding_norm)
        ends = tuple(f".{name}" for name in (*norms, f.output_scale, f.contract_scale) if name)
        whole = [f.canonical(name) for name in self.adapter.whole()]
        tables = {embedding.name for embedding in f.embeddings}
        return bool(self.adapter.beyond_factors()) or any(
            name in tables or f".{name}".removesuffix(".weight").removesuffix(".bias").endswith(ends) for name in whole
        )

    def merged(self, family: Family) -> Delta:
        """This update as one of a full tune: the adapter merged into its base, each tensor when it is read.

        So moves what factors cannot carry: DoRA, trained biases, tokens and norms, LoRA on embeddings.
        """
        if self.adapter is None:
            return self
        merged = Merged(self.base, self.adapter, family)
        return replace(self, tuned=merged, adapter=None, adapted=merged)

    @property
    def ties(self) -> bool:
        """Whether the tuned model, or what an adapter saves, has one tensor for embedding and head."""
        if self.adapter is not None:
            return bool(self.adapter.config.get("ensure_weight_tying"))
        if self.adapted is not None:
            return self.adapted.ties
        try:
            return Geometry.of(self.config).tied
        except (InputRefused, TypeError):  # unknown
            return False

    def tuned_tensors(self, family: Family) -> Renamed:
        """Canonical name -> tensor of the tuned model, lazily; for an adapter only what it saves whole."""
        if self.tuned is not None:
            return Renamed(self.tuned, family.index(self.tuned))
        assert self.adapter is not None
        if beyond := self.adapter.beyond_factors():
            raise InputRefused(f"the adapter holds {' and '.join(beyond)}, which no moved adapter can; {MERGING}")
        whole = self.adapter.whole()
        index = family.index(whole)
        return Renamed(self.adapter.tensors, {n: replace(s, stored=whole[s.stored]) for n, s in index.items()})


class Renamed(Mapping[str, Tensor]):
    """Tensors under canonical names, reading through."""

    def __init__(self, tensors: Tensors, slots: dict[str, Slot]) -> None:
        self.tensors, self.slots = tensors, slots

    def __getitem__(self, name: str) -> Tensor:
        slot = self.slots[name]
        return slot.view(self.tensors[slot.stored])

    def rows(self, name: str, rows: slice) -> Tensor:
        """These rows of a tensor."""
        return part_of(self.tensors, self.slots[name], rows)

    def shape(self, name: str) -> tuple[int, ...]:
        slot = self.slots[name]
        return slot.shape(shape_of(self.tensors, slot.stored))

    def dtype(self, name: str) -> torch.dtype:
        return dtype_of(self.tensors, self.slots[name].stored)

    def __contains__(self, name: object) -> bool:
        return name in self.slots

    def __iter__(self) -> Iterator[str]:
        return iter(self.slots)

    def __len__(self) -> int:
        return len(self.slots)
