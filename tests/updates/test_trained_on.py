"""An adapter of another base than SOURCE: refused where weights say so, doubted where names do, else silent."""

import json
import shutil
from pathlib import Path

import pytest
import theseus_transport as tt
import torch
from safetensors.torch import load_file, save_file
from theseus_transport.files.checkpoint import Checkpoint
from theseus_transport.jobs.settings import Job
from theseus_transport.jobs.transport_job import Session
from theseus_transport.models.geometry import Geometry
from theseus_transport.updates.trained_on import doubt_of_base

WEIGHTS = "model.safetensors"


@pytest.fixture
def lora(models: Path, tmp_path: Path) -> Path:
    return shutil.copytree(models / "lora", tmp_path / "lora")


def recorded(lora: Path, base: object) -> Checkpoint:
    """The adapter, with this as what it says it was trained on."""
    config = json.loads((lora / "adapter_config.json").read_text())
    (lora / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
    return Checkpoint.open(lora)


def doubt(lora: Path, base: object, source: Path) -> str | None:
    opened = Checkpoint.open(source)
    return doubt_of_base(recorded(lora, base), opened, Geometry.of(opened.config))


def changed(source: Path, folder: Path, change: object) -> Path:
    """A copy of a model, every tensor passed through ``change``."""
    shutil.copytree(source, folder)
    save_file({name: change(value) for name, value in load_file(source / WEIGHTS).items()}, folder / WEIGHTS)
    return folder


@pytest.mark.parametrize(
    "base, folder",
    [
        (None, "source"), ("", "source"), (7, "source"),  # nothing is recorded
        ("/gone/source", "source"), ("./source/", "source"), ("C:\\models\\Source", "source"),  # moved since
        ("Own/Small-1B", "small-1b"), ("own/small-1b", "own--Small-1B"), ("mirror/Small-1B", "Small-1B"),
        ("own/Small-1B", "models--own--Small-1B/snapshots/0f"),
        ("unsloth/small-1b-unsloth-bnb-4bit", "Small-1B"), ("own/Small-1B-GPTQ-Int4", "Small-1B"),
    ],
    ids=str,
)  # fmt: skip
def test_one_model_under_another_name(models: Path, tmp_path: Path, lora: Path, base: object, folder: str) -> None:
    source = shutil.copytree(models / "causal" / "source", tmp_path / "at" / folder)
    assert doubt(lora, base, source) is None


def test_the_name_in_the_config_counts(models: Path, tmp_path: Path, lora: Path) -> None:
    source = shutil.copytree(models / "causal" / "source", tmp_path / "downloaded")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"_name_or_path": "own/Small-1B"}))
    assert doubt(lora, "own/small-1b", source) is None


@pytest.mark.parametrize("base", ["own/Small-1B-Instruct", "own/large-7b", "/gone/other"])
def test_another_name_is_doubted_and_both_are_named(models: Path, tmp_path: Path, lora: Path, base: str) -> None:
    source = shutil.copytree(models / "causal" / "source", tmp_path / "Small-1B")
    said = doubt(lora, base, source)
    assert said and f"was trained on {base!r}, and SOURCE is {source}: if these are two models" in said


def test_weights_at_hand_decide_whatever_the_names(models: Path, tmp_path: Path, lora: Path) -> None:
    source = models / "causal" / "source"
    copy = shutil.copytree(source, tmp_path / "renamed")
    rounded = changed(source, tmp_path / "rounded", lambda value: value.bfloat16())
    assert (
        doubt(lora, str(source), source) is doubt(lora, str(copy), source) is doubt(lora, str(rounded), source) is None
    )
    said = doubt(lora, str(models / "causal" / "tuned"), source)  # as an instruct model is of its base
    assert (
        said and str(models / "causal" / "tuned") in said and f"SOURCE {source} has other weights (cosine 0.9" in said
    )
    torch.manual_seed(0)
    for name, why in {
        "apart": "a cosine of weights of -?0.0",
        "larger": "no matrix of one shape",
        "unknown": "no matrix of one shape",
    }.items():
        other = shutil.copytree(models / "causal" / "target", tmp_path / name)
        if name == "apart":
            other = changed(source, tmp_path / "random", torch.randn_like)
        elif name == "unknown":
            (other / "config.json").write_text('{"model_type": "mamba"}')
        with pytest.raises(
            tt.InputRefused, match=f"was trained on '{other}', which has {why}.* with SOURCE {source}; give"
        ):
            doubt(lora, str(other), source)


@pytest.mark.parametrize("broken", ["no weights", "quantised", "no config", "an adapter"])
def test_a_folder_that_is_no_base_decides_nothing(models: Path, tmp_path: Path, lora: Path, broken: str) -> None:
    """Then its name does, here another one."""
    other = shutil.copytree(models / ("lora" if broken == "an adapter" else "causal/target"), tmp_path / "other")
    if broken == "no weights":
        (other / WEIGHTS).unlink()
    elif broken == "quantised":
        config = json.loads((other / "config.json").read_text())
        (other / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    elif broken == "no config":
        (other / "config.json").unlink()
    said = doubt(lora, str(other), models / "causal" / "source")
    assert said and "if these are two models" in said


def test_the_hub_cache_is_at_hand(models: Path, tmp_path: Path, lora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    kept, revision = tmp_path / "hub" / "models--own--small", "0" * 40
    shutil.copytree(models / "causal" / "source", kept / "snapshots" / revision)
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text(revision)
    assert doubt(lora, "own/small", models / "causal" / "source") is None
    with pytest.raises(
        tt.InputRefused, match="was trained on 'own/small', which has no matrix of one shape with SOURCE"
    ):
        doubt(lora, "own/small", models / "causal" / "target")


@pytest.mark.parametrize(
    "config, said",
    [({}, True), ({"target_modules": "all-linear"}, True), ({"target_modules": r".*q_proj"}, True),
     ({"layers_to_transform": [0]}, False), ({"target_modules": r".*layers\.0\..*q_proj"}, False)],
    ids=str,
)  # fmt: skip
def test_an_adapter_of_a_shallower_base(models: Path, lora: Path, config: dict, said: bool) -> None:
    """Its layers are all there: only target_modules tell that there were no others."""
    assert doubt(lora, None, models / "causal" / "source") is None
    kept = {
        name: value for name, value in load_file(lora / "adapter_model.safetensors").items() if ".layers.0." in name
    }
    save_file(kept, lora / "adapter_model.safetensors")
    before = json.loads((lora / "adapter_config.json").read_text())
    (lora / "adapter_config.json").write_text(json.dumps(before | config))
    found = doubt(lora, None, models / "causal" / "source")
    assert (found is not None) == said
    assert found is None or "up to block 0 of SOURCE's 2, and its target_modules name model.layers.1." in found


def test_the_command_refuses_before_it_works_and_keeps_its_doubts(models: Path, tmp_path: Path, lora: Path) -> None:
    torch.manual_seed(0)
    source, target = (models / "causal" / side for side in ("source", "target"))
    apart = changed(source, tmp_path / "apart", torch.randn_like)
    job = Job(str(source), str(lora), str(target), tmp_path / "out", str(models / "ids.safetensors"), tokens=64)
    recorded(lora, str(apart))
    with pytest.raises(tt.InputRefused, match="give .*apart as SOURCE"):
        Session(job)
    recorded(lora, "own/large-7b")
    assert any("was trained on 'own/large-7b'" in text for text in Session(job).run().warnings)
