"""A model in memory, in the place of a checkpoint: tensors that a window reads, and the model they belong to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..models.tensors import Tensors, dtype_of, rows_of, shape_of


class Resident(Mapping[str, Tensor]):
    """Tensors by name, of a module or read from files, and a model without weights that they fill.

    Attributes:
        folder, config: there are none.
        shapes, dtypes: by name.
    """

    folder, config, bytes_read = Path("the model in memory"), dict[str, Any](), 0

    def __init__(self, tensors: Tensors, model: nn.Module) -> None:
        self._tensors, self._model = tensors, model
        self.shapes = {name: shape_of(tensors, name) for name in tensors}
        self.dtypes = {name: dtype_of(tensors, name) for name in tensors}

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of forward passes: float64 where any tensor is float64, else float32."""
        return torch.float64 if torch.float64 in self.dtypes.values() else torch.float32

    def emptied(self) -> nn.Module:
        """The model, its parameters on the meta device."""
        return self._model

    def rows(self, name: str, rows: slice) -> Tensor:
        """Consecutive rows of a tensor, [rows, ...]."""
        return rows_of(self._tensors, name, rows).detach()

    def take(self, name: str, index: Tensor) -> Tensor:
        """The rows that ``index`` names (int64), [len(index), ...]."""
        whole = self[name]
        return whole[index.to(whole.device)]

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name].detach()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
