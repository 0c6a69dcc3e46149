"""The official recipe, written from its description: what `bench_job.py` measures ours against.

Every module with parameters is hooked at input and output. Tapped tensors go to the host; source tokens are
interpolated in two dimensions to the target's grid; a float64 product is added per tap; every tap gets one thin float64
singular value decomposition. An update moves as ``T_out^T D T_in``; norms' gains and biases by their output's map.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Taps = dict[tuple[str, str], Tensor]  # (module, "in" or "out") -> [images, tokens, width]


def hook(model: nn.Module, taps: Taps) -> None:
    """Store what every linear layer and norm reads and writes. (Patches and embeddings stay behind.)"""
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.LayerNorm)):

            def store(module: nn.Module, args: tuple, out: Tensor, name: str = name) -> None:
                taps[name, "in"], taps[name, "out"] = args[0].detach().cpu(), out.detach().cpu()

            module.register_forward_hook(store)


def interpolate(tokens: Tensor, count: int) -> Tensor:
    """[images, 1 + grid**2, width] to ``count`` tokens: the class token stays, the patch grid is bilinear."""
    if tokens.shape[1] == count:
        return tokens
    grid, to = (round((n - 1) ** 0.5) for n in (tokens.shape[1], count))
    patches = tokens[:, 1:].transpose(1, 2).unflatten(2, (grid, grid))
    mixed = F.interpolate(patches, size=(to, to), mode="bilinear", align_corners=False)
    return torch.cat([tokens[:, :1], mixed.flatten(2).transpose(1, 2)], 1)


def capture(source: nn.Module, target: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> Taps:
    """Float64 cross-products [dS, dT] of every tap."""
    taps: tuple[Taps, Taps] = ({}, {})
    products: Taps = {}
    hook(source, taps[0]), hook(target, taps[1])
    for pixels in batches:
        with torch.no_grad():
            source(pixel_values=pixels[0]), target(pixel_values=pixels[1])
        for key, x in taps[0].items():
            y = taps[1][key]
            x = interpolate(x, y.shape[1])
            product = x.flatten(0, 1).double().T @ y.flatten(0, 1).double()
            products[key] = products[key] + product if key in products else product
        for side in taps:
            side.clear()
    return products


def decompose(products: Taps, device: str = "cpu") -> Taps:
    """T = U V^T [dS, dT] of every tap, decomposed on ``device``."""
    maps = {}
    for key, product in products.items():
        u, _, vh = torch.linalg.svd(product.to(device), full_matrices=False)
        maps[key] = (u @ vh).cpu()
    return maps


def apply(maps: Taps, delta: dict[str, Tensor]) -> dict[str, Tensor]:
    """The target's update, float32; what no tap maps stays behind."""
    moved = {}
    for name, value in delta.items():
        module, _, kind = name.rpartition(".")
        if (module, "out") not in maps:
            continue
        t_in, t_out = maps[module, "in"], maps[module, "out"]
        value = value.cpu().double()
        moved[name] = (t_out.T @ value @ t_in if kind == "weight" and value.ndim == 2 else value @ t_out).float()
    return moved
