"""Folders and files that other tools leave, each with the way from there to a model's folder."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..errors import InputRefused
from .headers import inside, read_header

WEIGHTS = tuple(
    f"{stem}{end}"
    for stem in ("model.safetensors", "adapter_model.safetensors", "pytorch_model.bin", "adapter_model.bin")
    for end in ("", ".index.json")
)
SHARD = re.compile(r"((?:adapter_)?model)-(\d{5})-of-(\d{5})\.safetensors")
DIFFUSION = "diffusion models are not moved"
MLX = "an adapter of MLX; mlx_lm.fuse --model BASE --adapter-path {} --save-path fused makes a model's folder of it"
# name of a file -> what it is, and the way from there
FILES = {
    r"model_index\.json|diffusion_pytorch_model.*|pytorch_lora_weights.*": f"of a diffusion pipeline; {DIFFUSION}",
    r"weights(\.\d+)?\.npz": "a model of MLX; give the checkpoint it was converted from",
    r"adapters\.(npz|safetensors)": MLX.format("its folder"),
    r".*\.gguf": "a model for llama.cpp; give the checkpoint it was made from, or unpack it with transformers: "
    "from_pretrained(folder, gguf_file=name).save_pretrained(new)",
    r"open_clip_.*": "a model of OpenCLIP, which is moved from Python: theseus_transport.align takes the module",
    r"consolidated\..*|params\.json": "a checkpoint in its maker's own format; give the one for transformers",
    r"tf_model\.h5|flax_model.*\.msgpack": "a model of TensorFlow or Flax; load it with transformers 4 "
    "(from_tf=True, from_flax=True) and save_pretrained",
    r".*\.onnx": "an exported graph; give the checkpoint it was exported from",
    r"(pytorch|adapter)_model.*\.bin": "a pickle; give its folder, with --allow-pickle",
    r".*\.(bin|pt|pth|ckpt|pkl)": "a pickle; load it where it was made and save the model with save_pretrained",
}


def described(folder: Path, *, further: bool = True) -> str | None:
    """What a folder without weights of its own is, and what to do; None where nothing in it is known.

    Args:
        further: look into a folder that it leads to, where that holds no weights either.
    """
    names = sorted(path.name for path in folder.iterdir())
    folders = [path for path in map(folder.joinpath, names) if path.is_dir()]
    if "model_index.json" in names:
        return f"is a diffusion pipeline; {DIFFUSION}"
    checkpoints = [path for path in folders if re.fullmatch(r"checkpoint-\d+", path.name)]
    if checkpoints:
        newest = max(checkpoints, key=lambda path: (_holds_weights(path), int(path.name.partition("-")[2])))
        whole = _holds_weights(newest)
        what = None if whole or not further else described(newest, further=False)
        return f"holds checkpoints of its training; give the newest, {newest}" + (f", which {what}" if what else "")
    if found := [path for path in folders if _holds_weights(path)]:
        what = "adapters, each under its name" if all(map(_is_adapter, found)) else "models in folders of their own"
        return f"holds {what}; give {' or '.join(map(str, found[:5]))}"
    return _sharded(folder, names) or _gathered(folder, names, folders) or _of_files(folder, names)


def refuse_file(path: Path) -> None:
    """Refuse a file that is no .safetensors file, by what it is."""
    if path.suffix == ".json" and path.is_file():
        raise InputRefused(f"{path} is no .safetensors file; give its folder {path.parent}")
    for pattern, what in FILES.items():
        if path.is_file() and re.fullmatch(pattern, path.name):
            raise InputRefused(f"{path} is {what}")
    raise InputRefused(f"{path} is no .safetensors file; give a model's folder or a .safetensors file")


def refuse_names(path: Path, names: Sequence[str], *, kind: str) -> None:
    """Refuse a file whose tensors have names of another tool, or of another kind than ``checkpoint`` or ``adapter``."""
    if why := _foreign_names(names):
        raise InputRefused(f"{path} is {why}")
    factors = [name for name in names if ".lora_A." in name]
    if kind == "checkpoint" and factors:
        cure = "name it adapter_model.safetensors, beside its adapter_config.json, and give that folder"
        raise InputRefused(f"{path} holds factors of a LoRA ({factors[0]}); {cure}")


def _foreign_names(names: Iterable[str]) -> str | None:
    for name in names:
        if re.match(r"(lora|lycoris)_(unet|te\d?|transformer|prior)_|unet\.|text_encoder\.", name):
            return f"a LoRA of a diffusion model ({name}); {DIFFUSION}"
        if name.endswith((".lora_a", ".lora_b")):
            return f"{MLX.format('its folder')} ({name})"
    return None


def _holds_weights(folder: Path) -> bool:
    return any((folder / name).is_file() for name in WEIGHTS)


def _is_adapter(folder: Path) -> bool:
    return any((folder / name).is_file() for name in WEIGHTS if name.startswith("adapter"))


def _sharded(folder: Path, names: Sequence[str]) -> str | None:
    """Shards whose index is not there."""
    shards = [match for name in names if (match := SHARD.fullmatch(name))]
    if not shards:
        return None
    stem, total = shards[0][1], int(shards[0][3])
    index, count = f"{stem}.safetensors.index.json", len({match[2] for match in shards})
    if count < total:
        return f"holds {count} of {total} shards and no {index}; download it again, whole"
    line = (
        f"import json, pathlib; from safetensors import safe_open; d = pathlib.Path({json.dumps(str(folder))}); "
        f"m = {{k: f.name for f in sorted(d.glob('{stem}-*.safetensors')) for k in safe_open(f, 'pt').keys()}}; "
        f"(d / '{index}').write_text(json.dumps({{'weight_map': m}}))"
    )
    return f"holds {count} shards and no {index}; download that, or make it: python -c {shlex.quote(line)}"


def _gathered(folder: Path, names: Sequence[str], folders: Sequence[Path]) -> str | None:
    """What training on several devices leaves: every device's part in a file of its own."""
    out = shlex.quote(f"{folder}-whole")
    then = f"then copy config.json to {folder}-whole and give that"
    steps = [path.name for path in folders if re.fullmatch(r"global_step\d+", path.name)]
    if steps or "zero_to_fp32.py" in names or any(re.search(r"zero_pp_rank_|mp_rank_\d", name) for name in names):
        root = shlex.quote(str(folder if steps or "zero_to_fp32.py" in names else folder.parent))
        return (
            f"holds parts that DeepSpeed wrote, one a device; python -m deepspeed.utils.zero_to_fp32 {root} {out} "
            f"--safe_serialization gathers them, {then}"
        )
    parts = [folder] if any(name.endswith(".distcp") for name in names) else []
    parts += [path for path in folders if next(path.glob("*.distcp"), None)]
    if parts:
        model = min(parts, key=lambda path: ("optim" in path.name, path.name))
        gather = f"accelerate merge-weights {shlex.quote(str(model))} {out}"
        return f"holds parts that FSDP wrote, one a device; {gather} gathers them, {then}"
    return None


def _of_files(folder: Path, names: Sequence[str]) -> str | None:
    """What the files are by their names, or by the names of their tensors."""
    for pattern, what in FILES.items():
        if found := [name for name in names if re.fullmatch(pattern, name)]:
            return f"holds {found[0]}, {what}"
    for name in [name for name in names if name.endswith(".safetensors")]:
        try:
            if why := _foreign_names(read_header(inside(folder, name))):
                return f"holds {name}, {why}"
        except InputRefused:
            continue
    return None
