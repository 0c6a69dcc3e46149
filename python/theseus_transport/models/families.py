"""The families this version knows, as data, and the ones it refuses, with the reason."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import InputRefused
from .family import Family
from .text_families import GPT2, LLAMA, MISTRAL, QWEN2, QWEN3, STARCODER2
from .vision_families import VISION

FAMILIES: dict[str, Family] = {f.model_type: f for f in (LLAMA, MISTRAL, QWEN2, QWEN3, GPT2, STARCODER2, *VISION)}
POST_NORM = "normalises behind the residual sum (post-norm), so no map of the residual is exact"
PARALLEL = "runs attention and MLP side by side in one block"
EXPERTS = "is a mixture of experts"
TWO_STACKS = "has an encoder and a decoder"
RECURRENT = "has blocks without attention"
REFUSED = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "distilbert", "electra", "camembert", "mpnet"), POST_NORM),
    **dict.fromkeys(("albert", "deberta", "deberta-v2", "openai-gpt", "olmo2", "gemma2", "gemma3"), POST_NORM),
    **dict.fromkeys(("gemma3_text", "gemma3n", "gemma3n_text", "olmo3", "glm4", "exaone4"), POST_NORM),
    **dict.fromkeys(("gpt_neox", "gptj", "phi", "falcon", "cohere", "cohere2", "codegen"), PARALLEL),
    **dict.fromkeys(("mixtral", "deepseek_v2", "deepseek_v3", "gpt_oss", "llama4", "llama4_text", "dbrx"), EXPERTS),
    **dict.fromkeys(("t5", "mt5", "bart", "mbart", "whisper", "marian", "pegasus", "m2m_100"), TWO_STACKS),
    **dict.fromkeys(("mamba", "mamba2", "falcon_mamba", "rwkv", "recurrent_gemma", "lfm2", "qwen3_next"), RECURRENT),
}
REGISTER = (
    "another pre-norm transformer takes one record: theseus_transport.register, from Python, shown in CONTRIBUTING.md "
    "under `A family`"
)


def unsupported(config: Mapping[str, Any]) -> str:
    """Why a model of this config cannot be aligned, and what can: for a ``model_type`` that no family has."""
    kind = config.get("model_type")
    if any(str(key).startswith("_diffusers") for key in config):
        return "config.json is of a part of a diffusion pipeline; diffusion models are not moved"
    why = REFUSED.get(kind) if isinstance(kind, str) else None
    if isinstance(kind, str) and "moe" in kind:
        why = EXPERTS
    known = f"supported families are {', '.join(sorted(FAMILIES))}"
    return f"model_type is {kind!r}, which {why}; {known}" if why else f"model_type is {kind!r}; {known}; {REGISTER}"


def register(family: Family) -> Family:
    """Make a family of your own known, so that models whose config says its ``model_type`` can be aligned.

    Raises:
        InputRefused: the name is taken, or a fused part is no layer of the record.
    """
    if FAMILIES.get(family.model_type, family) != family:
        raise InputRefused(f"family {family.model_type!r} exists already; choose another model_type")
    layers = {family.query, family.key, family.value, family.output, *family.expand, family.contract}
    if unknown := {part for parts in family.fused.values() for part in parts} - layers:
        raise InputRefused(f"family {family.model_type!r}: fused part {sorted(unknown)[0]!r} is none of its layers")
    return FAMILIES.setdefault(family.model_type, family)
