"""The official successor's method, written from its description: every block fitted alone, from the untouched target.

The MLP's contracting layer of a block is to show what the tune changes at the block's output in the source: with a
centred polar map, ridge of tr(G) / (n - 1), and a bias only where the target has one. What an earlier block's update
already brought, a later block does not know of. Whole Llama-like models of transformers, in memory, in float64 sums.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

Taps = dict[str, Tensor]  # of one model, by block and what: [rows, width], float64


@torch.no_grad()
def tapped(model: nn.Module, batches: Sequence[Tensor]) -> Taps:
    """What every contracting layer reads (in), and the residual behind it (out), for token ids [rows, tokens]."""
    found: dict[str, list[Tensor]] = {}
    hooks = []

    def keep(name: str, value: Tensor) -> None:
        found.setdefault(name, []).append(value.flatten(0, -2).double())

    for i, block in enumerate(model.model.layers):

        def of_layer(_: nn.Module, args: tuple, i: int = i) -> None:
            keep(f"{i} in", args[0])

        def of_block(_: nn.Module, args: tuple, out: Tensor | tuple, i: int = i) -> None:
            keep(f"{i} out", out if isinstance(out, Tensor) else out[0])

        hooks += [block.mlp.down_proj.register_forward_pre_hook(of_layer), block.register_forward_hook(of_block)]
    for ids in batches:
        model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(values) for name, values in found.items()}


def official(
    source: nn.Module,
    tuned: nn.Module,
    target: nn.Module,
    batches: Sequence[Tensor],
    *,
    ridge: float | None = None,
) -> dict[str, Tensor]:
    """The update of the target by parameter name, float32.

    Args:
        batches: token ids [rows, tokens] that all read.
        ridge: in units of the mean of the diagonal of G; None for lambda = tr(G) / (n - 1).
    """
    s, plus, t = (tapped(model, batches) for model in (source, tuned, target))
    deep, depth = len(source.model.layers), len(target.model.layers)
    update = {}
    for j, block in enumerate(target.model.layers):
        i = round(j * (deep - 1) / max(1, depth - 1))  # by relative depth
        x_s, x_t = s[f"{i} out"], t[f"{j} out"]
        u, _, vh = torch.linalg.svd((x_s - x_s.mean(0)).T @ (x_t - x_t.mean(0)), full_matrices=False)
        wanted = (plus[f"{i} out"] - x_s) @ (u @ vh)
        layer, read = block.mlp.down_proj, t[f"{j} in"]
        biased = layer.bias is not None
        means = (read.mean(0), wanted.mean(0)) if biased else (0.0, 0.0)
        centred = read - means[0]
        gram = centred.T @ centred
        weight = gram.trace() / ((len(read) - 1) if ridge is None else len(gram) / ridge)
        gram.diagonal().add_(weight)
        solved = torch.linalg.solve(gram, centred.T @ (wanted - means[1])).T
        name = f"model.layers.{j}.mlp.down_proj"
        update[f"{name}.weight"] = solved.float()
        if biased:
            update[f"{name}.bias"] = (means[1] - solved @ means[0]).float()
    return update
