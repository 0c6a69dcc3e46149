"""Models that read the class token alone: which do, behind which block, and where that token lies."""

import pytest
import torch
import transformers as hf
from theseus_transport.activations.links import Pairs
from theseus_transport.activations.pairing_tokens import of_class_token
from theseus_transport.models.base import Base
from theseus_transport.models.geometry import Geometry
from theseus_transport.models.pair import Pair

from tests.helpers.openclip_tower import Tower

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
