"""Where each family keeps its parts: one `Names` record per family and head, and nothing else to add.

Parts have one canonical name in every family: `norm1 q k v o norm2 gate up down` inside a block (also `scale1 scale2`,
factors behind the writers, and `q_norm k_norm`), `embed position class patch registers pre_norm final_norm head` around
them.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch
import transformers as hf
from theseus_transport.models.families import FAMILIES
from torch import Tensor
from transformers.models.dinov2 import modeling_dinov2

from .modules import ClassTokenTower, HomeMade

SIDE_BY_SIDE = "classifier"  # a layer whose parts share its rows, not its columns


@dataclass(frozen=True, eq=False)
class Names:
    """One family: what to build, and the stored name of every canonical part.

    A stored name is that of a module, or of a parameter if it begins with `=`; `*` stands for weight or bias where
    no dot precedes them.

    Attributes:
        model, config: model(config(**sizes)).
        block: prefix of a block's parts, {} its number; inside, outside: canonical part -> stored name.
        fused: canonical name of a stacked layer -> the parts it stacks, in order.
        transposed: layers stored as [in, out].
        dims: dimensions of an embedding that is not stored as [rows, width].
        small: sizes of the tiny model that only this family has.
        lora: canonical layers an adapter changes.
        sizes: canonical sizes -> those the config knows.
        reads: the output to compare, where the model has no logits.
        left: starts of stored names no control changes.
    """

    model: Callable
    config: Callable
    block: str
    inside: Mapping[str, str]
    outside: Mapping[str, str]
    sizes: Callable[[dict], dict]
    small: Mapping[str, object] = field(default_factory=dict)
    lora: tuple[str, ...] = ("q", "v", "down")
    layer_norm: bool = False
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    transposed: tuple[str, ...] = ()
    dims: Mapping[str, int] = field(default_factory=dict)
    reads: str = "logits"
    left: tuple[str, ...] = ()

    @property
    def vision(self) -> bool:
        return "patch" in self.outside

    def places(self, layers: int) -> Iterator[tuple[str, str, list[str]]]:
        """Stored name of every tensor, its canonical part, and the canonical tensors it is made of."""
        inside = [(f"blocks.{i}.", self.block.format(i)) for i in range(layers)]
        stems = [(own, block, part, name) for own, block in inside for part, name in self.inside.items()]
        for own, block, part, name in [*stems, *(("", "", part, name) for part, name in self.outside.items())]:
            pieces = [own + piece for piece in self.fused.get(part, (part,))]
            for kind in ("weight",) if name.startswith("=") else ("weight", "bias"):
                stored = block + (name if set(name) & {"*", "="} else f"{name}.*")
                yield stored.replace("=", "").replace("*", kind), part, [f"{piece}.{kind}" for piece in pieces]

    def pack(self, parts: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
        """The tensors as the model stores them."""
        state = {}
        for stored, part, pieces in self.places(layers):
            if held := [parts[piece] for piece in pieces if piece in parts]:
                value = torch.cat(held, dim=1 if part == SIDE_BY_SIDE and held[0].dim() > 1 else 0)
                value = value.T.contiguous() if part in self.transposed and value.dim() == 2 else value
                state[stored] = value.reshape({1: (-1,), 3: (1, *value.shape)}.get(self.dims.get(part), value.shape))
        return state

    def unpack(self, state: Mapping[str, Tensor], layers: int, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        """The canonical parts, in the order of `state`; rows of stacked parts by the sizes of the heads."""
        places, parts = {stored: (part, pieces) for stored, part, pieces in self.places(layers)}, {}
        kv = sizes["head_dim"] * sizes.get("num_key_value_heads", sizes["num_attention_heads"])
        for stored, value in state.items():
            if stored not in places:
                assert stored.startswith(self.left), f"{stored} has no place in the record"
                continue
            part, pieces = places[stored]
            value = value.T if part in self.transposed and value.dim() == 2 else value
            value = value.reshape(-1, value.shape[-1]) if part in self.dims else value
            if part == SIDE_BY_SIDE:
                split = value.chunk(len(pieces), 1) if value.dim() > 1 else [value]
            else:
                qkv = [len(value) - 2 * kv, kv, kv]
                split = value.split(qkv) if len(pieces) == len(qkv) else value.chunk(len(pieces))
            parts |= dict(zip(pieces, split, strict=False))
        return parts


def sizes(**renamed: str) -> Callable[[dict], dict]:
    """Canonical sizes under a config's own keys; an empty name drops one the config derives itself."""
    return lambda config: {renamed.get(k, k): v for k, v in config.items() if renamed.get(k, k)}


def per_width(share: int, keys: Callable[[dict], dict], config: dict) -> dict:
    """DINOv2's config gives the MLP's width as a multiple of the model's, of which a gated MLP takes two thirds."""
    middle, width = config["intermediate_size"] * share, config["hidden_size"] * (2 if share > 1 else 1)
    assert middle % width == 0, f"{config['intermediate_size']} neurons are no multiple of {config['hidden_size']}"
    return keys({k: v for k, v in config.items() if k != "intermediate_size"}) | {"mlp_ratio": middle // width}


# --- text -------------------------------------------------------------------------------------------------------------

PARTS = dict(
    norm1="input_layernorm", norm2="post_attention_layernorm",
    q="self_attn.q_proj", k="self_attn.k_proj", v="self_attn.v_proj", o="self_attn.o_proj",
    gate="mlp.gate_proj", up="mlp.up_proj", down="mlp.down_proj",
)  # fmt: skip
GROUPED = dict(num_key_value_heads=2, pad_token_id=0, num_labels=7)
OWN_HEAD = GROUPED | dict(tie_word_embeddings=False, bos_token_id=0, eos_token_id=0)
Q_NORMS = dict(q_norm="self_attn.q_norm", k_norm="self_attn.k_norm")


def _llama(model: Callable, config: Callable, prefix: str = "model.", head: str | None = "lm_head", **more) -> Names:
    outside = {"embed": f"{prefix}embed_tokens", "final_norm": f"{prefix}norm"} | ({"head": head} if head else {})
    return Names(model, config, prefix + "layers.{}.", PARTS | more, outside, sizes(eps="rms_norm_eps"), GROUPED)


LLAMA = _llama(hf.LlamaForCausalLM, hf.LlamaConfig)
LLAMA_TIED = _llama(hf.LlamaForCausalLM, hf.LlamaConfig, head=None)
LLAMA_SCORE = _llama(hf.LlamaForSequenceClassification, hf.LlamaConfig, head="score")
LLAMA_HEADLESS = replace(_llama(hf.LlamaModel, hf.LlamaConfig, "", None), reads="last_hidden_state")
MISTRAL = _llama(hf.MistralForCausalLM, hf.MistralConfig)
QWEN2 = _llama(hf.Qwen2ForCausalLM, hf.Qwen2Config)
QWEN3 = _llama(hf.Qwen3ForCausalLM, hf.Qwen3Config, **Q_NORMS)

GPT2 = Names(
    hf.GPT2LMHeadModel, hf.GPT2Config, "transformer.h.{}.",
    dict(norm1="ln_1", qkv="attn.c_attn", o="attn.c_proj", norm2="ln_2", up="mlp.c_fc", down="mlp.c_proj"),
    {"embed": "transformer.wte", "position": "transformer.wpe", "final_norm": "transformer.ln_f", "head": "lm_head"},
    sizes(eps="layer_norm_epsilon", hidden_size="n_embd", num_hidden_layers="n_layer", num_attention_heads="n_head",
          intermediate_size="n_inner", max_position_embeddings="n_positions", head_dim=""),
    dict(tie_word_embeddings=False, bos_token_id=0, eos_token_id=0, pad_token_id=0),
    lora=("qkv", "o", "down"), layer_norm=True, fused={"qkv": ("q", "k", "v")}, transposed=("qkv", "o", "up", "down"),
)  # fmt: skip
GPT2_TIED = replace(GPT2, outside={part: name for part, name in GPT2.outside.items() if part != "head"},
                    small=GPT2.small | {"tie_word_embeddings": True})  # fmt: skip

HOME = Names(
    HomeMade, dict, "stack.{}.",
    dict(norm1="before", q="ask", k="offer", v="carry", o="merge", norm2="between", up="widen", down="narrow"),
    {"embed": "words", "position": "places", "final_norm": "last", "head": "read"}, sizes(head_dim=""), layer_norm=True,
)  # fmt: skip

# --- vision -----------------------------------------------------------------------------------------------------------

VIT_PARTS = dict(
    norm1="layernorm_before", norm2="layernorm_after",
    q="attention.q_proj", k="attention.k_proj", v="attention.v_proj", o="attention.o_proj",
    up="mlp.fc1", down="mlp.fc2",
)  # fmt: skip
OLDER_DINO = hasattr(modeling_dinov2, "Dinov2SelfAttention")  # transformers up to 5.17 and more spells it otherwise
DINO_PARTS = VIT_PARTS | dict(
    norm1="norm1", norm2="norm2", scale1="=layer_scale1.lambda1", scale2="=layer_scale2.lambda1"
)
if OLDER_DINO:
    DINO_PARTS |= {name[0]: f"attention.attention.{name}" for name in ("query", "key", "value")}
    DINO_PARTS["o"] = "attention.output.dense"
DINO_GATED_PARTS = {part: name for part, name in DINO_PARTS.items() if part != "up"} | (
    {"gate and up": "mlp.weights_in", "down": "mlp.weights_out"} if OLDER_DINO else
    {"gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}
)  # fmt: skip
CLIP_PARTS = dict(
    norm1="layer_norm1", q="self_attn.q_proj", k="self_attn.k_proj", v="self_attn.v_proj", o="self_attn.out_proj",
    norm2="layer_norm2", up="mlp.fc1", down="mlp.fc2",
)  # fmt: skip
EMBEDDINGS = {"patch": "patch_embeddings.projection", "class": "=cls_token", "position": "=position_embeddings"}
CLIP_EMBEDDINGS = {"class": "=class_embedding", "patch": "patch_embedding", "position": "position_embedding"}
LABELS, PROJECTED = {"num_labels": 7}, {"projection_dim": 7, "hidden_act": "gelu"}
EPS = sizes(eps="layer_norm_eps")
COUPLED = sizes(eps="layer_norm_eps", head_dim="")


def _embeddings(prefix: str, names: Mapping[str, str]) -> dict[str, str]:
    return {k: "=" * v.startswith("=") + f"{prefix}embeddings.{v.removeprefix('=')}" for k, v in names.items()}


def _vit(model: Callable, prefix: str = "vit.", head: str | None = "classifier") -> Names:
    outside = _embeddings(prefix, EMBEDDINGS) | {"final_norm": f"{prefix}layernorm"} | ({"head": head} if head else {})
    return Names(
        model, hf.ViTConfig, prefix + "layers.{}.", VIT_PARTS, outside, EPS, LABELS, layer_norm=True,
        dims={"class": 3, "position": 3}, reads="logits" if head else "last_hidden_state",
    )  # fmt: skip


def _dino(model: Callable, config: Callable, prefix: str = "", *, gated: bool = False, **more: str) -> Names:
    """With its classifier, which reads the class token's features and beside them the mean of the patches'."""
    outside = _embeddings(prefix, EMBEDDINGS | more) | {"final_norm": f"{prefix}layernorm"}
    outside |= {SIDE_BY_SIDE: "classifier"} if prefix else {}
    small = LABELS | {"use_swiglu_ffn": gated, "intermediate_size": 32 if gated else 48}
    return Names(
        model, config, prefix + "encoder.layer.{}.", DINO_GATED_PARTS if gated else DINO_PARTS, outside,
        partial(per_width, 3 if gated else 1, EPS), small, layer_norm=True,
        fused={SIDE_BY_SIDE: ("head", "head_patches"), "gate and up": ("gate", "up")},
        dims={"class": 3, "position": 3, "registers": 3},
        reads="logits" if prefix else "last_hidden_state", left=(f"{prefix}embeddings.mask_token",),
    )  # fmt: skip


VIT = _vit(hf.ViTForImageClassification)
VIT_HEADLESS = _vit(partial(hf.ViTModel, add_pooling_layer=False), "", None)
DINO = _dino(hf.Dinov2Model, hf.Dinov2Config)
DINO_CLASSIFIER = _dino(hf.Dinov2ForImageClassification, hf.Dinov2Config, "dinov2.")
DINO_GATED = _dino(hf.Dinov2ForImageClassification, hf.Dinov2Config, "dinov2.", gated=True)
DINO_REGISTERS = _dino(
    hf.Dinov2WithRegistersForImageClassification, hf.Dinov2WithRegistersConfig, "dinov2_with_registers.",
    registers="=register_tokens",
)  # fmt: skip

CLIP = Names(
    hf.CLIPVisionModelWithProjection, hf.CLIPVisionConfig, "vision_model.encoder.layers.{}.", CLIP_PARTS,
    _embeddings("vision_model.", CLIP_EMBEDDINGS) | {"pre_norm": "vision_model.pre_layrnorm",
    "final_norm": "vision_model.post_layernorm", "head": "visual_projection"},
    COUPLED, PROJECTED, layer_norm=True, dims={"class": 1}, reads="image_embeds",
)  # fmt: skip
CLIP_HEADLESS = replace(
    CLIP, model=hf.CLIPVisionModel, block="encoder.layers.{}.", reads="pooler_output",
    outside={k: v.replace("vision_model.", "") for k, v in CLIP.outside.items() if k != "head"},
)  # fmt: skip
OPEN_CLIP = Names(
    ClassTokenTower, dict, "transformer.resblocks.{}.",
    dict(norm1="ln_1", qkv="attn.in_proj_*", o="attn.out_proj", norm2="ln_2", up="mlp.c_fc", down="mlp.c_proj"),
    {"patch": "conv1", "class": "=class_embedding", "position": "=positional_embedding", "pre_norm": "ln_pre",
     "final_norm": "ln_post", "head": "=proj"},
    dict, PROJECTED, lora=(), layer_norm=True, fused={"qkv": ("q", "k", "v")}, transposed=("head",), dims={"class": 1},
)  # fmt: skip

SIGLIP_EMBEDDINGS = {"patch": "patch_embedding", "position": "position_embedding"}
SIGLIP = Names(
    hf.SiglipVisionModel, hf.SiglipVisionConfig, "encoder.layers.{}.", CLIP_PARTS,
    _embeddings("", SIGLIP_EMBEDDINGS) | {"final_norm": "post_layernorm"},
    COUPLED, LABELS, layer_norm=True, reads="last_hidden_state", left=("head.",),
)  # fmt: skip
SIGLIP_CLASSIFIER = replace(
    SIGLIP, model=hf.SiglipForImageClassification, block="vision_model.encoder.layers.{}.", reads="logits",
    outside={k: f"vision_model.{v}" for k, v in SIGLIP.outside.items()} | {"head": "classifier"},
    config=lambda num_labels, **vision: hf.SiglipConfig(vision_config=vision, num_labels=num_labels),
    left=("vision_model.head.",),
)  # fmt: skip

# --- any other family: read off its record ----------------------------------------------------------------------------


def recorded(kind: str, model: Callable, config: Callable, *, reads: str = "logits", eps: str, **small) -> Names:
    """The names of a family, from its record: if a part is not where the record says, the pair is no symmetry.

    Args:
        model, config: what to build; eps: the config's key for the epsilon of its norms; small: sizes it needs beside
            the common ones. What a checkpoint fuses or transposes needs `Names` of its own, as above.
    """
    f = FAMILIES[kind]
    assert not f.fused and not f.transposed, f"{kind} keeps layers together or transposed: write its Names out"
    prefix, gated = f.prefix and f"{f.prefix}.", len(f.expand) == 2
    inside = dict(norm1=f.attention_norm, norm2=f.mlp_norm, q=f.query, k=f.key, v=f.value, o=f.output, down=f.contract)
    inside |= dict(zip(("gate", "up") if gated else ("up",), f.expand, strict=True))
    inside |= {part: name for part, name in (("q_norm", f.query_norm), ("k_norm", f.key_norm)) if name}
    inside |= {p: f"={n}" for p, n in (("scale1", f.output_scale), ("scale2", f.contract_scale)) if n}
    outside, parts = {"final_norm": prefix + f.final_norm}, {"token": "embed", "register": "registers"}
    for e in f.embeddings:
        whole = not e.name.endswith((".weight", ".bias"))
        outside[parts.get(e.slot, e.slot)] = "=" * whole + prefix + e.name.removesuffix(".weight")
    outside |= {"pre_norm": prefix + f.embedding_norm} if f.embedding_norm else {}
    head = f.heads.get("classes" if f.modality == "vision" else "vocabulary")
    outside |= {"head": head} if head and reads == "logits" else {}
    return Names(
        model, config, f"{prefix}{f.blocks}.{{}}.", inside, outside, sizes(eps=eps), small, reads=reads,
        layer_norm=f.norm == "layer", dims={e.slot: e.axis + 1 for e in f.embeddings if e.axis == 2},
    )  # fmt: skip
