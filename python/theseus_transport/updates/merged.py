"""An adapter merged into its base, tensor by tensor: how DoRA, trained biases, tokens and norms are moved."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputRefused
from ..models.family import Family
from ..models.tensors import PIECE, Tensors, dtype_of, rows_of, shape_of
from .adapter import Adapter

TOKENS = "trainable_tokens_delta"
Change = Callable[[Tensor, slice], Tensor]  # (rows of a weight, which they are) -> these rows as tuned


@dataclass(frozen=True)
class Origin:
    """Where a merged tensor comes from: from where it is stored, changed by a layer of the adapter, if by any."""

    tensors: Tensors
    stored: str
    layer: str | None = None


class Merged(Mapping[str, Tensor]):
    """The tuned model that an adapter stands for, under the base's names; tensors are made when they are read.

    As PEFT runs it: a weight becomes ``W + s B A``; with DoRA each of its outputs then gets the trained magnitude;
    trained tokens replace rows of an embedding; what is saved whole replaces the base's. What changes is made in
    float32 (float64 where it is stored so), piece by piece; any other tensor is the base's own.

    Attributes:
        folder, config: the adapter's folder; it has no config of its own.
        shapes, dtypes: by name.
        changed: names of what the adapter changes; the rest is the base's.
        ties: whether a tied head changes as the embedding does: for trained tokens, and where the adapter ensures it;
            for all else it stays.
    """

    def __init__(self, base: Tensors, adapter: Adapter, family: Family) -> None:
        """Nothing is read yet.

        Raises:
            InputRefused: the adapter changes what the base does not have, or does not fit it.
        """
        self.folder: Path = getattr(adapter.tensors, "folder", Path())
        self.config: dict[str, Any] = {}
        self._adapter, self._family, self._read_from = adapter, family, (base, adapter.tensors)
        self._norms: dict[str, Tensor] = {}  # of the columns of tensors that DoRA scales by column
        self._origins = {name: Origin(base, name) for name in base}
        names = family.spelled(base)
        token, head = family.embedding("token"), f"{family.heads.get('vocabulary')}.weight"
        tied = names.get(token.name) if token and head not in names else None
        ensured = tied is not None and bool(adapter.config.get("ensure_weight_tying"))
        self.changed: set[str] = set()
        for name, key in adapter.whole().items():
            if ensured and family.canonical(name) == head:
                continue  # the embedding's, saved twice
            stored = names.setdefault(family.canonical(name), name)
            self._origins[stored] = Origin(adapter.tensors, key)
            self.changed.add(stored)
        if adapter.config.get("trainable_token_indices") and not any(TOKENS in p for p in adapter.parts.values()):
            raise InputRefused(
                "adapter_config.json says trainable_token_indices, but no trained token is in the adapter"
            )
        for layer, parts in adapter.parts.items():
            for kind in ["weight", *(["bias"] if "lora_B.bias" in parts else [])]:
                name = f"{family.canonical(layer)}.{kind}"
                if ensured and name == head:
                    continue
                if name == head and name not in names and tied:
                    names[name] = f"{layer}.weight"
                    self._origins[names[name]] = Origin(base, tied)
                if (found := names.get(name)) is None:
                    raise InputRefused(f"the adapter changes the {kind} of {layer}, but the source base has none")
                self._origins[found] = replace(self._origins[found], layer=layer)
                self.changed.add(found)
        trained = {family.canonical(layer) for layer, parts in adapter.parts.items() if TOKENS in parts}
        self.ties = ensured or (token is not None and token.name.removesuffix(".weight") in trained)
        self.shapes = {name: shape_of(origin.tensors, origin.stored) for name, origin in self._origins.items()}
        self.dtypes = {name: self._dtype(origin) for name, origin in self._origins.items()}
        for name, origin in self._origins.items():
            self._check(name, origin)

    @property
    def bytes_read(self) -> int:
        """Bytes of tensors read from the base and the adapter, by anyone."""
        return sum(getattr(tensors, "bytes_read", 0) for tensors in self._read_from)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of forward passes: float64 where any tensor is float64, else float32."""
        return torch.float64 if torch.float64 in self.dtypes.values() else torch.float32

    def rows(self, name: str, rows: slice) -> Tensor:
        """Consecutive rows of a tensor, [rows, ...]; no others are read, where DoRA needs no sum over them."""
        origin, shape = self._origins[name], self.shapes[name]
        if origin.layer is None:
            return rows_of(origin.tensors, origin.stored, rows)
        first, last, _ = rows.indices(shape[0])
        value = torch.empty(last - first, *shape[1:], dtype=self.dtypes[name])
        change = self._change(name, origin.layer)
        for piece in self._pieces(name, first, last):
            value[piece.start - first : piece.stop - first] = change(self._before(name, piece), piece)
        return value

    def take(self, name: str, index: Tensor) -> Tensor:
        """The rows that ``index`` names (int64), [len(index), ...]."""
        return self[name][index]

    def __getitem__(self, name: str) -> Tensor:
        origin = self._origins[name]
        if origin.layer is None:
            return origin.tensors[origin.stored]
        return self.rows(name, slice(0, self.shapes[name][0]))

    def __iter__(self) -> Iterator[str]:
        return iter(self._origins)

    def __len__(self) -> int:
        return len(self._origins)

    def _dtype(self, origin: Origin) -> torch.dtype:
        own = dtype_of(origin.tensors, origin.stored)
        return own if origin.layer is None or own == torch.float64 else torch.float32

    def _pieces(self, name: str, first: int, last: int) -> Iterator[slice]:
        step = max(1, PIECE // max(1, prod(self.shapes[name][1:])))
        return (slice(start, min(start + step, last)) for start in range(first, last, step))

    def _before(self, name: str, rows: slice) -> Tensor:
        """Rows of the stored tensor, new, in the dtype of the merged one."""
        origin = self._origins[name]
        stored = rows_of(origin.tensors, origin.stored, rows).detach()
        return stored.to("cpu", self.dtypes[name], copy=True, memory_format=torch.contiguous_format)

    def _part(self, layer: str, part: str, dtype: torch.dtype) -> Tensor:
        return self._adapter.tensors[self._adapter.parts[layer][part]].detach().to("cpu", dtype)

    def _turned(self, layer: str) -> bool:
        """Whether the rows of the stored weight are the layer's inputs, as in embeddings."""
        [slot, *_] = self._family.parts(self._family.canonical(layer)).values()
        return slot.transposed or "lora_embedding_A" in self._adapter.parts[layer]

    def _change(self, name: str, layer: str) -> Change:
        """What the adapter does to rows of a tensor, with all that it takes read."""
        parts, dtype = self._adapter.parts[layer], self.dtypes[name]
        if TOKENS in parts:
            index, trained = self._tokens(layer), self._part(layer, TOKENS, dtype)

            def replaced(before: Tensor, rows: slice) -> Tensor:
                inside = (index >= rows.start) & (index < rows.stop)
                before[index[inside] - rows.start] = trained[inside]
                return before

            return replaced
        scaling = self._adapter.scaling(layer)
        if name.endswith(".bias"):
            shift = scaling * self._part(layer, "lora_B.bias", dtype)
            return lambda before, rows: before.add_(shift[rows])
        kind, turned = "_embedding" if "lora_embedding_A" in parts else "", self._turned(layer)
        a, b = (self._part(layer, f"lora{kind}_{factor}", dtype).flatten(1) for factor in "AB")
        left, right = (a.T, b.T) if turned else (b, a)

        def added(before: Tensor, rows: slice) -> Tensor:
            before.flatten(1).addmm_(left[rows], right, alpha=scaling)  # a view: rows are contiguous
            return before

        if "lora_magnitude_vector" not in parts:
            return added
        magnitude = self._part(layer, "lora_magnitude_vector", dtype).flatten()
        if turned:
            scale = magnitude / self._column_norms(name, added)
            return lambda before, rows: added(before, rows).mul_(scale)

        def scaled(before: Tensor, rows: slice) -> Tensor:
            sums = added(before, rows).flatten(1)
            sums.mul_((magnitude[rows] / sums.norm(dim=1))[:, None])
            return before

        return scaled

    def _column_norms(self, name: str, added: Change) -> Tensor:
        if name not in self._norms:
            pieces = self._pieces(name, 0, self.shapes[name][0])
            sums = torch.stack([added(self._before(name, rows), rows).square().sum(0) for rows in pieces])
            self._norms[name] = sums.sum(0).sqrt()
        return self._norms[name]

    def _tokens(self, layer: str) -> Tensor:
        """The rows that are trained, from the adapter's configuration."""
        given = self._adapter.config.get("trainable_token_indices")
        if isinstance(given, Mapping):
            given = next((ids for name, ids in given.items() if f".{layer}".endswith(f".{name}")), None)
        if not isinstance(given, Sequence) or not all(type(i) is int for i in given) or len({*given}) < len(given):
            raise InputRefused(
                f"adapter_config.json: trainable_token_indices of {layer} is {given!r}, expected token ids"
            )
        return torch.tensor(given, dtype=torch.int64)

    def _check(self, name: str, origin: Origin) -> None:
        """Refuse parts of a layer that do not fit the tensor they change."""
        if (layer := origin.layer) is None:
            return
        shape, keys = self.shapes[name], self._adapter.parts[layer]
        parts = {part: shape_of(self._adapter.tensors, key) for part, key in keys.items()}
        inner = prod(shape[1:])
        if TOKENS in parts:
            index = self._tokens(layer)
            fits = parts == {TOKENS: (len(index), inner)}
            fits &= all(0 <= i < shape[0] for i in index.tolist())
        else:
            factors = ["lora_embedding_A", "lora_embedding_B"] if "lora_embedding_A" in parts else ["lora_A", "lora_B"]
            config = self._adapter.config
            asked = {"lora_B.bias": config.get("lora_bias"), "lora_magnitude_vector": config.get("use_dora")}
            behind = [part for part, wanted in asked.items() if wanted or part in parts]
            a, b = (parts.get(factor, ()) for factor in factors)
            outputs, inputs = (inner, shape[0]) if self._turned(layer) else (shape[0], inner)
            if name.endswith(".bias"):
                outputs, inputs = shape[0], prod(a[1:])
            fits = parts.keys() == {*factors, *behind} and min(len(a), len(b)) > 1
            fits = fits and (a[0], prod(a[1:])) == (self._adapter.rank(layer), inputs)
            fits = fits and (b[0], prod(b[1:])) == (outputs, a[0]) and all(prod(parts[p]) == outputs for p in behind)
        if not fits:
            said = ", ".join(f"{part} {list(size)}" for part, size in sorted(parts.items()))
            raise InputRefused(
                f"{layer}: {said} do not fit {name} {list(shape)} of the source base and adapter_config.json; "
                "was the right base given, and the adapter saved whole?"
            )
