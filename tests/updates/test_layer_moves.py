"""The small pieces of a move, directly: kept parts, fused factors, positions, scales by regression."""

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from exact.models import LLAMA, VIT, Spec, base, batches
from theseus_transport import Alignment, InputRefused, Recipe, align
from theseus_transport.models.base import Base
from theseus_transport.models.family import Slot
from theseus_transport.recipes.maps import Dense, Identity, Map
from theseus_transport.recipes.ruleset import Rule
from theseus_transport.updates.adapter import Factors
from theseus_transport.updates.available import Available
from theseus_transport.updates.fused_factors import Piece, fused
from theseus_transport.updates.vector_moves import VectorMove
from torch import Tensor

ROUNDING = {"rtol": 0, "atol": 1e-12}  # float64; values are of size 1


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# --- where a tensor is kept ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("part", range(3))
def test_a_part_of_a_stored_tensor(part: int, transposed: bool) -> None:
    whole, slot = torch.arange(24.0).view(6, 4), Slot("attn.in_proj.weight", part, 3, transposed)
    stored = whole.T.contiguous() if transposed else whole
    assert slot.shape(stored.shape) == (2, 4) and torch.equal(slot.view(stored), whole[2 * part : 2 * part + 2])
    assert slot.view(stored).untyped_storage().data_ptr() == stored.untyped_storage().data_ptr()
    assert slot.shape((6,)) == (2,) and slot.view(whole[:, 0]).tolist() == whole[2 * part : 2 * part + 2, 0].tolist()


def test_only_matrices_are_turned() -> None:
    kernel = normal(2, 3, 4, 5)
    assert Slot("conv", transposed=True).shape(kernel.shape) == kernel.shape
    assert Slot("conv", transposed=True).view(kernel) is kernel


def test_parts_of_unequal_size_are_refused() -> None:
    with pytest.raises(InputRefused, match=r"in_proj.weight has 7 output features, which 3 layers cannot share"):
        Slot("in_proj.weight", 0, 3).shape((7, 4))


# --- factors of a fused layer ----------------------------------------------------------------------------------------


def piece(spelled: str, part: int, rank: int, scaling: float, a_seed: int) -> Piece:
    """Factors of part ``part`` of three, [2, 5]."""
    factors = Factors(normal(rank, 5, seed=a_seed), normal(2, rank, seed=10 + part), scaling)
    return Piece(spelled, Slot("qkv", part, 3), rank, torch.float32, (2, 5), scaling, lambda: factors)


def product(pieces: list[Piece]) -> Tensor:
    """What the pieces mean for the weight of the fused layer, [6, 5]."""
    dense = torch.zeros(3, 2, 5, dtype=torch.float64)
    for p in pieces:
        dense[p.place.part] = p.scaling * p.compute().b @ p.compute().a
    return dense.flatten(0, 1)


@pytest.mark.parametrize(
    "pieces, rank",
    [
        ([piece("q", 0, 2, 2.0, 1), piece("v", 2, 3, 0.5, 2)], 5),
        ([piece("v", 2, 3, 0.5, 2), piece("q", 0, 2, 2.0, 1)], 5),
        ([piece("q", 0, 1, 1.0, 1), piece("k", 1, 2, 1.0, 2), piece("v", 2, 3, 1.0, 3)], 6),
        ([piece("qkv", part, 4, 3.0, 1) for part in range(3)], 4),
        ([piece("kv", 1, 4, 3.0, 1), piece("kv", 2, 4, 3.0, 1), piece("q", 0, 2, 3.0, 2)], 6),
    ],
    ids=["q-and-v", "v-and-q", "separate", "fused", "kv-and-q"],
)
def test_factors_of_a_fused_layer(pieces: list[Piece], rank: int) -> None:
    """Layers of their own add their ranks, parts of one share it; either way the product is the parts' own."""
    moved = fused(pieces)
    made = moved.compute()
    assert (moved.rank, moved.shape) == (rank, (6, 5)) and made.a.shape == (rank, 5) and made.b.shape == (6, rank)
    torch.testing.assert_close(moved.scaling * made.b @ made.a, product(pieces), **ROUNDING)


# --- positions -------------------------------------------------------------------------------------------------------


def moved_positions(source: Spec, target: Spec, name: str) -> tuple[Tensor, Tensor, VectorMove]:
    """A random change of the source's positions and the target's, through a scale of 2 and a map of its own."""
    sides = Base.of(source.build()), Base.of(target.build())
    t = normal(24, 24, seed=3)
    available = Available(vectors={name: Rule(name, "identity", "t", 1.0, 2.0)}, maps={"t": Dense(t)})
    move = VectorMove(name, available, *sides)
    delta = normal(*sides[0].shape(name))
    return 2 * delta @ t, move({name: sides[0].need(name) + delta}), move


@pytest.mark.parametrize("image", [8, 12, 4])
def test_positions_follow_the_grid(image: int) -> None:
    """From a grid of 4 x 4: bilinear, with half-pixel centres; the class token's is its own."""
    delta, found, move = moved_positions(base(VIT), base(VIT, image_size=image), "embeddings.position_embeddings")
    grid = delta[0, 1:].T.unflatten(1, (4, 4))[None]
    patches = F.interpolate(grid, image // 2, mode="bilinear", align_corners=False).flatten(2).mT
    torch.testing.assert_close(found, torch.cat([delta[:, :1], patches], 1), **ROUNDING)
    count = 1 + (image // 2) ** 2
    assert move.unfit() is None and move.note == ("" if image == 8 else f"17 positions onto {count}")


def test_what_is_no_position_must_fit() -> None:
    name = "embeddings.patch_embeddings.projection.weight"
    sides = Base.of(base(VIT).build()), Base.of(base(VIT, patch_size=4).build())
    available = Available(vectors={name: Rule(name, "identity", "identity")}, maps={"identity": Identity()})
    move = VectorMove(name, available, *sides)
    assert move.unfit() == "the source's is [24, 3, 2, 2], the target's [24, 3, 4, 4]: rows do not correspond"


# --- scales by regression --------------------------------------------------------------------------------------------

PAIRS = {
    "llama": (base(LLAMA), base(LLAMA, seed=5, width=36, num_attention_heads=6, num_key_value_heads=3)),
    "vit": (base(VIT), base(VIT, seed=5, width=36, num_attention_heads=2)),
}


@cache
def aligned(name: str, scale: str) -> Alignment:
    source, target = PAIRS[name]
    return align(source.build(), target.build(), batches(source, seed=3), recipe=Recipe("coherent", scale=scale))


def seen(name: str, spec: Spec, layer: str) -> tuple[Tensor, Tensor]:
    """What a layer reads and writes while aligning, [tokens, features]; in ViT's last block the class token alone."""
    model, found = spec.build(), []
    model.get_submodule(layer).register_forward_hook(lambda module, args, output: found.append((args[0], output)))
    with torch.no_grad():
        for batch in batches(PAIRS[name][0], seed=3):
            model(**batch)
    alone = name == "vit" and layer.removeprefix("vit.").startswith("layers.1.")
    rows = [[x[:, 0] if alone else x.flatten(0, -2) for x in side] for side in zip(*found, strict=True)]
    return torch.cat(rows[0]), torch.cat(rows[1])


def cosine(t: Map, source: Tensor, target: Tensor) -> float:
    return float((t(source) * target).sum() / (source.norm() * target.norm()))


@pytest.mark.parametrize(
    "name, layer, norm",
    [
        ("llama", "layers.1.mlp.gate_proj", "layers.1.post_attention_layernorm"),
        ("llama", "layers.0.mlp.down_proj", None),
        ("vit", "layers.1.mlp.fc1", "layers.1.layernorm_after"),
        ("vit", "layers.0.mlp.fc2", None),
    ],
)
def test_regression_scales_by_what_a_map_predicts(name: str, layer: str, norm: str | None) -> None:
    """Energies' scales times the cosine at the output, over the cosine at the input: least squares at both ends."""
    by_energy, by_fit = (aligned(name, scale) for scale in ("norm", "regression"))
    inputs, outputs = [], []
    for spec in PAIRS[name]:
        side = Base.of(spec.build())
        read, written = seen(name, spec, side.slots[f"{layer}.weight"].stored.removesuffix(".weight"))
        gain, shift = side.norm(norm, read.shape[1]) if norm else (1.0, 0.0)
        inputs.append((read - shift) / gain)
        outputs.append(written - written.mean(1, keepdim=True) if name == "vit" and norm is None else written)
    rule, before = by_fit.rules[layer], by_energy.rules[layer]
    inner, outer = cosine(by_fit.maps[rule.input], *inputs), cosine(by_fit.maps[rule.output], *outputs)
    assert 0.01 < inner < 0.99 and 0.01 < outer < 0.99  # apart from one and from zero: the test would see either end
    # transformers' RMSNorm rounds to float32, 6e-8 of each value
    assert rule.scale_in == pytest.approx(before.scale_in / inner, rel=1e-5)
    assert rule.scale_out == pytest.approx(before.scale_out * outer, rel=1e-5)
