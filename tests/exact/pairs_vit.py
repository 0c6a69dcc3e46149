"""The pairs of the ViT family: LayerNorm, biases everywhere, plain heads, class token and positions."""

from functools import partial

from . import pairs as p
from .models import VIT, VIT_HEADLESS, base

BASE = partial(base, VIT)
THREE_HEADS = partial(base, VIT, num_attention_heads=3)
NO_QKV_BIAS = partial(base, VIT, qkv_bias=False)  # readers without a bias behind a LayerNorm that has one
HEADLESS = partial(base, VIT_HEADLESS)
FEW_PATCHES = partial(base, VIT, image_size=4, num_channels=1)  # 4 patch pixels and 5 positions span 9 of 24 dimensions

TOKENS_51 = ("count", 1), ("shape", (3,))  # 3 images, for 40 neurons


SILENT = p.neurons(p.with_extra(4), silent=("up",))
TURNED = p.heads(turn_qk=p.dense, turn_vo=True)
SCALED = p.heads(scaled=True)
PERMUTED = p.heads(p.heads_permuted), p.neurons(p.permuted_neurons)
LARGER = p.heads(turn_qk=p.dense, turn_vo=True, size=10)
NO_FACTORS = "linear", "gains", "everything"

EXACT = [
    p.Pair("identity-new-gains", BASE, (p.residual(),)),
    p.Pair("identity-no-qkv-bias", NO_QKV_BIAS, (p.residual(),)),
    p.Pair("rotated", BASE, (p.residual(p.rotated, 1.7),)),
    p.Pair("rotated-no-qkv-bias", NO_QKV_BIAS, (p.residual(p.rotated, 0.6),)),
    p.Pair("permuted", BASE, (p.residual(), *PERMUTED)),
    p.Pair("turned-in-heads", BASE, (TURNED,)),
    p.Pair("scaled-heads", BASE, (SCALED,)),
    p.Pair("widened", BASE, (p.residual(p.widened(36), 2.5),)),
    p.Pair("doubled-residual", BASE, (p.residual(p.doubled, 2**0.5),)),
    p.Pair("silent", BASE, (p.residual(), SILENT)),
    p.Pair("silent-then-widened", BASE, (SILENT, p.residual(p.widened(36)))),
    p.Pair("doubled-mlp", BASE, (p.residual(), p.neurons(p.doubled_neurons))),
    p.Pair("one-head-copied", THREE_HEADS, (p.heads(p.one_group_copied, p.dense, turn_vo=True, scaled=True),)),
    p.Pair("all-heads-copied", BASE, (p.heads(p.all_groups_copied, p.dense, turn_vo=True), *PERMUTED)),
    p.Pair("own-heads", BASE, (p.residual(p.rotated), p.beside_live(1, volume=0.2), *PERMUTED)),
    p.Pair("larger-heads", BASE, (LARGER,)),
    p.Pair("rank-poor-patches", FEW_PATCHES, (p.residual(p.rotated), *PERMUTED), calibration=(("count", 6),)),
    p.Pair("barely-enough-tokens", BASE, (p.residual(p.rotated), *PERMUTED), calibration=TOKENS_51),
    p.Pair("bias-moved-into-the-mean", BASE, (p.residual(), p.without_bias("q", "k", "v"))),
    p.Pair("bias-found-in-the-mean", BASE, (p.without_bias("q", "k", "v"),), NO_FACTORS, narrow=True),
    p.Pair("two-blocks-more", BASE, (p.residual(p.rotated), p.deeper(0, 2))),
    p.Pair("larger-images", BASE, (p.residual(p.rotated), p.zoomed(2)), keep="patch.weight"),  # of another shape
    p.Pair("no-head", HEADLESS, (p.residual(p.signed_permutation, 1.3, carry_final=True), *PERMUTED)),
    p.Pair("no-head-widened", HEADLESS, (p.residual(p.widened(36)),), ("linear", "lora")),
    p.Pair(
        "all-together",
        BASE,
        (
            p.residual(p.widened(48), 1.4),
            p.heads(p.all_groups_copied),
            p.heads(p.heads_permuted, scaled=True),
            LARGER,
            p.neurons(p.doubled_neurons),
            SILENT,
            p.neurons(p.permuted_neurons),
        ),
    ),
    p.Pair("narrow-residual", BASE, (p.residual(p.widened(36), 1.4),), NO_FACTORS, narrow=True),
    p.Pair("narrow-doubled-residual", BASE, (p.residual(p.doubled, 2**0.5),), NO_FACTORS, narrow=True),
    p.Pair("narrow-mlp", BASE, (p.neurons(p.doubled_neurons), SILENT), NO_FACTORS, narrow=True),
    p.Pair("narrow-heads", BASE, (LARGER, SCALED), NO_FACTORS, narrow=True),
]
