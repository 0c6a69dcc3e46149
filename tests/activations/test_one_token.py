"""Models that read the class token alone: which do, behind which block, where that token lies, what is seen of it."""

import pytest
import torch
import transformers as hf
from helpers.openclip_tower import Tower
from theseus_transport import Recipe
from theseus_transport.activations.capture import capture
from theseus_transport.activations.links import Pairs
from theseus_transport.activations.pairing_tokens import of_class_token
from theseus_transport.models.base import Base
from theseus_transport.models.geometry import Geometry
from theseus_transport.models.pair import Pair
from theseus_transport.recipes.coherent import Coherent
from theseus_transport.recipes.paper import Paper

SIZES = dict(
    hidden_size=16, num_attention_heads=2, intermediate_size=32, num_hidden_layers=2, image_size=8, patch_size=4
)
DINO = {**SIZES, "mlp_ratio": 2}


def clip(cls):
    return cls(hf.CLIPVisionConfig(**SIZES, projection_dim=8))


READ_ONE = {
    "vit": lambda: hf.ViTForImageClassification(hf.ViTConfig(**SIZES)),
    "clip": lambda: clip(hf.CLIPVisionModelWithProjection),
    "open-clip": lambda: Tower(width=16, image=16),
}
READ_ALL = {
    "vit without its classifier": lambda: hf.ViTModel(hf.ViTConfig(**SIZES)),
    "clip without its projection": lambda: clip(hf.CLIPVisionModel),
    "clip under a classifier of patches": lambda: hf.CLIPForImageClassification(hf.CLIPConfig(vision_config=SIZES)),
    "siglip": lambda: hf.SiglipForImageClassification(hf.SiglipConfig(vision_config=SIZES)),
    "dinov2": lambda: hf.Dinov2ForImageClassification(hf.Dinov2Config(**DINO)),
}


@pytest.mark.parametrize("name", READ_ONE)
def test_a_head_that_reads_the_class_token_alone_is_known_by_its_tensor(name):
    model = READ_ONE[name]()
    geometry = Geometry.of(model)
    assert geometry.one_token
    assert Geometry.restored(geometry.plain()) == geometry
    if hasattr(model, "config"):
        assert Base.of(model.state_dict(), config=model.config).geometry.one_token
        assert not Geometry.of(model.config).one_token


@pytest.mark.parametrize("name", READ_ALL)
def test_all_rows_matter_without_such_a_head(name):
    assert not Geometry.of(READ_ALL[name]()).one_token


def test_a_tower_that_averages_its_patches_reads_all_rows():
    tower = READ_ONE["open-clip"]()
    tower.pool_type = "avg"
    assert not Geometry.of(tower).one_token


def test_one_token_is_read_only_where_both_last_blocks_pair():
    one = Geometry.of(READ_ONE["vit"]())
    every = Geometry.of(READ_ALL["vit without its classifier"]())
    assert [Pairs(one, one, [0, 1]).reads_one_token(b) for b in (0, 1)] == [False, True]
    for source, target, blocks in (
        (one, one, [0, 0]),
        (one, one, [1, None]),
        (one, every, [0, 1]),
        (every, one, [0, 1]),
    ):
        assert not any(Pairs(source, target, blocks).reads_one_token(b) for b in (0, 1))


def test_the_class_token_is_the_first_of_every_image():
    """Of grids of 2 x 2 and 3 x 3 patches."""
    sizes = (8, 12)
    geometries = Pair(*(Geometry.of(hf.ViTConfig(**SIZES | {"image_size": size})) for size in sizes))
    own, other = of_class_token(geometries, 3)
    for mixing, length in ((own, 5), (other, 10)):
        rows = mixing(torch.arange(3 * length)[:, None])
        assert rows.flatten().tolist() == [0, length, 2 * length]


# --- what is seen of that token alone -------------------------------------------------------------------------------

PIXELS = {size: torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(size)) for size in (8, 12)}


def towers(kind):
    """Source and target of unlike widths and patch grids, both with their heads."""
    sizes = (SIZES, SIZES | {"hidden_size": 24, "intermediate_size": 40, "image_size": 12})
    torch.manual_seed(0)
    if kind == "vit":
        return [hf.ViTForImageClassification(hf.ViTConfig(**size)).double().eval() for size in sizes]
    configs = (hf.CLIPVisionConfig(**size, projection_dim=8) for size in sizes)
    return [hf.CLIPVisionModelWithProjection(config).double().eval() for config in configs]


def shown(model, names):
    """What modules read and give in one forward pass, by name: (input, output), each [images, tokens, width]."""
    found, handles = {}, []
    for name in names:
        keep = lambda _, args, result, name=name: found.__setitem__(name, (args[0], result))  # noqa: E731
        handles.append(model.get_submodule(name).register_forward_hook(keep))
    with torch.no_grad():
        model(pixel_values=PIXELS[model.config.image_size])
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("kind", ["vit", "clip"])
def test_the_last_block_is_compared_by_its_class_token_and_its_keys_by_all(kind):
    """Beside all rows, which stay as they were: three images are three rows of context, MLP, middle and final."""
    models = towers(kind)
    geometries = Pair(*map(Geometry.of, models))
    pairs = Pairs.by_position(*geometries)
    with capture(*models, pairs) as seen:
        seen.run(*({"pixel_values": PIXELS[model.config.image_size]} for model in models))
    family, inside = geometries.target.family, f"{geometries.target.family.prefix}."
    last = {
        part: inside + geometries.target.block(1, getattr(family, part)) for part in ("output", "mlp_norm", "contract")
    }
    last |= {"expand": inside + geometries.target.block(1, family.expand[0])}
    sides = [shown(model, [*last.values(), inside + family.final_norm]) for model in models]
    reads = {"1.context": ("output", 0), "1.mlp": ("mlp_norm", 1), "1.middle": ("contract", 0)}
    assert pairs.class_rows.keys() == {f"{name}.class" for name in (*reads, "final")}
    for name, (part, k) in reads.items():
        own, other = (side[last[part]][k][:, 0] for side in sides)
        found = seen.moments[f"{name}.class"]
        torch.testing.assert_close(found.cross, own.T @ other)
        assert found.count == 3 and seen.moments[name].count == 3 * 10
    own, other = (side[inside + family.final_norm][1] for side in sides)
    first = (lambda x: x[:, 0]) if own.dim() == 3 else (lambda x: x)  # CLIP pools in front of its norm
    torch.testing.assert_close(seen.moments["final.class"].cross, first(own).T @ first(other))
    for part in ("output", "expand", "contract"):
        energy = seen.energies[last[part].removeprefix(inside)]
        for side, found in zip(sides, (energy.source, energy.target), strict=True):
            torch.testing.assert_close(found, side[last[part]][1][:, 0].square().sum(0))
    for role in ("query", "key", "value"):
        layer = geometries.target.block(1, getattr(family, role))
        whole = shown(models[1], [inside + layer])[inside + layer][1]
        torch.testing.assert_close(seen.energies[layer].target, whole.square().sum((0, 1)))


def test_rows_held_out_are_of_the_class_token_where_it_alone_is_read():
    models = towers("vit")
    with capture(*models, Pairs.by_position(*map(Geometry.of, models))) as seen:
        seen.kept = {}
        seen.run(*({"pixel_values": PIXELS[model.config.image_size]} for model in models))
    assert [tuple(rows.shape) for rows in seen.kept["1.middle.class"]] == [(3, 32), (3, 40)]
    assert [tuple(rows.shape) for rows in seen.kept["1.middle"]] == [(30, 32), (30, 40)]


def test_recipes_of_all_rows_want_no_others():
    bases = [Base.of(model) for model in towers("vit")]
    pairs = Pairs.by_position(*(base.geometry for base in bases))
    for recipe, wants in ((Paper, False), (Coherent, True)):
        solver = recipe(*bases, pairs.blocks, Recipe(recipe.__name__.lower()))
        assert recipe.reads_class_rows is wants and (pairs.class_rows.keys() <= solver.every) is wants
