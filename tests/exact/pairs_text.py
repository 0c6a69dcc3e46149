"""The pairs of the other text families: one short list each, of what sets them apart from Llama."""

from functools import partial

import transformers as hf

from . import pairs as p
from .families import GPT2, GPT2_TIED, HOME, LLAMA, MISTRAL, OWN_HEAD, QWEN2, QWEN3, Names, recorded
from .models import base

PERMUTED = p.heads(p.heads_permuted), p.neurons(p.permuted_neurons)
TURNED = p.heads(turn_qk=p.planar, turn_vo=True, scaled=True)
GATE_ZERO = p.neurons(p.with_extra(4), silent=("gate",))
NO_FACTORS = "linear", "gains", "everything"
WIDE = "gains", "everything", "lora"

PLAIN, BIASED = partial(base, MISTRAL), partial(base, QWEN2)
ZERO_BIASES = {"biases": "q k v"}

MISTRAL_PAIRS = [
    p.Pair("rotated", PLAIN, (p.residual(p.rotated, 1.7), *PERMUTED), WIDE),
    p.Pair("together", PLAIN, (p.residual(p.widened(36)), TURNED, p.larger_rotary_heads(12), GATE_ZERO), WIDE),
    p.Pair("two-blocks-more", PLAIN, (p.residual(p.rotated), p.deeper(0, 2)), ("linear", "lora")),
    p.Pair("narrow", PLAIN, (p.residual(p.widened(36)), TURNED), NO_FACTORS, narrow=True),
]

QWEN2_PAIRS = [
    p.Pair("rotated", BIASED, (p.residual(p.rotated, 1.7), *PERMUTED), WIDE),
    p.Pair("turned-in-heads", BIASED, (TURNED,), WIDE),
    p.Pair("kv-unshared", BIASED, (p.heads(p.kv_unshared, p.planar, turn_vo=True),), WIDE),
    p.Pair("together", BIASED, (p.residual(p.widened(36)), TURNED, p.larger_rotary_heads(12), GATE_ZERO), WIDE),
    p.Pair("two-blocks-more", BIASED, (p.residual(), p.deeper(1, 1)), ("linear", "lora")),
    p.Pair("narrow", BIASED, (p.residual(p.widened(36)), TURNED), NO_FACTORS, narrow=True),
]

# The norm behind q and k sees a head's own length: sizes of q and k are free (with a small eps, which all norms share),
# turns are not. Its gains may move between q and k, one factor per rotary pair.
NORMED = partial(base, QWEN3, eps=1e-14)
FLIPPED = p.heads(turn_qk=partial(p.planar, signs=True), turn_vo=True, scaled=True)

QWEN3_PAIRS = [
    p.Pair("new-gains", NORMED, (p.residual(),)),
    p.Pair("rotated", NORMED, (p.residual(p.rotated, 1.7), *PERMUTED), WIDE),
    p.Pair("flipped-in-heads", NORMED, (FLIPPED,)),
    p.Pair("all-heads-copied", NORMED, (p.heads(p.all_groups_copied, scaled=True), *PERMUTED), WIDE),
    p.Pair("larger-heads", NORMED, (p.larger_rotary_heads(12, signs=True),), WIDE),
    p.Pair("together", NORMED, (p.residual(p.widened(36)), FLIPPED, GATE_ZERO, *PERMUTED), WIDE),
    p.Pair("two-blocks-more", NORMED, (p.residual(p.rotated), p.deeper(0, 1)), ("gains",)),
    p.Pair("narrow", NORMED, (p.residual(p.widened(36)), FLIPPED), NO_FACTORS, narrow=True),
]

# Heads times head size is the width: a wider residual comes with more or larger heads.
UNTIED, TIED = partial(base, GPT2), partial(base, GPT2_TIED)
LARGER = p.heads(turn_qk=p.dense, turn_vo=True, size=9)  # 4 x 9 = 36
MORE = p.heads(p.two_groups_copied, p.dense, turn_vo=True, scaled=True)  # 6 x 6
COPIED = p.heads(p.all_groups_copied, p.dense, turn_vo=True)  # 8 x 6 = 48
SILENT = p.neurons(p.with_extra(4), silent=("up",))

GPT2_PAIRS = [
    p.Pair("new-gains", UNTIED, (p.residual(),)),
    p.Pair("rotated", UNTIED, (p.residual(p.rotated, 1.7), *PERMUTED), WIDE),
    p.Pair("turned-in-heads", UNTIED, (p.heads(turn_qk=p.dense, turn_vo=True, scaled=True),), WIDE),
    p.Pair("widened-larger-heads", UNTIED, (p.residual(p.widened(36)), LARGER), WIDE),
    p.Pair("widened-more-heads", UNTIED, (p.residual(p.widened(36), 1.4), MORE, SILENT), WIDE),
    p.Pair("doubled", UNTIED, (p.residual(p.doubled), COPIED, p.neurons(p.doubled_neurons)), WIDE),
    p.Pair("two-blocks-more", UNTIED, (p.residual(p.rotated), p.deeper(0, 2)), ("gains", "lora")),
    p.Pair("narrow", UNTIED, (p.residual(p.widened(36)), LARGER), NO_FACTORS, narrow=True),
    p.Pair("tied", TIED, (p.residual(p.signed_permutation, 1.3, carry_final=True), *PERMUTED)),
    p.Pair("untied", TIED, (p.untied(GPT2), p.residual(p.widened(36), 1.3), LARGER), ("gains", "everything")),
    p.Pair("tied-doubled", TIED, (p.residual(p.doubled, 0.8, carry_final=True), COPIED), WIDE),
]

MADE = partial(base, HOME)

HOME_PAIRS = [
    p.Pair("rotated", MADE, (p.residual(p.rotated, 1.7), *PERMUTED), NO_FACTORS),
    p.Pair("together", MADE, (p.residual(p.widened(36)), LARGER, SILENT, *PERMUTED), ("everything", "lora")),
    p.Pair("two-blocks-more", MADE, (p.residual(p.rotated), p.deeper(1, 2)), ("gains",)),
]

SAME = partial(base, LLAMA)
SILU = {"activation_function": "silu"}
CROSS_PAIRS = [
    p.Pair("llama-to-mistral", SAME, (p.residual(p.rotated, 1.7), TURNED, p.stored_as(MISTRAL)), WIDE),
    p.Pair("llama-to-qwen2", SAME, (p.residual(p.widened(36)), TURNED, p.stored_as(QWEN2, **ZERO_BIASES)), WIDE),
    p.Pair("mistral-to-qwen2", PLAIN, (p.residual(), *PERMUTED, p.stored_as(QWEN2, **ZERO_BIASES)), WIDE),
    p.Pair(
        "qwen2-to-llama",
        SAME,
        (p.residual(p.widened(36)), TURNED, p.stored_as(QWEN2, **ZERO_BIASES)),
        ("linear",),
        narrow=True,
    ),
]

CROSS_PAIRS += [
    p.Pair("home-to-gpt2", MADE, (p.residual(p.rotated, 1.7), *PERMUTED, p.stored_as(GPT2, **SILU)), WIDE),
    p.Pair("home-to-wider-gpt2", MADE, (p.residual(p.widened(36)), MORE, p.stored_as(GPT2, **SILU)), ("lora",)),
    p.Pair(
        "gpt2-to-home", MADE, (p.residual(p.widened(36)), LARGER, p.stored_as(GPT2, **SILU)), NO_FACTORS, narrow=True
    ),
]


def standard(names: Names, residual: p.Move) -> list[p.Pair]:
    """What every family with grouped heads and a rotary embedding must pass, beside what only it has."""
    spec = partial(base, names)
    return [
        p.Pair("rotated", spec, (residual, *PERMUTED), WIDE),
        p.Pair("turned-in-heads", spec, (TURNED,), ("gains", "lora")),
        p.Pair("two-blocks-more", spec, (p.residual(), p.deeper(0, 2)), ("linear",)),
    ]


STARCODER2 = recorded("starcoder2", hf.Starcoder2ForCausalLM, hf.Starcoder2Config, eps="norm_epsilon", **OWN_HEAD)

TEXT = {
    "starcoder2": standard(STARCODER2, p.residual(p.rotated, 1.7)),
    "mistral": MISTRAL_PAIRS,
    "qwen2": QWEN2_PAIRS,
    "qwen3": QWEN3_PAIRS,
    "gpt2": GPT2_PAIRS,
    "home": HOME_PAIRS,
    "cross": CROSS_PAIRS,
}
