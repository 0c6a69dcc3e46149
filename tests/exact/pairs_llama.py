"""The pairs of the Llama family: RMSNorm, rotary embedding, grouped heads, gated MLP."""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from . import pairs as p
from .models import LLAMA, LLAMA_HEADLESS, LLAMA_SCORE, LLAMA_TIED, Draw, Spec, base

GROUPED = partial(base, LLAMA)  # 4 heads of 8 in 2 groups: heads x head size = 32 > width 24
PLAIN = partial(base, LLAMA, num_attention_heads=3, num_key_value_heads=3)  # 3 divides 24, and so does 4
BIASED = partial(base, LLAMA, attention_bias=True, mlp_bias=True)
TIED = partial(base, LLAMA_TIED, tie_word_embeddings=True)
SCORE = partial(base, LLAMA_SCORE)
HEADLESS = partial(base, LLAMA_HEADLESS)
FEW_TOKENS = (("tokens", (3, 7, 11, 19, 23, 31, 42, 48, 55, 59)),)  # 10 of 60: fewer than the width, more than a head

TOKENS_48 = ("count", 1), ("shape", (4, 12))  # for 40 neurons


def planar(draw: Draw, old: int, new: int, place: list[int] | None = None) -> Tensor:
    """[old, new]: rotary pair i (dimensions i and i + old / 2) turned in its plane, onto pair `place[i]`."""
    turn, angle = torch.zeros(old, new, dtype=torch.float64), 3 * draw.normal(old // 2)
    for i, j in enumerate(place or range(old // 2)):
        a, b, c, d = i, i + old // 2, j, j + new // 2
        turn[a, c], turn[a, d], turn[b, c], turn[b, d] = angle[i].cos(), angle[i].sin(), -angle[i].sin(), angle[i].cos()
    return turn


def larger_heads(size: int) -> p.Move:
    """The rotary pairs keep their frequencies, at other places; new pairs between them get frequencies of their own."""

    def step(spec: Spec, seed: int) -> Spec:
        old = spec.heads[2]
        place = sorted(Draw(seed).order(size // 2)[: old // 2])

        def frequencies(spec: Spec) -> Tensor:
            kept = 1 / 10000.0 ** (torch.arange(0, old, 2).float() / old)  # rope_theta of the config
            found = torch.linspace(0.7, 0.05, size // 2)
            found[place] = kept if spec.inv_freq is None else spec.inv_freq
            return found

        turn = partial(planar, place=place)
        return p.heads(turn_qk=turn, size=size, turn_vo=True, inv_freq=frequencies)(spec, seed)

    return step


def massive(*, seed: int = 0, factor: float = 1000.0) -> Spec:
    """One neuron a thousand times louder than the others, as large models have them."""
    spec = GROUPED(seed=seed)
    up, down = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("up", "down"))
    louder = {up: spec.state[up].clone(), down: spec.state[down].clone()}
    louder[up][3] *= factor
    louder[down][:, 3] /= factor
    return replace(spec, state=spec.state | louder)


GATE_ZERO = p.neurons(p.with_extra(4), silent=("gate_proj",))
UP_ZERO = p.neurons(p.with_extra(4), silent=("up_proj",))
BOTH_ZERO = p.neurons(p.with_extra(4), silent=("gate_proj", "up_proj"))
TURNED = p.heads(turn_qk=planar, turn_vo=True)
SCALED = p.heads(scaled=True)
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
    p.Pair("one-head-copied", PLAIN, (p.heads(p.one_group_copied, planar, turn_vo=True),)),
    p.Pair("one-group-copied", GROUPED, (p.heads(p.one_group_copied, planar, turn_vo=True, scaled=True),)),
    p.Pair("one-query-copied", GROUPED, (p.heads(p.one_query_copied), p.heads(p.heads_permuted))),
    p.Pair("all-heads-copied", GROUPED, (p.heads(p.all_groups_copied, planar, turn_vo=True), *PERMUTED)),
    p.Pair("kv-unshared", GROUPED, (p.heads(p.kv_unshared, planar, turn_vo=True),)),
    p.Pair("larger-heads", GROUPED, (larger_heads(12),)),
    p.Pair("rank-poor-vocabulary", GROUPED, (p.residual(p.rotated), *PERMUTED), calibration=FEW_TOKENS),
    p.Pair("rank-poor-widened", GROUPED, (p.residual(p.widened(36)), TURNED), calibration=FEW_TOKENS),
    p.Pair("barely-enough-tokens", GROUPED, (p.residual(p.rotated), *PERMUTED), calibration=TOKENS_48),
    p.Pair("padded-batches", GROUPED, (p.residual(p.rotated),), calibration=(("padded", True),)),
    p.Pair("tied", TIED, (p.residual(p.signed_permutation, 1.3, carry_final=True), *PERMUTED)),
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
            larger_heads(12),
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
    p.Pair("narrow-heads", GROUPED, (larger_heads(12), SCALED), NO_FACTORS, narrow=True),
]
