"""Reading checkpoints and adapters: validated when opened, tensors read lazily by name."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .errors import InputRefused
from .headers import DEQUANTISE, digest, file_blake2b, head, inside, read_header, read_json, refuse_unreadable

KINDS = {"checkpoint": "model", "adapter": "adapter_model"}  # kind -> stem of its weight files


def refuse_unsupported(config: Mapping[str, Any], *, where: object = "config.json") -> None:
    """Refuse a quantised checkpoint (GPTQ, AWQ, bitsandbytes, fp8, ...) by the name its config gives."""
    for part in (config, *(value for value in config.values() if isinstance(value, Mapping))):
        quantised = part.get("quantization_config") or part.get("compression_config")
        if quantised:
            named = quantised if isinstance(quantised, Mapping) else {"quant_method": quantised}
            loads = [key for key, value in named.items() if key.startswith("load_in_") and value]
            method = named.get("quant_method") or ", ".join(loads) or "method not named"
            raise InputRefused(f"{where}: quantised ({str(method)[:100]}); {DEQUANTISE}")


def count_nonfinite(tensor: torch.Tensor) -> tuple[int, int]:
    """(number of NaN, number of Inf), piecewise so that no mask of the whole tensor is made."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return 0, 0
    pieces = [piece for piece in tensor.reshape(-1).split(1 << 22) if not piece.isfinite().all()]
    return sum(int(piece.isnan().sum()) for piece in pieces), sum(int(piece.isinf().sum()) for piece in pieces)


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Raise InputRefused, with counts, if the tensor of any shape holds NaN or Inf."""
    nans, infs = count_nonfinite(tensor)
    if nans or infs:
        raise InputRefused(
            f"{name} {list(tensor.shape)} holds {nans} NaN and {infs} Inf of {tensor.numel()} values: "
            "a damaged file, or training that diverged"
        )


def _resolve(reference: str | Path, *, allow_pickle: bool, revision: str | None) -> Path:
    path = Path(reference).expanduser()
    if os.path.exists(path):  # unlike Path.exists it answers False to any impossible name
        if revision is not None:
            raise InputRefused(f"{path} is local, revision {revision!r} has no meaning there; leave it out")
        return path
    unreachable = (
        f"{str(reference)!r} is neither a folder, nor a .safetensors file, nor a hub id within reach ({{}}); "
        "check the path, or download the model first and give its folder"
    )
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", str(reference)):
        raise InputRefused(unreachable.format("no such path, and hub ids read owner/name"))
    from huggingface_hub import snapshot_download  # imported late: local models need no hub client

    suffixes = ("safetensors", "bin") if allow_pickle else ("safetensors",)
    weights = [f"{stem}*.{suffix}" for stem in (*KINDS.values(), "pytorch_model") for suffix in suffixes]
    patterns = [*weights, "*.json", "tokenizer*", "*.model", "vocab.txt", "merges.txt"]
    try:
        return Path(
            snapshot_download(str(reference), revision=revision, allow_patterns=patterns, ignore_patterns="*/*")
        )
    except Exception as error:  # the hub client raises errors of several libraries; each means: not within reach
        raise InputRefused(unreachable.format(f"{type(error).__name__}: {str(error).splitlines()[0]}")) from error


def _weight_file(folder: Path, *, allow_pickle: bool) -> tuple[str, str]:
    """(kind, name of its single file or index); a single file goes first, as in from_pretrained."""
    pickles = {"checkpoint": "pytorch_model", "adapter": "adapter_model"}
    for stems, suffix in ((KINDS, "safetensors"), (pickles, "bin")):
        names = [(kind, f"{stem}.{suffix}{end}") for kind, stem in stems.items() for end in ("", ".index.json")]
        found = [(kind, name) for kind, name in names if os.path.lexists(folder / name)]
        if len({kind for kind, _ in found}) > 1:
            raise InputRefused(f"{folder} holds a model and an adapter ({found[0][1]}, {found[-1][1]}); give the file")
        if found and suffix == "bin" and not allow_pickle:
            raise InputRefused(
                f"{folder} holds only {found[0][1]}, a pickle; convert it to safetensors, or --allow-pickle"
            )
        if found:
            return found[0]
    others = sorted(path.name for path in folder.glob("*.safetensors"))[:5]
    raise InputRefused(
        f"{folder} holds no model.safetensors, model.safetensors.index.json or adapter_model.safetensors"
        + (f"; it holds {', '.join(others)}: give one of these files" if others else "; is it a model's folder?")
    )


def _unpickle(path: Path) -> dict[str, torch.Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever a broken or hostile pickle provokes
        raise InputRefused(f"{path} is no plain pickle of tensors: {error}") from error
    if not isinstance(state, Mapping) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
    ):
        raise InputRefused(f"{path} holds more than a flat name -> tensor table; save model.state_dict() alone")
    return dict(state)


class Checkpoint(Mapping[str, torch.Tensor]):
    """A checkpoint or adapter as a read-only Mapping, name -> CPU tensor, read from disk at each access, never cached.

    Attributes: `folder`; `kind`, "checkpoint" or "adapter"; `config` and `adapter_config`, {} where absent; `shapes`
    and `dtypes` by name; `nbytes` of all tensors; `files`, every file that was read, weights first.
    """

    def __init__(self, folder: Path, kind: str, weights: list[Path], index: Path | None = None) -> None:
        """Validate the weight files of `folder` (and an index over them); see `open`."""
        self.folder, self.kind = folder, kind
        present = [name for name in ("config.json", "adapter_config.json") if os.path.lexists(folder / name)]
        settings = {name: read_json(inside(folder, name)) for name in present}
        self.config, self.adapter_config = settings.get("config.json", {}), settings.get("adapter_config.json", {})
        refuse_unsupported(self.config, where=folder / "config.json")
        self._file_of: dict[str, Path] = {}
        self._pickled: dict[str, torch.Tensor] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        weight_map = _weight_map(index) if index else {}
        weights = weights or sorted({inside(folder, name) for name in set(weight_map.values())})
        for path in weights:
            pickled = _unpickle(path) if path.suffix == ".bin" else {}
            tensors: Mapping[str, Any] = pickled if path.suffix == ".bin" else read_header(path)
            if index:
                listed = {name for name, file in weight_map.items() if folder / file == path}
                _refuse_mismatch(path, set(tensors), listed, index)
            self._pickled |= pickled
            for name, tensor in tensors.items():
                self._file_of[name], self.shapes[name], self.dtypes[name] = path, tuple(tensor.shape), tensor.dtype
        if not self.shapes:
            raise InputRefused(f"{folder}: {', '.join(p.name for p in weights) or index} holds no tensor")
        self.files = (*weights, *([index] if index else []), *(folder / name for name in present))

    @classmethod
    def open(cls, reference: str | Path, *, allow_pickle: bool = False, revision: str | None = None) -> Checkpoint:
        """Open a folder, a .safetensors file or a hub id; headers and indexes are validated, no tensor is read.

        Raises InputRefused, with the cure, for what is unreachable, hostile, damaged, quantised, or a pickle without
        `allow_pickle` (then torch.load with weights_only=True).
        """
        path = _resolve(reference, allow_pickle=allow_pickle, revision=revision)
        if path.is_dir():
            kind, name = _weight_file(path, allow_pickle=allow_pickle)
            file = inside(path, name)
            return cls(path, kind, [], file) if name.endswith(".json") else cls(path, kind, [file])
        if path.suffix != ".safetensors" or not path.is_file():
            raise InputRefused(f"{path} is no .safetensors file; give a model's folder or a .safetensors file")
        if re.search(r"-\d{5}-of-(?!00001)\d{5}\.", path.name):
            raise InputRefused(f"{path} is one shard of several; give its folder {path.parent}")
        return cls(path.parent, "adapter" if path.name.startswith("adapter") else "checkpoint", [path])

    def __getitem__(self, name: str) -> torch.Tensor:
        path = self._file_of[name]
        if name in self._pickled:
            return self._pickled[name].clone()
        try:
            with safe_open(path, framework="pt") as file:
                tensor: torch.Tensor = file.get_tensor(name)
                return tensor
        except (SafetensorError, OSError, RuntimeError, ValueError) as error:
            raise InputRefused(f"{path}: cannot read {name!r} any more: {error}; did the file change?") from error

    def __contains__(self, name: object) -> bool:
        return name in self._file_of

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.folder)!r}, {self.kind}, {len(self)} tensors, {self.nbytes} bytes)"

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(math.prod(shape) * self.dtypes[name].itemsize for name, shape in self.shapes.items())

    @refuse_unreadable()
    def fingerprint(self, *, full: bool = False) -> dict[str, Any]:
        """{"files": {name: {size, mtime_ns, header_blake2b}}} as on disk now; `full` adds blake2b of whole files."""
        rows = {}
        for path in self.files:
            stat = path.stat()
            row = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "header_blake2b": digest(head(path))}
            rows[path.name] = row | ({"blake2b": file_blake2b(path)} if full else {})
        return {"files": rows}

    @refuse_unreadable()
    def header_hash(self) -> str:
        """BLAKE2b over names, sizes and headers of all files: equal for copies made elsewhere or later."""
        rows = sorted((p.name, p.stat().st_size, digest(head(p))) for p in self.files)
        return digest(json.dumps(rows).encode())


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise InputRefused(f"{index} has no weight_map of tensor name -> file name")
    suffix = ".bin" if index.name.endswith(".bin.index.json") else ".safetensors"
    if wrong := [file for file in weight_map.values() if not file.endswith(suffix)]:
        raise InputRefused(f"{index} names {wrong[0]!r}, expected {suffix} files")
    return weight_map


def _refuse_mismatch(path: Path, held: set[str], listed: set[str], index: Path) -> None:
    if missing := sorted(listed - held):
        raise InputRefused(f"{index} places {missing[0]!r} ({len(missing)} in all) in {path.name}, which lacks it")
    if extra := sorted(held - listed):
        raise InputRefused(f"{path} holds {extra[0]!r} ({len(extra)} in all), which {index.name} does not place there")
