"""Two models that transformers does not have: a tower stored as OpenCLIP stores it, and somebody's own."""

from types import SimpleNamespace

import torch
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head attention over all tokens, with separate projections under names of its own."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ask, self.offer, self.carry, self.merge = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.ask, self.offer, self.carry)
        )
        context = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.merge(context.transpose(1, 2).flatten(2))


class HomeBlock(Attention):
    """A pre-norm block that is its own attention module."""

    def __init__(self, sizes: SimpleNamespace) -> None:
        super().__init__(sizes.hidden_size, sizes.num_attention_heads)
        self.before, self.between = (nn.LayerNorm(sizes.hidden_size, sizes.eps) for _ in range(2))
        self.widen = nn.Linear(sizes.hidden_size, sizes.intermediate_size)
        self.narrow = nn.Linear(sizes.intermediate_size, sizes.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        x = x + super().forward(self.before(x))
        return x + self.narrow(nn.functional.silu(self.widen(self.between(x))))


class HomeMade(nn.Module):
    """A small language model nobody has heard of; `config` is a plain dict."""

    def __init__(self, config: dict) -> None:
        super().__init__()
        self.config = {"model_type": "home-made", **config}
        sizes = SimpleNamespace(**config)
        self.words = nn.Embedding(sizes.vocab_size, sizes.hidden_size)
        self.places = nn.Embedding(sizes.max_position_embeddings, sizes.hidden_size)
        self.stack = nn.ModuleList(HomeBlock(sizes) for _ in range(sizes.num_hidden_layers))
        self.last = nn.LayerNorm(sizes.hidden_size, sizes.eps)
        self.read = nn.Linear(sizes.hidden_size, sizes.vocab_size, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.words(input_ids) + self.places(torch.arange(input_ids.shape[1], device=input_ids.device))
        for block in self.stack:
            x = block(x)
        return self.read(self.last(x))


class ResidualBlock(nn.Module):
    def __init__(self, sizes: SimpleNamespace) -> None:
        super().__init__()
        width = sizes.hidden_size
        self.ln_1, self.ln_2 = (nn.LayerNorm(width, sizes.eps) for _ in range(2))
        self.attn = nn.MultiheadAttention(width, sizes.num_attention_heads, batch_first=True)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, sizes.intermediate_size))
        self.mlp.add_module("gelu", nn.GELU())
        self.mlp.add_module("c_proj", nn.Linear(sizes.intermediate_size, width))

    def forward(self, x: Tensor) -> Tensor:
        z = self.ln_1(x)
        x = x + self.attn(z, z, z, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class Blocks(nn.Module):
    def __init__(self, sizes: SimpleNamespace) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(ResidualBlock(sizes) for _ in range(sizes.num_hidden_layers))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.resblocks:
            x = block(x)
        return x


class ClassTokenTower(nn.Module):
    """A vision tower under OpenCLIP's parameter names, without a config; returns the projected class token."""

    def __init__(self, config: dict) -> None:
        super().__init__()
        sizes = SimpleNamespace(**config)
        width, grid = sizes.hidden_size, sizes.image_size // sizes.patch_size
        self.conv1 = nn.Conv2d(sizes.num_channels, width, sizes.patch_size, sizes.patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros(grid**2 + 1, width))
        self.ln_pre, self.ln_post = (nn.LayerNorm(width, sizes.eps) for _ in range(2))
        self.transformer = Blocks(sizes)
        self.proj = nn.Parameter(torch.zeros(width, sizes.projection_dim))

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = self.conv1(pixel_values).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(len(patches), 1, -1)
        x = torch.cat([first, patches], dim=1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj
