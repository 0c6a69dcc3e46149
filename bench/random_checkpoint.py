"""Random checkpoints of public geometries, written tensor by tensor: what large models cost without downloading one.

    python bench/random_checkpoint.py small --geometry qwen2.5-0.5b --blocks 4
    python bench/random_checkpoint.py tuned --geometry qwen2.5-0.5b --blocks 4 --tune 0.05 --only q_proj,v_proj
    python bench/random_checkpoint.py adapter --geometry qwen2.5-0.5b --blocks 4 --lora 8

The same seed gives the same weights: a tune adds noise to them, a block is the same for any number of blocks.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Collection
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from theseus_transport.files.writer import Planned, planned_bytes, write_checkpoint
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

SPREAD = 0.02  # standard deviation of weights and biases, the initializer_range of all these models
GAINS = 0.05  # standard deviation of gains around 1
PIECE = 1 << 22  # values drawn at once


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of a decoder, each field named and meant as in its config.json; `rest` is what else that says."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    tie_word_embeddings: bool = True
    rest: dict[str, Any] = field(default_factory=dict)

    def config(self) -> dict[str, Any]:
        """The content of config.json, without a dtype."""
        sizes = asdict(self)
        return sizes | sizes.pop("rest")


def _llama(factor: float) -> dict[str, Any]:
    lengths = {"high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192}
    scaling = {"factor": factor, **lengths, "rope_type": "llama3"}
    return dict(rope_theta=500000.0, rms_norm_eps=1e-5, max_position_embeddings=131072, rope_scaling=scaling)


def _qwen(positions: int) -> dict[str, Any]:
    return dict(rope_theta=1000000.0, rms_norm_eps=1e-6, max_position_embeddings=positions)


# values of config.json in the public repositories Qwen/Qwen2.5-* and meta-llama/Llama-3.*
GEOMETRIES = {
    "qwen2.5-0.5b": ModelSizes("qwen2", 896, 4864, 24, 14, 2, 151936, rest=_qwen(32768)),
    "qwen2.5-1.5b": ModelSizes("qwen2", 1536, 8960, 28, 12, 2, 151936, rest=_qwen(131072)),
    "llama-3.2-1b": ModelSizes("llama", 2048, 8192, 16, 32, 8, 128256, rest=_llama(32.0)),
    "llama-3.2-3b": ModelSizes("llama", 3072, 8192, 28, 24, 8, 128256, rest=_llama(32.0)),
    "llama-3.1-8b": ModelSizes("llama", 4096, 14336, 32, 32, 8, 128256, tie_word_embeddings=False, rest=_llama(8.0)),
}


def write_random(
    folder: str | Path,
    geometry: ModelSizes,
    *,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    tune: float = 0.0,
    only: Collection[str] = (),
) -> int:
    """Write a random model as `from_pretrained` loads it, a shard a block and more for the rest; returns its bytes.

    `tune` adds noise of that size relative to the spread of the weights; `only` names the layers it is added to
    (q_proj, embed_tokens, ...; all by default). One tensor is in memory at a time.
    """
    shapes = parameters(geometry)
    _check_named(only, shapes)
    plan = [
        Planned(name, shape, dtype, lambda rows, name=name, shape=shape: _drawn(  # a whole tensor: rows is None
            f"{seed}/{name}", shape, dtype, tune if not only or _layer(name) in only else 0.0))
        for name, shape in shapes.items()
    ]  # fmt: skip
    block = planned_bytes(tensor for tensor in plan if ".layers.0." in tensor.name)
    code = str(dtype).removeprefix("torch.")
    config = {**geometry.config(), "architectures": [_model(geometry).__class__.__name__], "torch_dtype": code}
    write_checkpoint(folder, plan, shard_size=block, files={"config.json": json.dumps(config, indent=2)})
    return planned_bytes(plan)


def write_adapter(
    folder: str | Path,
    geometry: ModelSizes,
    rank: int,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    tune: float = 0.05,
    only: Collection[str] = (),
) -> int:
    """Write a LoRA adapter as PEFT loads it, for `only` these layers of all blocks (all by default); returns its bytes.

    Its update `B A` has entries of standard deviation `tune` relative to those of the weights.
    """
    shapes = {name: shape for name, shape in parameters(geometry).items() if ".layers." in name and len(shape) == 2}
    _check_named(only, shapes)
    plan = []
    for name, (rows, width) in shapes.items():
        if only and _layer(name) not in only:
            continue
        spread = tune * SPREAD * math.sqrt(width / rank)  # of B, with A of 1 / sqrt(width): B A sums `rank` products
        for factor, shape, size in (("A", (rank, width), width**-0.5), ("B", (rows, rank), spread)):
            stored = f"base_model.model.{name.removesuffix('weight')}lora_{factor}.weight"
            draw = partial(_normal, f"{seed}/{stored}", shape, dtype, spread=size)
            plan.append(Planned(stored, shape, dtype, lambda rows, draw=draw: draw()))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({_layer(name) for name in shapes if not only or _layer(name) in only}),
    }
    write_checkpoint(folder, plan, stem="adapter_model", files={"adapter_config.json": json.dumps(config, indent=2)})
    return planned_bytes(plan)


def parameters(geometry: ModelSizes) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter by name, blocks first; a tied head is none of its own."""
    found = {name: tuple(parameter.shape) for name, parameter in _model(geometry).named_parameters()}
    return dict(sorted(found.items(), key=lambda item: ".layers." not in item[0]))


def _model(geometry: ModelSizes) -> torch.nn.Module:
    with torch.device("meta"):
        model: torch.nn.Module = AutoModelForCausalLM.from_config(AutoConfig.for_model(**geometry.config()))
    return model


def _layer(name: str) -> str:
    return name.split(".")[-2]


def _check_named(only: Collection[str], shapes: dict[str, tuple[int, ...]]) -> None:
    known = {_layer(name) for name in shapes}
    if unknown := set(only) - known:
        raise SystemExit(f"there is no layer {', '.join(sorted(unknown))}; known: {', '.join(sorted(known))}")


def _drawn(key: str, shape: tuple[int, ...], dtype: torch.dtype, tune: float) -> Tensor:
    gain = key.endswith("norm.weight")
    return _normal(key, shape, dtype, mean=float(gain), spread=GAINS if gain else SPREAD, tune=tune)


def _normal(
    key: str, shape: tuple[int, ...], dtype: torch.dtype, *, spread: float, mean: float = 0.0, tune: float = 0.0
) -> Tensor:
    """Values that the key alone decides, drawn in float32 a piece at a time, with noise from draws of its own."""
    values, draws, noise = torch.empty(shape, dtype=dtype), _generator(key), _generator(f"{key}/tune")
    for piece in values.view(-1).split(PIECE):
        drawn = torch.randn(piece.shape, generator=draws)
        if tune:
            drawn.add_(torch.randn(piece.shape, generator=noise), alpha=tune)
        piece.copy_(drawn.mul_(spread).add_(mean))
    return values


def _generator(key: str) -> torch.Generator:
    return torch.Generator().manual_seed(int.from_bytes(blake2b(key.encode(), digest_size=7).digest(), "little"))


def main() -> None:
    """Write what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write; it must be empty or absent")
    parser.add_argument("--geometry", choices=GEOMETRIES, required=True)
    parser.add_argument("--blocks", type=int, help="instead of the geometry's own number")
    parser.add_argument("--vocabulary", type=int, help="instead of the geometry's own number")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--tune", type=float, default=0.0, metavar="NOISE", help="relative to the spread of the weights"
    )
    parser.add_argument("--only", default="", metavar="LAYERS", help="the layers tuned: q_proj,v_proj")
    parser.add_argument("--lora", type=int, metavar="RANK", help="write an adapter of this rank instead of a model")
    given = parser.parse_args()
    sizes = {"num_hidden_layers": given.blocks, "vocab_size": given.vocabulary}
    geometry = replace(GEOMETRIES[given.geometry], **{name: size for name, size in sizes.items() if size is not None})
    options: dict[str, Any] = {"dtype": getattr(torch, given.dtype), "seed": given.seed}
    options |= {"only": given.only.split(",") if given.only else ()} | ({"tune": given.tune} if given.tune else {})
    written = write_adapter(given.out, geometry, given.lora, **options) if given.lora else write_random(
        given.out, geometry, **options)  # fmt: skip
    print(f"{given.out}: {written} bytes of tensors")


if __name__ == "__main__":
    main()
