"""The pairs of the other vision families: one short list each, of what sets them apart from ViT."""

from dataclasses import replace
from functools import partial

import torch

from . import pairs as p
from .families import (
    CLIP,
    CLIP_HEADLESS,
    DINO,
    DINO_CLASSIFIER,
    DINO_GATED,
    DINO_REGISTERS,
    OLDER_DINO,
    OPEN_CLIP,
    SIGLIP,
    SIGLIP_CLASSIFIER,
    VIT_HEADLESS,
    Names,
)
from .models import Spec, base
from .pairs_text import COPIED, LARGER, MORE, NO_FACTORS, PERMUTED, SILENT, WIDE

TURNED = p.heads(turn_qk=p.dense, turn_vo=True, scaled=True)
CARRIED = p.residual(p.signed_permutation, 1.3, carry_final=True)


def flat(names: Names) -> Spec:
    """A constant gain in front of the first block: the only one that leaves the residual free to turn."""
    spec = base(names)
    return replace(spec, parts=spec.parts | {"pre_norm.weight": torch.full((24,), 0.8, dtype=torch.float64)})


# A norm in front of the first block: its output is the residual, which then turns only as far as its gain lets it.
CLIP_BASE, FLAT = partial(base, CLIP), partial(flat, CLIP)
THREE_IMAGES = ("count", 1), ("shape", (3,))  # of the class token alone 3 rows, of all 51 for 40 neurons
GAIN = {"keep": "pre_norm.weight"}  # whose change would not be diagonal any more

CLIP_PAIRS = [
    p.Pair("new-gains", CLIP_BASE, (p.residual(p.same, 1.7),)),
    p.Pair("permuted", CLIP_BASE, (p.residual(p.signed_permutation, 1.3), *PERMUTED)),
    p.Pair("three-images", CLIP_BASE, (p.residual(p.same, 1.7), *PERMUTED), NO_FACTORS, calibration=THREE_IMAGES),
    p.Pair("doubled", CLIP_BASE, (p.residual(p.doubled, 0.8), COPIED, SILENT), WIDE),
    p.Pair("turned-in-heads", CLIP_BASE, (TURNED,), ("gains", "lora")),
    p.Pair("rotated", FLAT, (p.residual(p.rotated, 1.7), *PERMUTED), **GAIN),
    p.Pair("widened", FLAT, (p.residual(p.widened(36)), MORE), WIDE, **GAIN),
    p.Pair("two-blocks-more", CLIP_BASE, (p.residual(), p.deeper(0, 2)), ("gains", "lora")),
    p.Pair("larger-images", CLIP_BASE, (p.residual(), p.zoomed(2)), ("gains", "lora")),
    p.Pair("narrow", FLAT, (p.residual(p.widened(36)), LARGER), NO_FACTORS, narrow=True, **GAIN),
    p.Pair("no-head", partial(base, CLIP_HEADLESS), (CARRIED, *PERMUTED), ("linear", "gains", "lora")),
]

TOWER, FLAT_TOWER = partial(base, OPEN_CLIP), partial(flat, OPEN_CLIP)

OPEN_CLIP_PAIRS = [
    p.Pair("permuted", TOWER, (p.residual(p.signed_permutation, 1.3), *PERMUTED), NO_FACTORS),
    p.Pair("turned-in-heads", TOWER, (TURNED,), ("gains",)),
    p.Pair("widened", FLAT_TOWER, (p.residual(p.widened(36), 1.4), LARGER, SILENT), NO_FACTORS, **GAIN),
    p.Pair("doubled", TOWER, (p.residual(p.doubled), COPIED), ("everything",)),
    p.Pair("two-blocks-more", TOWER, (p.residual(), p.deeper(0, 2)), ("linear",)),
    p.Pair("narrow", FLAT_TOWER, (p.residual(p.widened(36)), LARGER), NO_FACTORS, narrow=True, **GAIN),
    p.Pair("from-clip", CLIP_BASE, (p.residual(p.same, 1.7), *PERMUTED, p.stored_as(OPEN_CLIP)), WIDE),
    p.Pair("from-clip-widened", FLAT, (p.residual(p.widened(36)), MORE, p.stored_as(OPEN_CLIP)), WIDE, **GAIN),
    p.Pair("to-clip", CLIP_BASE, (p.residual(), TURNED, p.stored_as(OPEN_CLIP)), NO_FACTORS, narrow=True),
]

SIGLIP_BASE, CLASSIFIED = partial(base, SIGLIP), partial(base, SIGLIP_CLASSIFIER)

SIGLIP_PAIRS = [
    p.Pair("new-gains", SIGLIP_BASE, (p.residual(),), ("linear", "lora")),
    p.Pair("permuted", SIGLIP_BASE, (CARRIED, *PERMUTED), ("linear", "gains", "everything", "lora")),
    p.Pair("classifier-rotated", CLASSIFIED, (p.residual(p.rotated, 1.7), *PERMUTED), NO_FACTORS),
    p.Pair("classifier-widened", CLASSIFIED, (p.residual(p.widened(36)), MORE, SILENT), WIDE),
    p.Pair("two-blocks-more", CLASSIFIED, (p.residual(), p.deeper(0, 2)), ("gains",)),
    p.Pair("narrow", CLASSIFIED, (p.residual(p.widened(36)), LARGER), NO_FACTORS, narrow=True),
]

# Layer scales are new in every re-parametrisation of the residual; the MLP's width is a multiple of the model's.
DINO_BASE, CLASSES = partial(base, DINO), partial(base, DINO_CLASSIFIER)
REGISTERS, SWIGLU = partial(base, DINO_REGISTERS), partial(base, DINO_GATED)
TO_72 = p.neurons(p.with_extra(24), silent=("up",))
GATED_TO_48 = p.neurons(p.with_extra(16), silent=("gate",))
TO_VIT = *PERMUTED, p.scales_folded, p.stored_as(VIT_HEADLESS)
AS_WIDE = (p.heads(size=9),) if OLDER_DINO else ()  # of old, heads are as wide as the model: 4 x 9
ADDED = p.heads(size=9 if OLDER_DINO else 7), TO_72, p.residual(p.widened(36)), p.with_registers(DINO_REGISTERS, 3)
QUERY = {"keep": "q.weight"}  # what hides a register is in the queries, and the map sees its share of them

DINO_PAIRS = [
    p.Pair("new-scales", CLASSES, (p.residual(),)),
    p.Pair("rotated", CLASSES, (p.residual(p.rotated, 1.7), *PERMUTED), WIDE),
    p.Pair("widened", CLASSES, (p.residual(p.widened(36)), TO_72, *AS_WIDE, TURNED), WIDE),
    p.Pair("registers", REGISTERS, (p.residual(p.rotated, 1.7), *PERMUTED), WIDE),
    p.Pair("registers-added", CLASSES, ADDED, ("linear",), **QUERY),
    p.Pair("registers-removed", CLASSES, ADDED, ("linear",), narrow=True, **QUERY),
    p.Pair("swiglu", SWIGLU, (p.residual(p.rotated, 1.7), *PERMUTED), WIDE),
    p.Pair("swiglu-widened", SWIGLU, (p.residual(p.widened(36)), GATED_TO_48, LARGER), WIDE),
    p.Pair("two-blocks-more", CLASSES, (p.residual(), p.deeper(0, 2)), ("gains", "lora")),
    p.Pair("larger-images", CLASSES, (p.residual(), p.zoomed(2)), ("gains",)),
    p.Pair("no-head", DINO_BASE, (CARRIED, *PERMUTED), ("linear", "gains", "lora")),
    p.Pair("to-vit", DINO_BASE, (CARRIED, *TO_VIT), ("linear", "gains", "lora")),
    p.Pair("from-vit", DINO_BASE, (CARRIED, *TO_VIT), ("linear", "gains"), narrow=True),
    p.Pair("narrow", CLASSES, (p.residual(p.widened(36)), TO_72, *AS_WIDE), NO_FACTORS, narrow=True),
]

VISION = {"clip": CLIP_PAIRS, "open-clip": OPEN_CLIP_PAIRS, "siglip": SIGLIP_PAIRS, "dino": DINO_PAIRS}
