"""Vision towers as data: ViT, CLIP, SigLIP, DINOv2 and OpenCLIP."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from transformers import CONFIG_MAPPING

from ..errors import InputRefused
from .family import Embedding, Family


def _ahead(name: str, registers: bool = False) -> tuple[Embedding, ...]:
    tokens = (Embedding("class", f"{name}.cls_token", 2), Embedding("position", f"{name}.position_embeddings", 2))
    return (
        Embedding("patch", f"{name}.patch_embeddings.projection.weight", 0),
        Embedding("patch_bias", f"{name}.patch_embeddings.projection.bias", 0),
        *tokens,
        *((Embedding("register", f"{name}.register_tokens", 2),) if registers else ()),
    )


VIT = Family(
    model_type="vit",
    modality="vision",
    norm="layer",
    prefix="vit",
    blocks="layers",
    attention_norm="layernorm_before",
    mlp_norm="layernorm_after",
    final_norm="layernorm",
    query="attention.q_proj",
    key="attention.k_proj",
    value="attention.v_proj",
    output="attention.o_proj",
    expand=("mlp.fc1",),
    contract="mlp.fc2",
    embeddings=_ahead("embeddings"),
    heads={"classes": "classifier"},
    class_heads=("classes",),
    class_token=True,
    left={
        r"^pooler\.": "the pooler's output leaves the model; nothing says which features correspond",
        r"^embeddings\.mask_token$": "read only in masked pre-training",
    },
    aliases=(
        (r"^encoder\.layer\.", "layers."),
        (r"\.attention\.attention\.(q|k|v)(uery|ey|alue)\b", r".attention.\1_proj"),
        (r"\.attention\.output\.dense\b", ".attention.o_proj"),
        (r"\.intermediate\.dense\b", ".mlp.fc1"),
        (r"(layers\.\d+)\.output\.dense\b", r"\1.mlp.fc2"),
    ),
)


def _clip_like(model_type: str, **own: Any) -> Family:
    return Family(
        model_type=model_type,
        modality="vision",
        norm="layer",
        prefix="vision_model",
        blocks="encoder.layers",
        attention_norm="layer_norm1",
        mlp_norm="layer_norm2",
        final_norm="post_layernorm",
        query="self_attn.q_proj",
        key="self_attn.k_proj",
        value="self_attn.v_proj",
        output="self_attn.out_proj",
        expand=("mlp.fc1",),
        contract="mlp.fc2",
        **own,
    )


TEXT_TOWER = {r"^(text_model\.|text_projection\.|logit_)": "belongs to the text tower, which is not aligned"}
CLIP = _clip_like(
    "clip_vision_model",
    embedding_norm="pre_layrnorm",
    embeddings=(
        Embedding("class", "embeddings.class_embedding", 0),
        Embedding("patch", "embeddings.patch_embedding.weight", 0),
        Embedding("position", "embeddings.position_embedding.weight", 1),
    ),
    heads={"projection": "visual_projection"},
    class_heads=("projection",),
    class_token=True,
    pooled_norm=True,
    left={
        r"position_ids$": "a buffer the target computes itself",
        r"^classifier\.": "reads the residual itself, which no norm makes comparable",
        **TEXT_TOWER,
    },
)
SIGLIP = _clip_like(
    "siglip_vision_model",
    embeddings=(
        Embedding("patch", "embeddings.patch_embedding.weight", 0),
        Embedding("patch_bias", "embeddings.patch_embedding.bias", 0),
        Embedding("position", "embeddings.position_embedding.weight", 1),
    ),
    heads={"classes": "classifier"},
    left={
        r"position_ids$": "a buffer the target computes itself",
        r"^head\.": "the pooling head's output leaves the model; nothing says which features correspond",
        **TEXT_TOWER,
    },
)


def _dinov2_sizes(config: Mapping[str, Any]) -> Mapping[str, Any]:
    width, ratio = config.get("hidden_size"), config.get("mlp_ratio", 4)
    middle = int(width * ratio) if isinstance(width, int) and isinstance(ratio, (int, float)) else None
    if middle and config.get("use_swiglu_ffn"):
        kind = str(config["model_type"]).removesuffix("_swiglu")
        return {**config, "intermediate_size": (int(middle * 2 / 3) + 7) // 8 * 8, "model_type": f"{kind}_swiglu"}
    return {**config, "intermediate_size": middle}


def _dinov2(model_type: str, *, registers: bool, gated: bool) -> Family:
    return Family(
        model_type=f"{model_type}_swiglu" if gated else model_type,
        modality="vision",
        norm="layer",
        prefix=model_type,
        blocks="encoder.layer",
        attention_norm="norm1",
        mlp_norm="norm2",
        final_norm="layernorm",
        query="attention.q_proj",
        key="attention.k_proj",
        value="attention.v_proj",
        output="attention.o_proj",
        output_scale="layer_scale1.lambda1",
        expand=("mlp.gate_proj", "mlp.up_proj") if gated else ("mlp.fc1",),
        contract="mlp.down_proj" if gated else "mlp.fc2",
        contract_scale="layer_scale2.lambda1",
        embeddings=_ahead("embeddings", registers=registers),
        heads={"classes": "classifier"},
        classes_read=2,
        class_token=True,
        fused={"mlp.weights_in": ("mlp.gate_proj", "mlp.up_proj")},
        left={r"^embeddings\.mask_token$": "read only in masked pre-training"},
        aliases=(
            (r"\.attention\.attention\.(q|k|v)(uery|ey|alue)\b", r".attention.\1_proj"),
            (r"\.attention\.output\.dense\b", ".attention.o_proj"),
            (r"\.mlp\.weights_out\b", ".mlp.down_proj"),
        ),
        geometry=_dinov2_sizes,
    )


def _open_clip(module: Any) -> Mapping[str, Any] | None:
    """Sizes of an OpenCLIP vision tower, which carries no config."""
    try:
        blocks, (width, channels, *patch) = module.transformer.resblocks, module.conv1.weight.shape
        tokens = len(module.positional_embedding)
        readable = getattr(module.transformer, "batch_first", True) and getattr(module, "attn_pool", None) is None
        if not readable or len(module.ln_post.weight) != width or len(module.ln_pre.weight) != width:
            return None
        found = {
            "model_type": "open_clip_vit",
            "hidden_size": width,
            "num_hidden_layers": len(blocks),
            "num_attention_heads": blocks[0].attn.num_heads,
            "intermediate_size": len(blocks[0].mlp.c_fc.weight),
            "patch_size": patch,
            "num_channels": channels,
            "layer_scale": hasattr(getattr(blocks[0], "ls_1", None), "gamma"),
            "class_pooled": getattr(module, "pool_type", "tok") == "tok",
        }
    except (AttributeError, IndexError, TypeError, ValueError):
        return None
    grid = getattr(module, "grid_size", None) or [math.isqrt(tokens - 1)] * 2
    return {**found, "image_size": [cells * side for cells, side in zip(grid, patch, strict=True)]}


OPEN_CLIP = Family(
    model_type="open_clip_vit",
    modality="vision",
    norm="layer",
    prefix="visual",
    blocks="transformer.resblocks",
    attention_norm="ln_1",
    mlp_norm="ln_2",
    final_norm="ln_post",
    pooled_norm=True,
    query="attn.in_proj.q",
    key="attn.in_proj.k",
    value="attn.in_proj.v",
    output="attn.out_proj",
    output_scale="ls_1.gamma",
    expand=("mlp.c_fc",),
    contract="mlp.c_proj",
    contract_scale="ls_2.gamma",
    embedding_norm="ln_pre",
    embeddings=(
        Embedding("class", "class_embedding", 0),
        Embedding("patch", "conv1.weight", 0),
        Embedding("patch_bias", "conv1.bias", 0),
        Embedding("position", "positional_embedding", 1),
    ),
    heads={"projection": "proj"},
    class_heads=("projection",),
    class_token=True,
    fused={"attn.in_proj": ("attn.in_proj.q", "attn.in_proj.k", "attn.in_proj.v")},
    transposed=(r"^proj$",),
    aliases=((r"\.in_proj_(weight|bias)$", r".in_proj.\1"), (r"^proj$", "proj.weight")),
    adapters=False,
    recognise=_open_clip,
)


def _vision_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The vision tower of a model of two; transformers leaves defaults out of nested configs."""
    part = config.get("vision_config")
    kind = f"{config['model_type']}_vision_model"
    try:
        return CONFIG_MAPPING[kind](**(part if isinstance(part, Mapping) else {})).to_dict() | {"model_type": kind}
    except Exception as error:  # a config it does not like ends in errors of many kinds
        raise InputRefused(f"vision_config is {part!r}: {error}; was config.json edited?") from error


VISION = (
    *(VIT, CLIP, SIGLIP, OPEN_CLIP),
    replace(CLIP, model_type="clip", geometry=_vision_part),
    replace(SIGLIP, model_type="siglip", geometry=_vision_part),
    *(
        _dinov2(kind, registers=kind != "dinov2", gated=gated)
        for kind in ("dinov2", "dinov2_with_registers")
        for gated in (False, True)
    ),
)
