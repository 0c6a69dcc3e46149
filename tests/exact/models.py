"""Random tiny models as data (`Spec`), random fine-tunes of them, and the one number every control is judged by."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from .families import (
    LLAMA,
    LLAMA_HEADLESS,
    LLAMA_SCORE,
    LLAMA_TIED,
    VIT,
    VIT_HEADLESS,
    Names,
)

__all__ = ["LLAMA", "LLAMA_HEADLESS", "LLAMA_SCORE", "LLAMA_TIED", "VIT", "VIT_HEADLESS", "Draw", "Spec", "base"]

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
LORA_RANK = 2
EMBEDDINGS = {"embed.weight": 1, "position.weight": 1, "class.weight": 1, "registers.weight": 1, "patch.weight": 0,
              "patch.bias": 0}  # with the axis of the residual  # fmt: skip


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

    def like(self, name: str, shape: torch.Size) -> Tensor:
        """A part: gains around 1, layer scales of either sign, weights of 1 / sqrt(in), embeddings of 1."""
        part = name.split(".")[-2]
        if len(shape) == 1:
            if "scale" in part:
                return self.gain(*shape) * self.normal(*shape).sign()
            return self.gain(*shape) if "norm" in part and name.endswith("weight") else self.bias(*shape)
        table = name in EMBEDDINGS and name != "patch.weight"
        return self.normal(*shape) / (1 if table else shape[1:].numel()) ** 0.5

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
class Spec:
    """A model: its family, its sizes, and its tensors under canonical names (`families.py`)."""

    names: Names
    config: dict
    parts: dict[str, Tensor]
    inv_freq: Tensor | None = None  # rotary frequencies where they are not the config's own
    readout: list[Tensor] = field(default_factory=list)  # model without head: matrix, offset back to the first outputs

    @property
    def layers(self) -> int:
        return self.config["num_hidden_layers"]

    @property
    def tied(self) -> bool:
        return "embed.weight" in self.parts and self.config.get("tie_word_embeddings", False)

    @property
    def heads(self) -> tuple[int, int, int]:
        """kv groups, query heads per group, head size."""
        count = self.config["num_attention_heads"]
        groups = self.config.get("num_key_value_heads", count)
        return groups, count // groups, self.config["head_dim"]

    @cached_property
    def state(self) -> dict[str, Tensor]:
        """The tensors as the model stores them."""
        return self.names.pack(self.parts, self.layers)

    def build(self, dtype: torch.dtype = torch.float64) -> torch.nn.Module:
        model = self.names.model(self.names.config(**self.names.sizes(self.config))).double().eval()
        missing, unexpected = model.load_state_dict(self.state, strict=False)
        left = {name for name in missing if self.names.left and name.startswith(self.names.left)}
        assert not unexpected and set(missing) - left == set(["lm_head.weight"] * self.tied), (missing, unexpected)
        held = model.state_dict()
        for name in left:
            held[name].copy_(Draw(9).normal(*held[name].shape))
        if self.inv_freq is not None:
            rotary = (model.model if hasattr(model, "model") else model).rotary_emb
            rotary.inv_freq, rotary.original_inv_freq = self.inv_freq.clone(), self.inv_freq.clone()
        return model.to(dtype)

    def seen(self, batch: dict) -> dict:
        """A batch as this model takes it: images at its own resolution."""
        if not self.names.vision or (size := self.config["image_size"]) == batch["pixel_values"].shape[-1]:
            return batch
        mode = "nearest" if size % batch["pixel_values"].shape[-1] == 0 else "bilinear"
        return {"pixel_values": torch.nn.functional.interpolate(batch["pixel_values"], size, mode=mode)}

    def outputs(self, model: torch.nn.Module, batches: list[dict]) -> Tensor:
        """Logits; without a head the final hidden state, brought back to the coordinates of the first spec."""
        with torch.no_grad():
            found = [model(**self.seen(batch)) for batch in batches]
        found = [o if isinstance(o, Tensor) else o[self.names.reads] for o in found]
        values = torch.cat([o.double().flatten(0, -2) for o in found])
        return values @ self.readout[0] + self.readout[1] if self.readout else values


Move = Callable[[Spec, int], Spec]  # a symmetry; all its draws follow from the seed


def base(names: Names, *, seed: int = 0, width: int = 24, **config) -> Spec:
    """A random model: weights of 1 / sqrt(in), every gain, bias and embedding random and non-zero."""
    small = dict(hidden_size=width, num_hidden_layers=2, num_attention_heads=4, head_dim=8, intermediate_size=40)
    if names.layer_norm:
        small |= dict(head_dim=6)
    if names.vision:
        small |= dict(image_size=8, patch_size=2, num_channels=3)
    else:
        small |= dict(vocab_size=60, max_position_embeddings=64)
    small |= dict(eps=1e-3) | dict(names.small) | config
    draw = Draw(seed)
    state = names.model(names.config(**names.sizes(small))).state_dict()
    if small.get("tie_word_embeddings"):
        state.pop("lm_head.weight")  # the embedding under a second name
    held = names.unpack(state, small["num_hidden_layers"], small)
    return Spec(names, small, {name: draw.like(name, value.shape) for name, value in held.items()})


def tune(spec: Spec, kind: str, seed: int = 1, keep: str = "nothing") -> Spec:
    """The tuned model: `linear` moves the blocks' weights, `gains` also every gain and bias, `everything` all there is.

    `lora` moves what `lora_factors` says, as a dense product; `keep` ends the names that no kind moves.
    """
    draw, parts = Draw(seed), dict(spec.parts)
    if kind == "lora":
        for pieces, a, b in lora_factors(spec).values():
            rows = [len(parts[piece]) for piece in pieces]
            parts |= {p: parts[p] + change for p, change in zip(pieces, (b @ a).split(rows), strict=True)}
        return replace(spec, parts=parts)
    for name, value in spec.parts.items():
        noise = draw.normal(*value.shape)
        inside = name.startswith("blocks.")
        outside = name in EMBEDDINGS or name == "head.bias"
        part = "gains" if value.dim() == 1 and not outside else "linear" if inside else "everything"
        if (part == "linear" or kind == "everything" or part == kind) and not name.endswith(keep):
            parts[name] = value + (0.15 if value.dim() == 1 else 0.25 * value.std()) * noise
    return replace(spec, parts=parts)


def lora_factors(spec: Spec, seed: int = 2) -> dict[str, tuple[list[str], Tensor, Tensor]]:
    """Stored layer -> (the parts stacked in it, A [rank, in], B [out, rank]), random; the adapter's scale is 1."""
    draw, found = Draw(seed), {}
    for stored, part, pieces in spec.names.places(spec.layers):
        if part in spec.names.lora and pieces[0].endswith(".weight"):
            out, width = sum(len(spec.parts[p]) for p in pieces), spec.parts[pieces[0]].shape[1]
            a, b = draw.normal(LORA_RANK, width) / width**0.5, 0.3 * draw.normal(out, LORA_RANK)
            found[stored.removesuffix(".weight")] = pieces, a, b
    return found


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
        if spec.names.vision:
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
