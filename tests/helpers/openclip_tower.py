"""A vision tower with OpenCLIP's names and order of operations, for tests without that library and without weights."""

from collections import OrderedDict

import torch
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, width: int, heads: int, middle: int, scaled: bool) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ls_1, self.ls_2 = (Scale(width) if scaled else nn.Identity() for _ in range(2))
        layers = [("c_fc", nn.Linear(width, middle)), ("gelu", nn.GELU()), ("c_proj", nn.Linear(middle, width))]
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x: Tensor) -> Tensor:
        z = self.ln_1(x)
        x = x + self.ls_1(self.attn(z, z, z, need_weights=False)[0])
        return x + self.ls_2(self.mlp(self.ln_2(x)))


class Scale(nn.Module):
    """LayerScale."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Tower(nn.Module):
    """[images, 3, side, side] to [images, output]."""

    def __init__(
        self,
        *,
        width: int,
        image: int,
        patch: int = 8,
        layers: int = 2,
        heads: int = 4,
        output_dim: int = 24,
        ratio: int = 4,
        scaled: bool = False,
    ) -> None:
        super().__init__()
        given = {"width": width, "image": image, "patch": patch, "layers": layers, "heads": heads}
        self.sizes = {**given, "output_dim": output_dim, "ratio": ratio, "scaled": scaled}
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros((image // patch) ** 2 + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList(Block(width, heads, ratio * width, scaled) for _ in range(layers))
        self.proj = nn.Parameter(torch.zeros(width, output_dim))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x).flatten(2).mT
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        x = self.ln_pre(x)
        for block in self.transformer.resblocks:
            x = block(x)
        return self.ln_post(x)[:, 0] @ self.proj


class Clip(nn.Module):
    """A model whose ``visual`` is a tower, beside something that is not."""

    def __init__(self, tower: Tower) -> None:
        super().__init__()
        self.visual = tower
        self.logit_scale = nn.Parameter(torch.ones(()))

    def encode_image(self, x: Tensor) -> Tensor:
        return self.visual(x)


def randomised(model: nn.Module, seed: int) -> nn.Module:
    """Every parameter random: gains around 1, the rest around 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        gain = name.endswith("gamma") or (".ln_" in f".{name}" and name.endswith("weight"))
        scale = 0.2 if p.ndim < 2 else p[0].numel() ** -0.5
        p.data = scale * torch.randn(p.shape, generator=generator) + float(gain)
    return model
