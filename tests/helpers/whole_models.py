"""A checkpoint as a whole running model, through transformers: what the block loop is compared with."""

import torch
from theseus_transport.files.checkpoint import Checkpoint
from theseus_transport.models.geometry import Geometry
from torch import nn
from transformers import AutoModel, CLIPVisionModel, SiglipVisionModel

TOWERS = {"clip": CLIPVisionModel, "siglip": SiglipVisionModel}


def load_model(checkpoint: Checkpoint, geometry: Geometry) -> nn.Module:
    """The backbone in float32 (float64 where the checkpoint is), none of its tensors left random."""
    model, info = TOWERS.get(checkpoint.config["model_type"], AutoModel).from_pretrained(
        checkpoint.folder,
        dtype=torch.float64 if torch.float64 in checkpoint.dtypes.values() else torch.float32,
        output_loading_info=True,
        **({"add_pooling_layer": False} if geometry.family.model_type == "vit" else {}),
    )
    assert not info["missing_keys"], info
    return model
