"""A model without its weights: what it computes, to be filled with tensors one part at a time."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from .forward import backbone
from .geometry import Geometry
from .open_attention import opened_for_good


def emptied(model: nn.Module, geometry: Geometry) -> nn.Module:
    """A copy of a model with its parameters on the meta device; buffers are copied, the model stays as it is.

    Attention in its blocks shows its projections to hooks.
    """
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
    copied: nn.Module = copy.deepcopy(model, memo).eval()
    inside, family = backbone(copied, geometry), geometry.family
    name = family.spelled(name for name, _ in inside.named_modules())[family.blocks]
    opened_for_good(inside.get_submodule(name))
    return copied
