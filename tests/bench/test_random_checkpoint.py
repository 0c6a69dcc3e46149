"""The script that writes random checkpoints: what it writes loads, is the same again, and differs where it is tuned."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from theseus_transport.files.checkpoint import Checkpoint
from theseus_transport.models.geometry import Geometry
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
import random_checkpoint as rc  # noqa: E402

SIZES = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, vocab_size=600)
TINY = {name: replace(geometry, num_hidden_layers=3, **SIZES) for name, geometry in rc.GEOMETRIES.items()}
PUBLIC = {  # parameters as the models' public pages count them, in millions, rounded to two digits
    "qwen2.5-0.5b": 490, "qwen2.5-1.5b": 1540, "llama-3.2-1b": 1240, "llama-3.2-3b": 3210, "llama-3.1-8b": 8030,
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLIC)
def test_a_geometry_has_the_parameters_of_the_public_model(name: str) -> None:
    count = sum(torch.Size(shape).numel() for shape in rc.parameters(rc.GEOMETRIES[name]).values())
    assert round(count / 1e7) * 10 == PUBLIC[name]


@pytest.mark.parametrize("name", ["qwen2.5-1.5b", "llama-3.2-3b", "llama-3.1-8b"])
def test_it_loads_and_runs(tmp_path: Path, name: str) -> None:
    written = rc.write_random(tmp_path / "model", TINY[name])
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype is torch.bfloat16 and written == sum(p.nbytes for p in model.parameters())
    logits = model.float()(torch.arange(64)[None]).logits
    assert logits.isfinite().all() and logits.std() > 0
    opened = Checkpoint.open(tmp_path / "model")
    geometry = Geometry.of(opened.config)
    assert geometry.depth == 3 and geometry.tied is TINY[name].tie_word_embeddings
    shards = json.loads((tmp_path / "model/model.safetensors.index.json").read_text())["weight_map"]
    for b in range(3):
        one = {file for tensor, file in shards.items() if f".layers.{b}." in tensor}
        assert len(one) == 1 and all(f".layers.{b}." in n for n, file in shards.items() if {file} == one)


def test_the_seed_decides(tmp_path: Path) -> None:
    geometry = TINY["qwen2.5-0.5b"]
    for folder, options in {"one": {}, "same": {}, "other": {"seed": 1}}.items():
        rc.write_random(tmp_path / folder, geometry, **options)
    rc.write_random(tmp_path / "short", replace(geometry, num_hidden_layers=1))
    one, same, other, short = (Checkpoint.open(tmp_path / name) for name in ("one", "same", "other", "short"))
    assert set(one) == set(same) and all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)
    assert len(short) < len(one) and all(torch.equal(one[name], short[name]) for name in short)
    assert len({one[name].double().sum().item() for name in one}) == len(one), "no two tensors alike"


def test_values_are_spread_as_they_should(tmp_path: Path) -> None:
    rc.write_random(tmp_path, TINY["qwen2.5-0.5b"], dtype=torch.float32)
    weight, gain = (Checkpoint.open(tmp_path)[name] for name in ("model.embed_tokens.weight", "model.norm.weight"))
    bound = 5 / weight.numel() ** 0.5  # five standard errors of a mean, more than those of a deviation
    assert abs(weight.mean()) < bound * rc.SPREAD and abs(weight.std() / rc.SPREAD - 1) < bound
    assert abs(gain.mean() - 1) < 5 * rc.GAINS / len(gain) ** 0.5


@pytest.mark.parametrize("only", [(), ("q_proj", "v_proj")], ids=["everything", "only"])
def test_a_tune_is_the_base_and_noise(tmp_path: Path, only: tuple[str, ...]) -> None:
    geometry = TINY["qwen2.5-0.5b"]
    rc.write_random(tmp_path / "base", geometry, dtype=torch.float32)
    rc.write_random(tmp_path / "tuned", geometry, dtype=torch.float32, tune=0.1, only=only)
    base, tuned = Checkpoint.open(tmp_path / "base"), Checkpoint.open(tmp_path / "tuned")
    for name in base:
        if only and name.split(".")[-2] not in only:
            assert torch.equal(tuned[name], base[name])
        else:
            ratio = (tuned[name] - base[name]).std() / (rc.GAINS if "norm" in name else rc.SPREAD)
            bound = 5 / (2 * base[name].numel()) ** 0.5  # five standard errors of a deviation
            assert abs(ratio / 0.1 - 1) < bound, name


def test_an_adapter_loads_into_its_base(tmp_path: Path) -> None:
    geometry = TINY["llama-3.2-1b"]
    rc.write_random(tmp_path / "base", geometry, dtype=torch.float32)
    rc.write_adapter(tmp_path / "adapter", geometry, 4, tune=0.1, only=("q_proj", "down_proj"))
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    stored, merged = Checkpoint.open(tmp_path / "base"), model.merge_and_unload().state_dict()
    for name in stored:
        change = merged[name] - stored[name]
        if name.split(".")[-2] in ("q_proj", "down_proj"):
            # B A of rank 4 varies from draw to draw by about 1 / sqrt(2 * 4 * 32): the smallest factor's values
            assert abs(change.std() / (0.1 * rc.SPREAD) - 1) < 5 / (2 * 4 * 32) ** 0.5 * 2**0.5, name
        else:
            assert not change.any(), name


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(rc.GEOMETRIES, "qwen2.5-0.5b", TINY["qwen2.5-0.5b"])
    command = ["random_checkpoint.py", str(tmp_path / "out"), "--geometry", "qwen2.5-0.5b", "--blocks", "2"]
    monkeypatch.setattr(sys, "argv", [*command, "--vocabulary", "128", "--dtype", "float16"])
    rc.main()
    opened = Checkpoint.open(tmp_path / "out")
    assert opened.config["num_hidden_layers"] == 2 and opened.shapes["model.embed_tokens.weight"] == (128, 32)
    assert set(opened.dtypes.values()) == {torch.float16}
    assert capsys.readouterr().out == f"{tmp_path / 'out'}: {opened.nbytes} bytes of tensors\n"
    monkeypatch.setattr(sys, "argv", [*command, "--only", "query"])
    with pytest.raises(SystemExit, match="no layer query; known: down_proj, embed_tokens"):
        rc.main()
