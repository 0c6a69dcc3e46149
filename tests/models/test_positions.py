"""Positions: text is packed to what both models can read, longer rows and other tables are refused by name."""

import re

import pytest
import torch
from helpers import tiny_models
from helpers.broken_inputs import edited
from helpers.command import FAST, invoke, outcome_of, refused
from safetensors.torch import save_file
from theseus_transport.models.geometry import Geometry
from transformers import GPT2Config, GPT2LMHeadModel

READ = {"source": 40, "target": 24}  # positions


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("positions")
    torch.manual_seed(0)
    for side, width, heads in (("source", 24, 4), ("target", 40, 5)):
        sizes = {"n_layer": 2, "n_embd": width, "n_head": heads, "n_positions": READ[side], "n_inner": 32}
        model = tiny_models.randomised(
            GPT2LMHeadModel(GPT2Config(vocab_size=300, bos_token_id=0, eos_token_id=0, **sizes))
        )
        model.save_pretrained(root / side)
        tiny_models.tokenizer(root / side, 300)
        if side == "source":
            tiny_models.tuned(model).save_pretrained(root / "tuned")
    return root


def sides(root):
    return root / "source", root / "tuned", root / "target"


def test_text_is_packed_to_what_both_read(root, tmp_path):
    invoke("transport", *sides(root), tmp_path / "dry", *FAST, "--dry-run")
    invoke("transport", *sides(root), tmp_path / "out", *FAST)
    rows, tokens = re.search(r": (\d+) rows, (\d+) tokens", outcome_of(tmp_path / "out")["calibration"]).groups()
    assert int(tokens) == READ["target"] * int(rows) >= 128
    invoke("verify", tmp_path / "out")


@pytest.mark.parametrize("rows, said", [(41, "41 tokens, SOURCE source reads at most 40"),
                                        (25, "25 tokens, TARGET target reads at most 24")])  # fmt: skip
def test_longer_rows_are_refused(root, tmp_path, rows, said):
    save_file({"input_ids": torch.randint(0, 300, (12, rows))}, tmp_path / "ids.safetensors")
    refused(
        f"ids.safetensors: input_ids has rows of {said}; cut them to that",
        "transport", *sides(root), tmp_path / "out", "--calibration", tmp_path / "ids.safetensors",
    )  # fmt: skip
    save_file({"input_ids": torch.randint(0, 300, (12, 24))}, tmp_path / "ids.safetensors")
    invoke("transport", *sides(root), tmp_path / "out", "--calibration", tmp_path / "ids.safetensors")


@pytest.mark.parametrize("config, said", [
    ({"n_positions": 64}, r"wpe.weight is \[40, 24\], config.json asks for \[64, 24\]"),
    ({"n_positions": 0}, "max_position_embeddings is 0, expected a positive integer"),
    ({"n_positions": "40"}, "max_position_embeddings is '40'"),
])  # fmt: skip
def test_a_config_that_the_table_contradicts(root, tmp_path, config, said):
    source = edited(tmp_path / "source", root / "source", config=config)
    refused(f"SOURCE .*: {said}", "transport", source, *sides(root)[1:], tmp_path / "out")


def test_every_family_says_its_positions_in_one_way():
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 8}
    text = {"model_type": "llama", "vocab_size": 9, **sizes}
    gpt2 = {"model_type": "gpt2", "vocab_size": 9, "n_embd": 8, "n_head": 2, "n_layer": 1}
    image = {"model_type": "vit", "image_size": 8, "patch_size": 4, **sizes, "max_position_embeddings": 77}
    found = [Geometry.of(c).positions for c in (text, text | {"max_position_embeddings": 5}, gpt2, image)]
    assert found == [None, 5, 1024, None]
    assert Geometry.restored(Geometry.of(gpt2).plain()) == Geometry.of(gpt2)
