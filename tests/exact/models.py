"""Random tiny models as data (`Spec`), random fine-tunes of them, and the one number every control is judged by."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
LORA_RANK = 2


class Draw:
    """Seeded float64 draws. They depend on the seed and on shapes only, so base and tuned get the same symmetry."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def gain(self, width: int) -> Tensor:
        return (1 + 0.3 * self.normal(width)).clamp(0.4, 1.6)

    def bias(self, width: int) -> Tensor:
        """Of mean 0.3, so that sum(bias / gain), a denominator of the recipe, stays away from 0."""
        return 0.3 + 0.3 * self.normal(width)

    def shares(self, copies: list[int]) -> Tensor:
        """Positive, uneven weights that sum to one over the entries of `copies` that name the same original."""
        weight = 0.5 + torch.rand(len(copies), generator=self.generator, dtype=torch.float64)
        label = torch.tensor(copies)
        return weight / ((label[:, None] == label[None, :]) * weight).sum(1)

    def order(self, count: int) -> list[int]:
        return torch.randperm(count, generator=self.generator).tolist()

    def orthonormal_rows(self, rows: int, columns: int) -> Tensor:
        return torch.linalg.qr(self.normal(columns, rows)).Q.T


@dataclass(frozen=True)
class Names:
    """Where a family keeps its parts. A writer is (name, axis of the residual)."""

    model: type
    config: type
    block: str
    norms: tuple[str, str]  # before attention, before the MLP
    final_norm: str
    head: str | None
    attention: str
    expand: tuple[str, ...]
    contract: str
    embeddings: tuple[tuple[str, int], ...]
    lora: tuple[str, ...]
    epsilon: str
    layer_norm: bool = False

    def readers(self, layers: int) -> list[tuple[str, list[str]]]:
        """Every norm with the linear layers that read it."""
        found = []
        for i in range(layers):
            block, attention = self.block.format(i), self.attention.format(i)
            found.append((block + self.norms[0], [attention + p for p in ("q_proj", "k_proj", "v_proj")]))
            found.append((block + self.norms[1], [name.format(i) for name in self.expand]))
        return found + [(self.final_norm, [self.head] if self.head else [])]

    def writers(self, layers: int) -> list[tuple[str, int]]:
        linear = [n.format(i) for i in range(layers) for n in (self.attention + "o_proj", self.contract)]
        return [*self.embeddings, *((f"{n}.{p}", 0) for n in linear for p in ("weight", "bias"))]


def _llama(model: type, prefix: str, head: str | None) -> Names:
    block = prefix + "layers.{}."
    return Names(
        model, LlamaConfig, block, ("input_layernorm", "post_attention_layernorm"), prefix + "norm", head,
        block + "self_attn.", (block + "mlp.gate_proj", block + "mlp.up_proj"), block + "mlp.down_proj",
        ((prefix + "embed_tokens.weight", 1),), ("q_proj", "v_proj", "down_proj"), "rms_norm_eps",
    )  # fmt: skip


def _vit(model: type, prefix: str, head: str | None) -> Names:
    block, e = prefix + "layers.{}.", prefix + "embeddings."
    embeddings = ("patch_embeddings.projection.weight", 0), ("patch_embeddings.projection.bias", 0)
    embeddings += ("cls_token", 2), ("position_embeddings", 2)
    return Names(
        model, ViTConfig, block, ("layernorm_before", "layernorm_after"), prefix + "layernorm", head,
        block + "attention.", (block + "mlp.fc1",), block + "mlp.fc2",
        tuple((e + name, axis) for name, axis in embeddings), ("q_proj", "v_proj", "fc2"), "layer_norm_eps", True,
    )  # fmt: skip


LLAMA = _llama(LlamaForCausalLM, "model.", "lm_head")
LLAMA_TIED = replace(LLAMA, head=None)
LLAMA_SCORE = _llama(LlamaForSequenceClassification, "model.", "score")
LLAMA_HEADLESS = _llama(LlamaModel, "", None)
VIT = _vit(ViTForImageClassification, "vit.", "classifier")
VIT_HEADLESS = _vit(ViTModel, "", None)


@dataclass(frozen=True)
class Spec:
    names: Names
    config: dict
    state: dict[str, Tensor]
    inv_freq: Tensor | None = None  # rotary frequencies where they are not the config's own
    readout: list[Tensor] = field(default_factory=list)  # model without head: matrix, offset back to the first outputs

    @property
    def tied(self) -> bool:
        return self.config.get("tie_word_embeddings", False)

    @property
    def heads(self) -> tuple[int, int, int]:
        """kv groups, query heads per group, head size."""
        count = self.config["num_attention_heads"]
        groups = self.config.get("num_key_value_heads", count)
        return groups, count // groups, self.config["head_dim"]

    def build(self, dtype: torch.dtype = torch.float64) -> torch.nn.Module:
        kwargs = {"add_pooling_layer": False} if self.names.model is ViTModel else {}
        model = self.names.model(self.names.config(**self.config), **kwargs).double().eval()
        missing, unexpected = model.load_state_dict(self.state, strict=False)
        assert not unexpected and missing == (["lm_head.weight"] if self.tied else []), (missing, unexpected)
        if self.inv_freq is not None:
            rotary = (model.model if hasattr(model, "model") else model).rotary_emb
            rotary.inv_freq, rotary.original_inv_freq = self.inv_freq.clone(), self.inv_freq.clone()
        return model.to(dtype)

    def outputs(self, model: torch.nn.Module, batches: list[dict]) -> Tensor:
        """Logits; without a head the final hidden state, brought back to the coordinates of the first spec."""
        with torch.no_grad():
            found = [model(**batch) for batch in batches]
        if hasattr(found[0], "logits"):
            return torch.cat([o.logits.double().flatten(0, -2) for o in found])
        hidden = torch.cat([o.last_hidden_state.double().flatten(0, -2) for o in found])
        return hidden @ self.readout[0] + self.readout[1] if self.readout else hidden


def base(names: Names, *, seed: int = 0, width: int = 24, **config) -> Spec:
    """A random model: weights of 1 / sqrt(in), every gain, bias and embedding random and non-zero."""
    small = dict(hidden_size=width, num_hidden_layers=2, num_attention_heads=4, head_dim=8, intermediate_size=40)
    if names.layer_norm:
        small |= dict(head_dim=6, image_size=8, patch_size=2, num_channels=3, num_labels=7)
    else:
        small |= dict(num_key_value_heads=2, vocab_size=60, max_position_embeddings=64, pad_token_id=0, num_labels=7)
    config = small | {names.epsilon: 1e-3} | config
    draw, state = Draw(seed), {}
    for name, like in names.model(names.config(**config)).state_dict().items():
        if "pooler" in name or (name == "lm_head.weight" and config.get("tie_word_embeddings")):
            continue
        if like.dim() == 1:
            state[name] = draw.gain(*like.shape) if "norm" in name and "weight" in name else draw.bias(*like.shape)
        else:
            fan_in = like[0].numel() if "weight" in name and "embed_tokens" not in name else 1
            state[name] = draw.normal(*like.shape) / fan_in**0.5
    return Spec(names, config, state)


def tune(spec: Spec, kind: str, seed: int = 1) -> Spec:
    """The tuned model: `linear` moves the blocks' weights, `gains` also every gain and bias, `everything` all there is.

    `lora` moves what `lora_factors` says, as a dense product.
    """
    draw, state, factors = Draw(seed), dict(spec.state), lora_factors(spec)
    for name, value in spec.state.items():
        noise = draw.normal(*value.shape)
        part = "gains" if value.dim() == 1 and "embeddings" not in name and name != f"{spec.names.head}.bias" else (
            "linear" if ".layers." in f".{name}" else "everything"
        )  # fmt: skip
        if kind == "lora":
            if name in factors:
                state[name] = value + factors[name][1] @ factors[name][0]
        elif part == "linear" or kind == "everything" or part == kind:
            state[name] = value + (0.15 if value.dim() == 1 else 0.25 * value.std()) * noise
    return replace(spec, state=state)


def lora_factors(spec: Spec, seed: int = 2) -> dict[str, tuple[Tensor, Tensor]]:
    """Weight name -> (A [rank, in], B [out, rank]), random and non-zero; the adapter's scale is 1."""
    draw = Draw(seed)
    chosen = [n for n in spec.state if n.endswith(tuple(f"{target}.weight" for target in spec.names.lora))]
    sizes = {n: spec.state[n].shape for n in chosen}
    return {n: (draw.normal(LORA_RANK, i) / i**0.5, 0.3 * draw.normal(o, LORA_RANK)) for n, (o, i) in sizes.items()}


def batches(
    spec: Spec,
    *,
    seed: int,
    count: int = 2,
    shape: tuple[int, int] = (20, 16),
    tokens: tuple[int, ...] | None = None,
    padded: bool = False,
) -> list[dict[str, Tensor]]:
    """Batches of 20 sequences of 16 tokens (`tokens`: the only ids used), or of 20 images of 17 tokens."""
    generator, found = torch.Generator().manual_seed(seed), []
    for _ in range(count):
        if spec.names.layer_norm:
            pixels = shape[0], spec.config["num_channels"], spec.config["image_size"], spec.config["image_size"]
            found.append({"pixel_values": torch.randn(pixels, generator=generator, dtype=torch.float64)})
            continue
        allowed = torch.tensor(tokens or range(1, spec.config["vocab_size"]))
        ids = allowed[torch.randint(len(allowed), shape, generator=generator)]
        found.append({"input_ids": ids})
        if padded:
            length = torch.randint(4, shape[1] + 1, (shape[0], 1), generator=generator)
            found[-1]["attention_mask"] = (torch.arange(shape[1]) < length).long()
    return found


def relative_error(moved: Tensor, tuned: Tensor, start: Tensor) -> float:
    """|f(target + update) - f(tuned source)| / |f(tuned source) - f(source)|."""
    return float((moved - tuned).norm() / (tuned - start).norm())
