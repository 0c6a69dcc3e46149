"""A checkpoint as a whole running model, through transformers: what the block loop is compared with."""

from dataclasses import replace

import theseus_transport as tt
import torch
from theseus_transport.files.checkpoint import Checkpoint
from theseus_transport.jobs.transport_job import Session
from theseus_transport.models.geometry import Geometry
from theseus_transport.updates.output import write_update
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


def of_whole_models(job, folder, kind):
    """What the library makes of the same job with both models whole in memory."""
    session = Session(replace(job, out=folder))
    data, bases = session.fitted.calibration(), session.inputs.bases
    models = [load_model(*side) for side in zip(bases.checkpoints, bases.geometries, strict=True)]
    alignment = tt.align(*models, data.batches, recipe=job.recipe, depth=bases.blocks or "similarity")
    update = tt.transport(alignment, session.inputs.delta, bases.target)
    write_update(update, folder, kind, base_name=job.target)
    return alignment
