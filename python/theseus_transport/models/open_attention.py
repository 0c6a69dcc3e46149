"""Attention that hides its projections from hooks, swapped for an equivalent that shows them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class OpenAttention(nn.Module):
    """torch's ``MultiheadAttention`` computed by calling its two projections as modules, so that their hooks fire.

    It holds the very parameters of the original: ``in_proj`` is q, k and v fused, ``out_proj`` the original's own.
    """

    def __init__(self, closed: nn.MultiheadAttention) -> None:
        super().__init__()
        assert closed.in_proj_weight is not None
        width = closed.embed_dim
        self.in_proj = nn.Linear(width, 3 * width, bias=False, device="meta")
        self.in_proj.weight, self.in_proj.bias = closed.in_proj_weight, closed.in_proj_bias
        self.out_proj, self.heads, self.batch_first = closed.out_proj, closed.num_heads, closed.batch_first
        self._closed = (closed,)  # in a tuple, so that its parameters are not listed twice

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """[batch, tokens, width] or, without ``batch_first``, [tokens, batch, width]; attention weights are not made.

        Anything but plain self-attention of a batch is left to the original.
        """
        if query is not key or key is not value or key_padding_mask is not None or query.ndim != 3:
            given: tuple[Tensor, Tensor | None] = self._closed[0](
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
            return given
        rows = query if self.batch_first else query.transpose(0, 1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.in_proj(rows).chunk(3, -1))
        if attn_mask is not None and attn_mask.ndim == 3:
            attn_mask = attn_mask.unflatten(0, (-1, self.heads))
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = ~attn_mask  # MultiheadAttention masks where true, scaled_dot_product_attention where false
        context = F.scaled_dot_product_attention(
            q, k, v, attn_mask=attn_mask, is_causal=is_causal and attn_mask is None
        )
        out = self.out_proj(context.transpose(1, 2).flatten(-2))
        return (out if self.batch_first else out.transpose(0, 1)), None


@contextmanager
def open_attention(model: nn.Module) -> Iterator[None]:
    """Swap every ``MultiheadAttention`` of a model whose q, k and v are one tensor; all is put back on leaving."""
    closed = opened_for_good(model)
    try:
        yield
    finally:
        for parent, name, child in closed:
            setattr(parent, name, child)


def opened_for_good(model: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """Swap them, and return what was swapped: (parent, name in it, module)."""
    swapped = [
        (parent, name, child)
        for parent in list(model.modules())
        for name, child in parent.named_children()
        if isinstance(child, nn.MultiheadAttention) and child.in_proj_weight is not None and child.bias_k is None
    ]
    for parent, name, child in swapped:
        setattr(parent, name, OpenAttention(child))
    return [(parent, name, child) for parent, name, child in swapped]
