"""Reading checkpoints and adapters: validated when opened, tensors read lazily by name."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import InputRefused, ReadFailed
from . import foreign
from .headers import DEQUANTISE, digest, file_blake2b, head, inside, read_header, read_json, refuse_unreadable
from .located import KINDS, located


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
    if not (tensor.is_floating_point() or tensor.is_complex()) or not tensor.numel():
        return 0, 0
    plain = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    # the extremes tell, NaN among them: one pass without a mask
    extremes = ((piece, torch.aminmax(piece)) for piece in plain.reshape(-1).split(1 << 22))
    pieces = [piece for piece, (low, high) in extremes if not (low.isfinite() and high.isfinite())]
    return sum(int(piece.isnan().sum()) for piece in pieces), sum(int(piece.isinf().sum()) for piece in pieces)


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Raise InputRefused, with counts, if the tensor of any shape holds NaN or Inf."""
    nans, infs = count_nonfinite(tensor)
    if nans or infs:
        raise InputRefused(
            f"{name} {list(tensor.shape)} holds {nans} NaN and {infs} Inf of {tensor.numel()} values: "
            "a damaged file, or training that diverged"
        )


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
    with refuse_unreadable():
        if known := foreign.described(folder):
            raise InputRefused(f"{folder} {known}")
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
    and `dtypes` by name; `nbytes` of all tensors; `files`, every file that was read, weights first; `bytes_read` of
    tensors since it was opened.

    Reading raises ReadFailed where a file vanished, was cut short or changed since. A read copies into memory of its
    own, holds no file open afterwards and lets other threads run.
    """

    def __init__(self, folder: Path, kind: str, weights: list[Path], index: Path | None = None) -> None:
        """Validate the weight files of `folder` (and an index over them); see `open`."""
        self.folder, self.kind = folder, kind
        present = [name for name in ("config.json", "adapter_config.json") if os.path.lexists(folder / name)]
        settings = {name: read_json(inside(folder, name)) for name in present}
        self.config, self.adapter_config = settings.get("config.json", {}), settings.get("adapter_config.json", {})
        refuse_unsupported(self.config, where=folder / "config.json")
        self._file_of: dict[str, Path] = {}
        self._start: dict[str, int] = {}  # byte in the file
        self._stamp: dict[Path, tuple[int, int]] = {}  # size, mtime in ns
        self._pickled: dict[str, torch.Tensor] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self.bytes_read, self._counting = 0, threading.Lock()
        weight_map = _weight_map(index) if index else {}
        weights = weights or sorted({inside(folder, name) for name in set(weight_map.values())})
        for path in weights:
            with refuse_unreadable():
                self._stamp[path] = _stamp(path.stat())
            pickled = _unpickle(path) if path.suffix == ".bin" else {}
            tensors: Mapping[str, Any] = pickled if path.suffix == ".bin" else read_header(path)
            foreign.refuse_names(path, [*tensors], kind=kind)
            if index:
                listed = {name for name, file in weight_map.items() if folder / file == path}
                _refuse_mismatch(path, set(tensors), listed, index)
            self._pickled |= pickled
            for name, tensor in tensors.items():
                self._file_of[name], self.shapes[name], self.dtypes[name] = path, tuple(tensor.shape), tensor.dtype
                self._start[name] = 0 if pickled else tensor.start
        if not self.shapes:
            raise InputRefused(f"{folder}: {', '.join(p.name for p in weights) or index} holds no tensor")
        self.files = (*weights, *([index] if index else []), *(folder / name for name in present))

    @classmethod
    def open(cls, reference: str | Path, *, allow_pickle: bool = False) -> Checkpoint:
        """Open a folder, a .safetensors file or a hub id; headers and indexes are validated, no tensor is read.

        Raises InputRefused, with the cure, for what is unreachable, hostile, damaged, quantised, or a pickle without
        `allow_pickle` (then torch.load with weights_only=True).
        """
        path = located(reference, allow_pickle=allow_pickle)
        if path.is_dir():
            kind, name = _weight_file(path, allow_pickle=allow_pickle)
            file = inside(path, name)
            return cls(path, kind, [], file) if name.endswith(".json") else cls(path, kind, [file])
        if path.suffix != ".safetensors" or not path.is_file():
            foreign.refuse_file(path)
        if re.search(r"-\d{5}-of-(?!00001)\d{5}\.", path.name):
            raise InputRefused(f"{path} is one shard of several; give its folder {path.parent}")
        return cls(path.parent, "adapter" if path.name.startswith("adapter") else "checkpoint", [path])

    def __getitem__(self, name: str) -> torch.Tensor:
        shape = self.shapes[name]
        return self._read(name, [(0, shape[0] if shape else 1)]).view(shape)

    def rows(self, name: str, rows: slice) -> torch.Tensor:
        """Consecutive rows of a tensor, [rows, ...]; only their bytes are read."""
        first, last, step = rows.indices(self.shapes[name][0])
        if step != 1:
            raise ValueError(f"rows of {name} in steps of {step}; only consecutive ones are read")
        return self._read(name, [(first, max(first, last))])

    def take(self, name: str, index: torch.Tensor) -> torch.Tensor:
        """The rows that `index` names (int64, ascending, each once), [len(index), ...]; neighbours in one read."""
        count, jumps = self.shapes[name][0], index.diff()
        if len(index) and (index[0] < 0 or index[-1] >= count or (jumps <= 0).any()):
            raise ValueError(f"rows {index.tolist()[:8]}... of {name} [{count}, ...]: expected ascending, each once")
        runs = index.tensor_split((jumps != 1).nonzero().flatten() + 1)
        return self._read(name, [(int(run[0]), int(run[-1]) + 1) for run in runs if len(run)])

    def _read(self, name: str, runs: Sequence[tuple[int, int]]) -> torch.Tensor:
        """Runs of rows [first, last), one after the other, in memory of their own."""
        path, shape = self._file_of[name], self.shapes[name]
        rows = torch.empty((sum(last - first for first, last in runs), *shape[1:]), dtype=self.dtypes[name])
        try:
            with path.open("rb", buffering=0) as file:
                if name in self._pickled:
                    self._check_unchanged(path, file)  # first: to touch what a mapped file lost kills the process
                    stored = self._pickled[name].detach().reshape(shape or (1,))
                    torch.cat([stored[:0], *(stored[first:last] for first, last in runs)], out=rows)
                else:
                    row = math.prod(shape[1:]) * rows.itemsize
                    spans = [(self._start[name] + first * row, (last - first) * row) for first, last in runs]
                    _fill(memoryview(rows.view(-1).view(torch.uint8).numpy()), file, spans)
                self._check_unchanged(path, file)
        except OSError as error:
            raise ReadFailed(
                f"{path}: {name!r} cannot be read any more: {error.strerror}; restore the file as it was, "
                "with its time (cp -p), then --resume goes on with an unfinished run"
            ) from error
        with self._counting:
            self.bytes_read += rows.nbytes
        return rows

    def _check_unchanged(self, path: Path, file: io.FileIO) -> None:
        now, then = _stamp(os.fstat(file.fileno())), self._stamp[path]
        if now != then:
            raise OSError(errno.ESTALE, f"the file changed, it has {now[0]} bytes and had {then[0]} when it was opened")

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

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of forward passes: float64 where any tensor is float64, else float32."""
        return torch.float64 if torch.float64 in self.dtypes.values() else torch.float32

    @refuse_unreadable()
    def header_hash(self) -> str:
        """BLAKE2b over names, sizes and headers of all files: equal for copies made elsewhere or later."""
        rows = sorted((p.name, p.stat().st_size, digest(head(p))) for p in self.files)
        return digest(json.dumps(rows).encode())


def _stamp(stat: os.stat_result) -> tuple[int, int]:
    """What tells that a file changed: size, and mtime in ns."""
    return stat.st_size, stat.st_mtime_ns


def _fill(into: memoryview, file: io.FileIO, spans: Sequence[tuple[int, int]]) -> None:
    """Fill `into` from spans (first byte, bytes) of a file; OSError says how far it got."""
    done = 0
    for first, nbytes in spans:
        end = done + nbytes
        shift = first - done
        while done < end:
            if not (count := os.preadv(file.fileno(), [into[done:end]], shift + done)):
                size = os.fstat(file.fileno()).st_size
                raise OSError(errno.EIO, f"{done} of {len(into)} bytes, then the file of now {size} bytes ended")
            done += count


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
