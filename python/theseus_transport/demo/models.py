"""Models of the demo: small vision transformers, how they are trained and scored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from ..linalg.ridge import Normal, ridge
from .data import Split, pixels

RIDGE = 1e-3  # of the refitted classifier: of 1e-3, 1e-2 and 1e-1 its best (64, 61, 53 % of the ceiling's gain)


def build(width: int, *, depth: int, heads: int) -> nn.Module:
    """A fresh ViTForImageClassification for 8x8 images in 2x2 patches."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=2 * width,
        hidden_act="gelu",
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    config.num_labels = 10
    config._attn_implementation = "eager"  # faster than fused attention at 17 tokens
    model = ViTForImageClassification(config)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.reset_parameters()  # transformers draws all weights 0.02 wide, too small for models this narrow
    return model


def fit(
    model: nn.Module,
    split: Split,
    change: Callable[[Tensor], Tensor],
    generator: Generator,
    *,
    steps: int,
    batch: int,
    rate: float,
) -> None:
    """Train what requires a gradient with AdamW; ``change`` is applied to every batch of images."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps + 1, pct_start=0.1)
    model.train()
    for _ in range(steps):
        chosen = torch.randint(0, len(split.images), (batch,), generator=generator)
        logits = model(pixel_values=pixels(change(split.images[chosen]))).logits
        optimizer.zero_grad()
        F.cross_entropy(logits, split.labels[chosen]).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, split: Split, update: Mapping[str, Tensor] | None = None) -> float:
    """Percent of images classified right by the model, with the update added for this call."""
    parameters = dict(model.named_parameters())
    moved = {name: parameters[name] + value for name, value in (update or {}).items()}
    logits = torch.func.functional_call(model, moved, kwargs={"pixel_values": pixels(split.images)}).logits
    return float((logits.argmax(1) == split.labels).double().mean() * 100)


@torch.no_grad()
def refitted(source: Any, tuned: Any, target: Any, images: Tensor) -> dict[str, Tensor]:
    """The update of the target's classifier alone that shows on its features how the tune changed the source's logits.

    No block is moved: ridge regression from the class token behind the last norm, of the strength that suits it.

    Args:
        images: [n, 1, 8, 8], as models read them; no label is needed.
    """
    before, after = (model(pixel_values=images).logits.double() for model in (source, tuned))
    features, wanted = target.base_model(pixel_values=images).last_hidden_state[:, 0].double(), after - before
    normal = Normal(features.T @ features, features.T @ wanted, features.sum(0), wanted.sum(0), len(images))
    fit = ridge(normal, RIDGE, bias=True)
    assert fit.bias is not None
    return {"classifier.weight": fit.weight.float(), "classifier.bias": fit.bias.float()}


def random_like(update: Mapping[str, Tensor], generator: Generator) -> dict[str, Tensor]:
    """Gaussian tensors, each of the norm of the update's."""
    drawn = {name: torch.randn(value.shape, generator=generator, dtype=value.dtype) for name, value in update.items()}
    return {name: drawn[name] * (value.norm() / drawn[name].norm()) for name, value in update.items()}


@torch.no_grad()
def random_tune(base: nn.Module, tuned: nn.Module, generator: Generator) -> nn.Module:
    """The base with a random change, tensor by tensor of the norm of the tune's."""
    model, own = deepcopy(tuned), dict(base.named_parameters())
    changes = {name: moved - own[name] for name, moved in tuned.named_parameters()}
    drawn = random_like(changes, generator)
    for name, parameter in model.named_parameters():
        parameter.copy_(own[name] + drawn[name])
    return model
