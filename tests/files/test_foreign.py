"""Folders and files that other tools leave: each is named, and the way that a refusal names leads to a model."""

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch
import torch.distributed.checkpoint as distributed
from accelerate.commands.merge import merge_command, merge_command_parser
from safetensors.torch import load_file, save_file
from theseus_transport import InputRefused
from theseus_transport.files.checkpoint import Checkpoint
from theseus_transport.models.geometry import Geometry

STATE = {"model.a.weight": torch.arange(6.0).view(2, 3), "model.b.weight": torch.ones(4)}


def model(folder: Path, stem: str = "model") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(STATE, folder / f"{stem}.safetensors", {"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def lora(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_"
    save_file(
        {f"{name}A.weight": torch.ones(2, 3), f"{name}B.weight": torch.ones(4, 2)}, folder / "adapter_model.safetensors"
    )
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')
    return folder


def refused(place: Path) -> str:
    with pytest.raises(InputRefused) as error:
        Checkpoint.open(place)
    assert str(place) in str(error.value)
    return str(error.value)


# --- folders of folders ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [model, lora])
def test_of_a_trainer_the_newest_checkpoint(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    for step in (500, 1500, 1000):
        make(tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-2000").mkdir()  # killed while it wrote
    (tmp_path / "runs").mkdir()
    told = refused(tmp_path)
    assert "holds checkpoints of its training; give the newest, " in told
    assert Checkpoint.open(told.rpartition(" ")[2]).folder == tmp_path / "checkpoint-1500"


def test_a_checkpoint_in_parts_is_followed_one_step(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-10" / "global_step10").mkdir(parents=True)
    (tmp_path / "checkpoint-10" / "zero_to_fp32.py").touch()
    assert f"{tmp_path}/checkpoint-10, which holds parts that DeepSpeed wrote" in refused(tmp_path)
    (tmp_path / "loop").mkdir()
    (tmp_path / "loop" / "checkpoint-1").symlink_to(tmp_path / "loop")
    assert "give the newest, " in refused(tmp_path / "loop")


def test_of_named_adapters_each_is_named(tmp_path: Path) -> None:
    lora(tmp_path / "sft")
    told = refused(tmp_path)
    assert told == f"{tmp_path} holds adapters, each under its name; give {tmp_path / 'sft'}"
    lora(tmp_path / "dpo")
    assert refused(tmp_path).endswith(f"give {tmp_path / 'dpo'} or {tmp_path / 'sft'}")
    model(tmp_path / "final")
    assert "models in folders of their own" in refused(tmp_path)


def test_adapters_beside_the_default_one_are_no_matter(tmp_path: Path) -> None:
    lora(lora(tmp_path) / "sft")
    assert Checkpoint.open(tmp_path).kind == "adapter"


# --- parts -----------------------------------------------------------------------------------------------------------


def shards(folder: Path, stem: str) -> None:
    for i, (name, value) in enumerate(STATE.items(), 1):
        save_file({name: value}, folder / f"{stem}-0000{i}-of-00002.safetensors", {"format": "pt"})


@pytest.mark.parametrize("stem", ["model", "adapter_model"])
def test_shards_without_an_index(tmp_path: Path, stem: str) -> None:
    folder = tmp_path / "it's"
    folder.mkdir()
    shards(folder, stem)
    told = refused(folder)
    assert f"holds 2 shards and no {stem}.safetensors.index.json; download that, or make it: " in told
    [code] = shlex.split(told.partition("python -c ")[2])
    exec(code, {})
    assert {name: opened.shape for name, opened in Checkpoint.open(folder).items()} == {
        n: v.shape for n, v in STATE.items()
    }
    (folder / f"{stem}.safetensors.index.json").unlink()
    (folder / f"{stem}-00001-of-00002.safetensors").unlink()
    assert "holds 1 of 2 shards and no" in refused(folder) and "download it again, whole" in refused(folder)


@pytest.mark.parametrize("inside", ["pytorch_model_fsdp_0", ""])
def test_what_fsdp_wrote_is_gathered(tmp_path: Path, inside: str) -> None:
    folder = tmp_path / "out"
    distributed.save({"model": STATE}, checkpoint_id=str(folder / inside), no_dist=True)
    (folder / "optimizer_0").mkdir()
    shutil.copy(next((folder / inside).glob("*.distcp")), folder / "optimizer_0" / "__0_0.distcp")
    told = refused(folder)
    assert "holds parts that FSDP wrote, one a device; " in told
    command = shlex.split(re.search("; (accelerate merge-weights .*) gathers them", told)[1])  # type: ignore[index]
    assert Path(command[-2]) == folder / inside
    merge_command(merge_command_parser().parse_args(command[2:]))
    assert [*load_file(Path(command[-1]) / "model.safetensors")] == [*STATE]
    assert f"then copy config.json to {command[-1]} and give that" in told


@pytest.mark.parametrize("left", ["global_step10/", "zero_to_fp32.py", "mp_rank_00_model_states.pt"])
def test_what_deepspeed_wrote(tmp_path: Path, left: str) -> None:
    """The script itself is not run here: DeepSpeed is none of the test's libraries."""
    place = tmp_path / "run" / left
    place.mkdir(parents=True) if left.endswith("/") else (tmp_path / "run").mkdir() or place.touch()
    root = tmp_path if left.startswith("mp_rank") else tmp_path / "run"
    assert f"python -m deepspeed.utils.zero_to_fp32 {root} {tmp_path}/run-whole --safe_serialization" in refused(
        tmp_path / "run"
    )


# --- other formats ---------------------------------------------------------------------------------------------------

FILES = {
    "q4.gguf": "a model for llama.cpp; give the checkpoint it was made from",
    "weights.npz": "a model of MLX; give the checkpoint it was converted from",
    "weights.00.npz": "a model of MLX",
    "adapters.npz": "an adapter of MLX; mlx_lm.fuse --model BASE --adapter-path",
    "diffusion_pytorch_model.bin": "of a diffusion pipeline; diffusion models are not moved",
    "open_clip_pytorch_model.bin": "a model of OpenCLIP, which is moved from Python",
    "consolidated.00.pth": "a checkpoint in its maker's own format; give the one for transformers",
    "tf_model.h5": "a model of TensorFlow or Flax; load it with transformers 4",
    "flax_model.msgpack": "a model of TensorFlow or Flax",
    "model.onnx": "an exported graph",
    "last.ckpt": "a pickle; load it where it was made",
}


@pytest.mark.parametrize("name", FILES)
def test_other_formats_by_their_files(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert f"{tmp_path} holds {name}, {FILES[name]}" in refused(tmp_path)
    assert f"{tmp_path / name} is {FILES[name]}" in refused(tmp_path / name)


def test_a_pipeline_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    model(tmp_path / "text_encoder")
    assert refused(tmp_path) == f"{tmp_path} is a diffusion pipeline; diffusion models are not moved"


@pytest.mark.parametrize(
    "file, name, what",
    [
        ("style.safetensors", "lora_unet_down_blocks_0.lora_down.weight", "a LoRA of a diffusion model"),
        ("style.safetensors", "lora_te1_text_model.lora_up.weight", "a LoRA of a diffusion model"),
        ("style.safetensors", "unet.down_blocks.0.attn.to_q.lora_A.weight", "a LoRA of a diffusion model"),
        ("adapters.safetensors", "model.layers.0.self_attn.q_proj.lora_a", "an adapter of MLX; mlx_lm.fuse"),
    ],
)
def test_other_formats_by_their_tensors(tmp_path: Path, file: str, name: str, what: str) -> None:
    save_file({name: torch.ones(2, 2)}, tmp_path / file)
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"fine_tune_type": "lora", "lora_parameters": {"rank": 8}})
    )
    assert f"{tmp_path} holds {file}, {what}" in refused(tmp_path)
    assert f"{tmp_path / file} is {what}" in refused(tmp_path / file)
    (tmp_path / file).rename(tmp_path / "adapter_model.safetensors")
    assert f"adapter_model.safetensors is {what}" in refused(tmp_path)


def test_factors_under_a_models_name(tmp_path: Path) -> None:
    (lora(tmp_path) / "adapter_model.safetensors").rename(tmp_path / "model.safetensors")
    told = refused(tmp_path)
    assert (
        "holds factors of a LoRA (base_model.model.model.layers.0.mlp.up_proj.lora_A.weight); name it adapter_" in told
    )
    (tmp_path / "model.safetensors").rename(tmp_path / "adapter_model.safetensors")
    assert Checkpoint.open(tmp_path).kind == "adapter"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_a_file_of_a_folder_is_sent_to_its_folder(tmp_path: Path, name: str) -> None:
    model(tmp_path)
    (tmp_path / name).write_text("{}")
    assert refused(tmp_path / name).endswith(f"give its folder {tmp_path}")


def test_a_pickle_of_a_folder_is_sent_to_its_folder(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "pytorch_model.bin")
    assert "a pickle; give its folder, with --allow-pickle" in refused(tmp_path / "pytorch_model.bin")
    assert [*Checkpoint.open(tmp_path, allow_pickle=True)] == [*STATE]


def test_what_is_not_known_is_listed(tmp_path: Path) -> None:
    numpy.savez(tmp_path / "notes.npz", a=numpy.ones(1))
    assert "is it a model's folder?" in refused(tmp_path)
    save_file(STATE, tmp_path / "weights.safetensors")
    (tmp_path / "damaged.safetensors").write_bytes(b"x")
    (tmp_path / "elsewhere.safetensors").symlink_to("/etc/passwd")
    assert "it holds damaged.safetensors, elsewhere.safetensors, weights.safetensors: give one of" in refused(tmp_path)


# --- other families --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config, why",
    [
        (
            {"model_type": "phi3"},
            "model_type is 'phi3'; supported families are .*llama.*register, from Python, shown in",
        ),
        ({"model_type": None}, "model_type is None; supported families are"),
        ({"model_type": ["llama"]}, r"model_type is \['llama'\]; supported families are"),
        (
            {"model_type": "gemma2"},
            "'gemma2', which normalises behind the residual sum .*; supported families are [^;]*$",
        ),
        ({"model_type": "mamba"}, "'mamba', which has blocks without attention; supported families are [^;]*$"),
        ({"model_type": "granitemoehybrid"}, "which is a mixture of experts; supported families are [^;]*$"),
        ({"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.30"}, "diffusion models are not moved"),
    ],
    ids=str,
)
def test_families_that_are_not_supported(config: dict, why: str) -> None:
    with pytest.raises(InputRefused, match=why):
        Geometry.of(config)
