"""The text families, as data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .family import Embedding, Family


def _llama_like(model_type: str, **own: Any) -> Family:
    return Family(
        model_type=model_type,
        modality="text",
        norm="rms",
        prefix="model",
        blocks="layers",
        attention_norm="input_layernorm",
        mlp_norm="post_attention_layernorm",
        final_norm="norm",
        query="self_attn.q_proj",
        key="self_attn.k_proj",
        value="self_attn.v_proj",
        output="self_attn.o_proj",
        expand=("mlp.gate_proj", "mlp.up_proj"),
        contract="mlp.down_proj",
        embeddings=(Embedding("token", "embed_tokens.weight", 1),),
        heads={"vocabulary": "lm_head", "classes": "score"},
        left={r"rotary_emb\.inv_freq$": "a buffer the target computes itself"},
        **own,
    )


LLAMA, MISTRAL, QWEN2 = (_llama_like(kind) for kind in ("llama", "mistral", "qwen2"))
QWEN3 = _llama_like("qwen3", query_norm="self_attn.q_norm", key_norm="self_attn.k_norm")

STARCODER2 = Family(
    model_type="starcoder2",
    modality="text",
    norm="layer",
    prefix="model",
    blocks="layers",
    attention_norm="input_layernorm",
    mlp_norm="post_attention_layernorm",
    final_norm="norm",
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    output="self_attn.o_proj",
    expand=("mlp.c_fc",),
    contract="mlp.c_proj",
    embeddings=(Embedding("token", "embed_tokens.weight", 1),),
    heads={"vocabulary": "lm_head", "classes": "score"},
    tied=True,
)


def _gpt2_sizes(config: Mapping[str, Any]) -> Mapping[str, Any]:
    names = {"hidden_size": "n_embd", "num_attention_heads": "n_head", "num_hidden_layers": "n_layer"}
    sizes = {ours: config[theirs] for ours, theirs in names.items() if theirs in config}
    width, positions = sizes.get("hidden_size"), config.get("n_positions", 1024)
    middle = config.get("n_inner") or (4 * width if isinstance(width, int) else None)
    return {**config, **sizes, "intermediate_size": middle, "max_position_embeddings": positions}


GPT2 = Family(
    model_type="gpt2",
    modality="text",
    norm="layer",
    prefix="transformer",
    blocks="h",
    attention_norm="ln_1",
    mlp_norm="ln_2",
    final_norm="ln_f",
    query="attn.c_attn.q",
    key="attn.c_attn.k",
    value="attn.c_attn.v",
    output="attn.c_proj",
    expand=("mlp.c_fc",),
    contract="mlp.c_proj",
    embeddings=(Embedding("token", "wte.weight", 1), Embedding("position", "wpe.weight", 1)),
    heads={"vocabulary": "lm_head", "classes": "score"},
    tied=True,
    fused={"attn.c_attn": ("attn.c_attn.q", "attn.c_attn.k", "attn.c_attn.v")},
    transposed=(r"\.c_attn$", r"\.c_proj$", r"\.c_fc$"),
    left={r"\.attn\.(masked_)?bias$": "a buffer the target computes itself"},
    geometry=_gpt2_sizes,
)
