"""What is decided of a tensor: its fate, and how a tensor of the target comes to its update."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .adapter import Factors

Fate = Literal["transported", "fitted", "folded", "unchanged", "left"]


@dataclass(frozen=True)
class TensorFate:
    """The fate of one tensor (or adapted layer) of the update, by its name in the source, and why."""

    tensor: str
    fate: Fate
    note: str = ""


@dataclass(frozen=True)
class MovedFactors:
    """The moved factors of one module of the target.

    Attributes:
        rank, dtype, scaling: of A and B; shape: [out, in] of the module.
        needs: keys of rules and fits that have to be there; sources: canonical names of the source it is made of, of a
            full tune.
    """

    rank: int
    shape: tuple[int, int]
    dtype: torch.dtype
    scaling: float
    compute: Callable[[], Factors]
    needs: frozenset[str] = frozenset()
    sources: frozenset[str] = frozenset()


@dataclass(frozen=True, eq=False)
class Computation:
    """How tensors of the target get their update.

    Attributes:
        compute: canonical name -> update in float64 on the device, of all rows (None) or of one tile's.
        needs: keys of the alignment's rules and vectors, and of fits, that have to be there.
        sources: canonical names of the source; while none of them changed, nothing moves.
        tiles: the rows to compute at a time, where rows are independent and the matrix is large.
    """

    compute: Callable[[slice | None], dict[str, Tensor]]
    needs: frozenset[str]
    sources: frozenset[str]
    tiles: tuple[slice, ...] = ()
