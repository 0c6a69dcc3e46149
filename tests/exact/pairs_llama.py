"""The pairs of the Llama family: RMSNorm, rotary embedding, grouped heads, gated MLP."""

from dataclasses import replace
from functools import partial

from . import pairs as p
from .models import LLAMA, LLAMA_HEADLESS, LLAMA_SCORE, LLAMA_TIED, Spec, base

GROUPED = partial(base, LLAMA)  # 4 heads of 8 in 2 groups: heads x head size = 32 > width 24
PLAIN = partial(base, LLAMA, num_attention_heads=3, num_key_value_heads=3)  # 3 divides 24, and so does 4
BIASED = partial(base, LLAMA, attention_bias=True, mlp_bias=True)
TIED = partial(base, LLAMA_TIED, tie_word_embeddings=True)
SCORE = partial(base, LLAMA_SCORE)
HEADLESS = partial(base, LLAMA_HEADLESS)
FEW_TOKENS = (("tokens", (3, 7, 11, 19, 23, 31, 42, 48, 55, 59)),)  # 10 of 60: fewer than the width, more than a head

TOKENS_48 = ("count", 1), ("shape", (4, 12))  # for 40 neurons


def massive(*, seed: int = 0, factor: float = 1000.0) -> Spec:
    """One neuron a thousand times louder than the others, as large models have them."""
    spec = GROUPED(seed=seed)
    up, down = (f"blocks.0.{name}.weight" for name in ("up", "down"))
    louder = {up: spec.parts[up].clone(), down: spec.parts[down].clone()}
    louder[up][3] *= factor
    louder[down][:, 3] /= factor
    return replace(spec, parts=spec.parts | louder)


GATE_ZERO = p.neurons(p.with_extra(4), silent=("gate",))
UP_ZERO = p.neurons(p.with_extra(4), silent=("up",))
BOTH_ZERO = p.neurons(p.with_extra(4), silent=("gate", "up"))
TURNED = p.heads(turn_qk=p.planar, turn_vo=True)
LARGER = p.larger_rotary_heads(12)
SCALED = p.heads(scaled=True)
COPIED = p.heads(p.one_group_copied, p.planar, turn_vo=True, scaled=True)
OWN = p.beside_live(1, 1, volume=3.0)
PERMUTED = p.heads(p.heads_permuted), p.neurons(p.permuted_neurons)
NO_FACTORS = "linear", "gains", "everything"  # a narrow source's delta is not a rank-2 factor of the random adapter

EXACT = [
    p.Pair("identity-new-gains", GROUPED, (p.residual(),)),
    p.Pair("massive-neuron", massive, (p.residual(p.rotated), p.neurons(p.permuted_neurons))),
    p.Pair("rotated", GROUPED, (p.residual(p.rotated, 1.7),)),
    p.Pair("rotated-biased-layers", BIASED, (p.residual(p.rotated, 0.6),)),
    p.Pair("permuted", GROUPED, (p.residual(), *PERMUTED)),
    p.Pair("turned-in-heads", GROUPED, (TURNED,)),
    p.Pair("scaled-heads", GROUPED, (SCALED,)),
    p.Pair("scaled-heads-biased-layers", BIASED, (SCALED, TURNED)),
    p.Pair("widened", GROUPED, (p.residual(p.widened(36)),)),
    p.Pair("widened-rescaled", GROUPED, (p.residual(p.widened(36), 2.5),)),
    p.Pair("doubled-residual", GROUPED, (p.residual(p.doubled, 2**0.5),)),
    p.Pair("silent-gate", GROUPED, (p.residual(), GATE_ZERO)),
    p.Pair("silent-up", GROUPED, (p.residual(), UP_ZERO)),
    p.Pair("silent-both", GROUPED, (p.residual(), BOTH_ZERO)),
    p.Pair("silent-biased-layers", BIASED, (p.residual(), GATE_ZERO, UP_ZERO, BOTH_ZERO)),
    p.Pair("silent-then-widened", GROUPED, (GATE_ZERO, UP_ZERO, p.residual(p.widened(36)))),
    p.Pair("doubled-mlp", GROUPED, (p.residual(), p.neurons(p.doubled_neurons))),
    p.Pair("up-times-3", GROUPED, (p.neurons(p.permuted_neurons, rescale=3.0),)),
    p.Pair("one-head-copied", PLAIN, (p.heads(p.one_group_copied, p.planar, turn_vo=True),)),
    p.Pair("one-group-copied", GROUPED, (p.heads(p.one_group_copied, p.planar, turn_vo=True, scaled=True),)),
    p.Pair("one-query-copied", GROUPED, (p.heads(p.one_query_copied), p.heads(p.heads_permuted))),
    p.Pair("all-heads-copied", GROUPED, (p.heads(p.all_groups_copied, p.planar, turn_vo=True), *PERMUTED)),
    p.Pair("kv-unshared", GROUPED, (p.heads(p.kv_unshared, p.planar, turn_vo=True),)),
    p.Pair("own-heads", PLAIN, (p.residual(p.widened(30)), p.beside_live(1), *PERMUTED)),
    p.Pair("own-quiet-groups", GROUPED, (p.residual(), p.beside_live(2, volume=0.05), *PERMUTED), ("gains", "lora")),
    p.Pair("own-queries", GROUPED, (p.beside_live(0, 1), TURNED, SCALED, *PERMUTED), ("gains", "lora")),
    p.Pair("own-and-copied-heads", GROUPED, (p.residual(p.widened(40)), COPIED, OWN, *PERMUTED), ("gains", "lora")),
    p.Pair("larger-heads", GROUPED, (LARGER,)),
    p.Pair("rank-poor-vocabulary", GROUPED, (p.residual(p.rotated), *PERMUTED), calibration=FEW_TOKENS),
    p.Pair("rank-poor-widened", GROUPED, (p.residual(p.widened(36)), TURNED), calibration=FEW_TOKENS),
    p.Pair("barely-enough-tokens", GROUPED, (p.residual(p.rotated), *PERMUTED), calibration=TOKENS_48),
    p.Pair("two-blocks-more", GROUPED, (p.residual(p.rotated), p.deeper(0, 1))),
    p.Pair("two-blocks-more-at-the-end", BIASED, (p.deeper(1, 2), *PERMUTED)),
    p.Pair("padded-batches", GROUPED, (p.residual(p.rotated),), calibration=(("padded", True),)),
    p.Pair("tied", TIED, (p.residual(p.signed_permutation, 1.3, carry_final=True), *PERMUTED)),
    p.Pair("untied", TIED, (p.untied(LLAMA), p.residual(p.widened(36), 1.3), *PERMUTED), NO_FACTORS),
    p.Pair("tied-doubled", TIED, (p.residual(p.doubled, 0.8, carry_final=True),)),
    p.Pair("score-head", SCORE, (p.residual(p.widened(36)), *PERMUTED)),
    p.Pair("no-head", HEADLESS, (p.residual(p.signed_permutation, 1.3, carry_final=True), *PERMUTED)),
    p.Pair("no-head-widened", HEADLESS, (p.residual(p.widened(36)),), ("linear", "lora")),
    p.Pair(
        "all-together",
        BIASED,
        (
            p.residual(p.widened(48), 1.4),
            p.heads(p.all_groups_copied),
            p.heads(p.heads_permuted, scaled=True),
            LARGER,
            p.neurons(p.doubled_neurons, rescale=3.0),
            GATE_ZERO,
            UP_ZERO,
            BOTH_ZERO,
            p.neurons(p.permuted_neurons),
        ),
    ),
    p.Pair("narrow-residual", GROUPED, (p.residual(p.widened(36), 1.4),), NO_FACTORS, narrow=True),
    p.Pair("narrow-doubled-residual", GROUPED, (p.residual(p.doubled, 2**0.5),), NO_FACTORS, narrow=True),
    p.Pair("narrow-mlp", GROUPED, (p.neurons(p.doubled_neurons), UP_ZERO, GATE_ZERO), NO_FACTORS, narrow=True),
    p.Pair("shallower", GROUPED, (p.residual(p.rotated), p.deeper(0, 2)), NO_FACTORS, narrow=True),
    p.Pair("narrow-heads", GROUPED, (LARGER, SCALED), NO_FACTORS, narrow=True),
]
