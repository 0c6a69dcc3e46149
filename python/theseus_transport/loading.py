"""A checkpoint as a running model, through transformers."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

from .checkpoint import Checkpoint
from .checks import out_of_memory
from .errors import InputRefused
from .models import BELONG
from .spaces import Layout

TOWERS: dict[str, Any] = {"clip": transformers.CLIPVisionModel, "siglip": transformers.SiglipVisionModel}


def load_model(checkpoint: Checkpoint, layout: Layout) -> nn.Module:
    """The backbone in float32 (float64 where the checkpoint is), for forward passes only.

    Raises:
        InputRefused: transformers cannot build it, or tensors are missing (they would be random).
    """
    model: nn.Module
    double = torch.float64 in checkpoint.dtypes.values()
    extra = {"add_pooling_layer": False} if layout.family.model_type == "vit" else {}
    level, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        model, info = TOWERS.get(checkpoint.config["model_type"], transformers.AutoModel).from_pretrained(
            checkpoint.folder,
            dtype=torch.float64 if double else torch.float32,
            use_safetensors=all(p.suffix != ".bin" for p in checkpoint.files),
            local_files_only=True,
            output_loading_info=True,
            **extra,
        )
    except Exception as error:  # a config it does not like ends in errors of many kinds
        if out_of_memory(error):
            raise
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise InputRefused(f"transformers cannot load {checkpoint.folder}: {said}; was config.json edited?") from error
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.logging.enable_progress_bar()
    if missing := sorted(info["missing_keys"]):
        raise InputRefused(f"{checkpoint.folder} lacks {missing[0]} ({len(missing)} such tensors); is it complete?")
    unread = sorted(n for n in info["unexpected_keys"] if layout.family.canonical(n).startswith(layout.family.blocks))
    if unread := [n for n in unread if not layout.family.why_left(layout.family.canonical(n))]:
        raise InputRefused(
            f"{checkpoint.folder}: config.json has no place for {unread[0]} ({len(unread)} such); {BELONG}"
        )
    return model
