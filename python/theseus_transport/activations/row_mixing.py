"""Row mixings: which rows of one model's activations stand for which rows of the other's (a sparse matrix P in CSR)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputRefused

CSR: TypeAlias = "tuple[Tensor | None, Tensor, Tensor | None]"


@dataclass(frozen=True)
class RowMixing:
    """``P @ x`` for activations ``x`` [tokens, width]: P [rows, tokens] in CSR, every row summing to one.

    Because rows sum to one, mixing commutes with ``y = W x + b`` and the count of a moment is the count of rows.

    Attributes:
        column: int64 [entries], the token each entry reads.
        row_ptr: int64 [rows + 1], or None when every row has exactly one entry (a selection).
        weight: float64 [entries], or None when every weight is one.
        tokens: number of tokens mixed.
    """

    column: Tensor
    tokens: int
    row_ptr: Tensor | None = None
    weight: Tensor | None = None

    def __post_init__(self) -> None:
        if self.weight is None:
            if self.row_ptr is not None and not bool((self.row_ptr.diff() == 1).all()):
                raise InputRefused("row mixing: without weights every row needs exactly one entry; pass weights")
            return
        sums = self._sum_rows(self.weight)
        if not bool(torch.isclose(sums, torch.ones_like(sums), rtol=0, atol=1e-9).all()):
            worst = float(sums[(sums - 1).abs().argmax()])
            raise InputRefused(f"row mixing: a row sums to {worst:.6g}, but every row must sum to 1")

    @property
    def rows(self) -> int:
        return len(self.column) if self.row_ptr is None else len(self.row_ptr) - 1

    @property
    def csr(self) -> CSR:
        """(row_ptr, column, weight), as ``theseus_ext.cross_moment_`` takes it."""
        return self.row_ptr, self.column, self.weight

    def _sum_rows(self, entries: Tensor) -> Tensor:
        if self.row_ptr is None:
            return entries
        row = torch.repeat_interleave(torch.arange(self.rows, device=entries.device), self.row_ptr.diff())
        return entries.new_zeros(self.rows, *entries.shape[1:]).index_add_(0, row, entries)

    def __call__(self, x: Tensor) -> Tensor:
        """``P @ x``: [tokens, width] -> [rows, width], in the dtype of ``x``."""
        entries = x.index_select(0, self.column)
        if self.weight is not None:
            entries = entries * self.weight.to(x.dtype)[:, None]
        return self._sum_rows(entries)

    def to(self, device: torch.device) -> RowMixing:
        def move(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.to(device)

        return RowMixing(self.column.to(device), self.tokens, move(self.row_ptr), move(self.weight))

    @property
    def leading(self) -> Tensor:
        """int64 [rows]: the token that the first entry of each row reads."""
        return self.column if self.row_ptr is None else self.column[self.row_ptr[:-1]]

    def only(self, kept: Tensor) -> RowMixing:
        """The rows where ``kept`` (bool [rows]) is true."""
        if self.row_ptr is None:
            return RowMixing(self.column[kept], self.tokens, None, None if self.weight is None else self.weight[kept])
        sizes = self.row_ptr.diff()
        entries = torch.repeat_interleave(kept, sizes)
        row_ptr = torch.cat([self.row_ptr[:1], sizes[kept].cumsum(0)])
        return RowMixing(
            self.column[entries], self.tokens, row_ptr, None if self.weight is None else self.weight[entries]
        )

    def then(self, outer: RowMixing) -> RowMixing:
        """``outer @ self`` of a selection: ``outer`` mixes the rows this one selects."""
        assert self.row_ptr is None and outer.tokens == self.rows
        return RowMixing(self.column[outer.column], self.tokens, outer.row_ptr, outer.weight)

    def batched(self, batch: int) -> RowMixing:
        """The mixing of ``batch`` samples laid out one after the other, each mixed as this one mixes its own."""
        start = torch.arange(batch)
        column = (self.column + self.tokens * start[:, None]).reshape(-1)
        if self.row_ptr is None:
            return RowMixing(column, self.tokens * batch)
        inner = self.row_ptr[:-1] + len(self.column) * start[:, None]
        row_ptr = torch.cat([inner.reshape(-1), torch.tensor([len(column)])])
        weight = None if self.weight is None else self.weight.repeat(batch)
        return RowMixing(column, self.tokens * batch, row_ptr, weight)


def from_dense(matrix: Tensor) -> RowMixing:
    """The mixing whose matrix P [rows, tokens] is given densely; zeros are dropped."""
    row, column = matrix.nonzero(as_tuple=True)
    row_ptr = torch.cat([torch.zeros(1, dtype=torch.int64), torch.bincount(row, minlength=len(matrix)).cumsum(0)])
    return RowMixing(column, matrix.shape[1], row_ptr, matrix[row, column].double())


def select(mask: Tensor) -> RowMixing:
    """Keep the tokens where ``mask`` [tokens] (any shape, flattened) is true; masked rows are never multiplied by 0."""
    flat = mask.reshape(-1).bool()
    return RowMixing(flat.nonzero().squeeze(1), flat.numel())


def mean(tokens: int) -> RowMixing:
    """One row: the mean over all tokens of a sample."""
    return from_dense(torch.full((1, tokens), 1.0 / tokens, dtype=torch.float64))


def linear(tokens: int, rows: int) -> RowMixing:
    """Linear interpolation of ``tokens`` positions to ``rows``, with half-pixel centres."""
    basis = torch.eye(tokens, dtype=torch.float64)[None]  # [1, channels = tokens, positions]
    return from_dense(F.interpolate(basis, size=rows, mode="linear", align_corners=False)[0].T.contiguous())


def bilinear(grid: tuple[int, int], to: tuple[int, int], *, prefix: int = 1) -> RowMixing:
    """Bilinear interpolation of a patch grid to another; ``prefix`` tokens in front (class token) map to themselves."""
    patches, rows = grid[0] * grid[1], to[0] * to[1]
    basis = torch.eye(patches, dtype=torch.float64).reshape(1, patches, *grid)
    mixed = F.interpolate(basis, size=to, mode="bilinear", align_corners=False).reshape(patches, rows).T
    return from_dense(torch.block_diag(torch.eye(prefix, dtype=torch.float64), mixed) if prefix else mixed)


def overlap(source: Tensor, target: Tensor) -> tuple[RowMixing, Tensor]:
    """Mix source tokens onto target tokens of the same text by shared characters.

    Args:
        source: int64 [tokens_S, 2], start and end character of each source token (end exclusive; empty = special).
        target: int64 [tokens_T, 2], start and end character of each target token of the same text.

    Returns:
        The mixing, one row per kept target token, and bool [tokens_T] saying which target tokens were kept: those that
        share at least one character with a source token.
    """
    start = torch.maximum(target[:, None, 0], source[None, :, 0])
    end = torch.minimum(target[:, None, 1], source[None, :, 1])
    shared = (end - start).clamp(min=0).double()
    kept = shared.sum(1) > 0
    return from_dense(shared[kept] / shared[kept].sum(1, keepdim=True)), kept
