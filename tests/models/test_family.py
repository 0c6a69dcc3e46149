"""What a family's record says of a name."""

import pytest
from theseus_transport.models.families import FAMILIES

NAMES = {
    "{blocks}.0.norm.weight": 0,
    "{blocks}.12.mlp": 12,
    "{blocks}.1": None,  # the block itself, not what lies in it
    "{blocks}.one.norm": None,
    "{blocks}s.1.norm": None,
    "head.{blocks}.1.norm": None,
    "{blocks}." + "9" * 5000 + ".norm": None,
    "norm.weight": None,
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["llama", "clip_vision_model"])
def test_the_block_a_name_lies_in(kind, name):
    family = FAMILIES[kind]
    assert family.block_of(name.format(blocks=family.blocks)) == NAMES[name]


def test_a_dot_of_the_blocks_name_is_a_dot():
    family = FAMILIES["clip_vision_model"]
    assert family.block_of(f"{family.blocks.replace('.', 'X')}.1.norm") is None and "." in family.blocks
