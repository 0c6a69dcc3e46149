"""Writing checkpoints: planned ahead, streamed one tensor at a time, and either whole under their name or absent."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from safetensors import safe_open

from .checkpoint import count_nonfinite
from .errors import InputRefused, NumericalError, ResourceError
from .headers import DTYPES, file_blake2b, inside, read_header, read_json

log = logging.getLogger(__name__)

MANIFEST = "theseus.json"
CODES = {dtype: code for code, dtype in DTYPES.items()}


class Planned(NamedTuple):
    """A tensor to write, its shape and dtype known before `make` computes it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return math.prod(self.shape) * self.dtype.itemsize


def planned_bytes(tensors: Iterable[tuple]) -> int:
    """Bytes that (name, shape, dtype, make) tuples take on disk, without computing any."""
    return sum(Planned(*entry).nbytes for entry in tensors)


def check_writable(folder: str | Path, nbytes: int, *, overwrite: bool = False, inputs: Sequence[Path] = ()) -> None:
    """Raise before any computation if `nbytes` cannot be written as `folder`.

    Raises InputRefused if the folder is or holds or lies in one of `inputs`, is not empty without `overwrite`, is a
    mount point, or holds the home or working directory; ResourceError, with numbers, if the disk has too little room.
    """
    target = Path(folder).expanduser().resolve()
    for given in (Path(path).expanduser().resolve() for path in inputs):
        if target == given or given in target.parents or target in given.parents:
            raise InputRefused(f"output {target} overlaps the input {given}; name a folder outside every input")
    if target.exists() and not target.is_dir():
        raise InputRefused(f"output {target} is a file; name a folder")
    if any(target == place or target in place.parents for place in (Path.home().resolve(), Path.cwd())):
        raise InputRefused(f"output {target} holds the home or working directory; name a folder of its own")
    if os.path.ismount(target):
        raise InputRefused(f"output {target} is a mount point and cannot be renamed into place; name a folder in it")
    if not overwrite and target.exists() and any(target.iterdir()):
        raise InputRefused(f"output {target} is not empty; name another folder, or --overwrite")
    if overwrite and target.exists() and any(target.iterdir()) and not (target / MANIFEST).exists():
        raise InputRefused(f"output {target} holds no {MANIFEST}, so it is not ours to replace; remove it first")
    nearest = next(parent for parent in target.parents if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise InputRefused(f"output {target}: {nearest} is not a folder that may be written; name another")
    free = shutil.disk_usage(nearest).free
    if free < nbytes:
        raise ResourceError(
            f"output {target} needs {nbytes} bytes, {nearest} has {free} free; free some, or go elsewhere"
        )


def write_checkpoint(
    folder: str | Path,
    tensors: Iterable[tuple[str, Sequence[int], torch.dtype, Callable[[], torch.Tensor]]],
    *,
    stem: str = "model",
    shard_size: int = 5_000_000_000,
    files: Mapping[str, bytes | str | Path | Callable[[], str]] | None = None,
    metadata: Mapping | Callable[[], Mapping] | None = None,
    overwrite: bool = False,
    inputs: Sequence[Path] = (),
) -> dict:
    """Write (name, shape, dtype, make) tuples, in order, as the folder `from_pretrained` loads; returns the manifest.

    `make` is called once per tensor, on writing it; no more than one result is held. Shards hold at most `shard_size`
    bytes, or one tensor; an adapter (`stem="adapter_model"`) is never split, since PEFT reads one file. `files` maps
    a name (config.json, README.md, ...) to bytes, text, or a Path to copy. `metadata` (JSON, or a
    function that makes it once all tensors are written) goes to the manifest.
    The folder appears by one rename when all is on disk; after any error nothing is left, an old folder is untouched.

    Raises InputRefused and ResourceError as `check_writable`; NumericalError for a NaN or Inf; ValueError if a tensor
    is not as planned; and whatever `make` raises.
    """
    plan = [Planned(name, tuple(shape), dtype, make) for name, shape, dtype, make in tensors]
    files, described = dict(files or {}), metadata if callable(metadata) else lambda: metadata or {}
    shards = _split(plan, None if stem == "adapter_model" else shard_size)
    names = [f"{stem}.safetensors"]
    if len(shards) > 1:
        names = [f"{stem}-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    _check_plan(plan, files, {*names, f"{stem}.safetensors.index.json", MANIFEST})
    json.dumps(described())  # raises TypeError now rather than after the computation
    total = sum(tensor.nbytes for tensor in plan)
    check_writable(folder, total, overwrite=overwrite, inputs=inputs)

    target = Path(folder).expanduser().resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    if leftovers := [path.name for kind in ("tmp", "old") for path in target.parent.glob(f".{target.name}.{kind}-*")]:
        log.warning("%s holds %s from an interrupted run; remove it", target.parent, ", ".join(leftovers))
    staging = target.with_name(f".{target.name}.tmp-{secrets.token_hex(4)}")
    try:
        staging.mkdir()
        for name, shard in zip(names, shards, strict=True):
            _write_shard(staging / name, shard)
        for name in sorted(files, key=lambda name: name == "config.json"):  # what makes it a model comes late
            content = files[name]
            _write_file(staging / name, content() if callable(content) else content)
        if len(shards) > 1:
            weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            _write_file(staging / f"{stem}.safetensors.index.json", json.dumps(index, indent=2) + "\n")
        written = sorted(path for path in staging.iterdir())
        manifest = {
            "files": {path.name: {"size": path.stat().st_size, "blake2b": file_blake2b(path)} for path in written},
            "metadata": dict(described()),
        }
        _write_file(staging / MANIFEST, json.dumps(manifest, indent=2) + "\n")
        _sync(staging)
        _put_in_place(staging, target, overwrite=overwrite)
    except BaseException as error:  # KeyboardInterrupt too: nothing may be left behind
        shutil.rmtree(staging, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(target.parent).free
            raise ResourceError(f"{target}: disk full, {total} bytes of tensors and {free} left: {error}") from error
        raise
    return manifest


def read_manifest(folder: str | Path) -> dict:
    """The manifest {"files": {name: {size, blake2b}}, "metadata": ...} of a folder that `write_checkpoint` wrote."""
    manifest = read_json(inside(Path(folder), MANIFEST))
    rows = manifest.get("files")
    if not isinstance(rows, dict) or not all(isinstance(row, dict) for row in rows.values()):
        raise InputRefused(f"{Path(folder) / MANIFEST} lists no files; was it edited?")
    return manifest


def verify(folder: str | Path) -> list[str]:
    """Every difference between a folder and its manifest, in words; empty when all bytes are as written."""
    folder, faults = Path(folder), []
    rows = read_manifest(folder)["files"]
    for name, row in rows.items():
        try:
            path = inside(folder, name)
        except InputRefused as error:
            faults.append(str(error))
            continue
        if (size := path.stat().st_size) != row.get("size"):
            faults.append(f"{name} has {size} bytes, the manifest says {row.get('size')}")
        elif (found := file_blake2b(path)) != row.get("blake2b"):
            faults.append(f"{name} has BLAKE2b {found}, the manifest says {row.get('blake2b')}")
    extra = sorted(path.name for path in folder.iterdir() if path.name not in {*rows, MANIFEST})
    return faults + [f"{name} is not in the manifest" for name in extra]


def _split(plan: list[Planned], shard_size: int | None) -> list[list[Planned]]:
    """Consecutive shards of at most `shard_size` bytes, or a single larger tensor."""
    shards: list[list[Planned]] = [[]]
    filled = 0
    for tensor in plan:
        if shards[-1] and shard_size is not None and filled + tensor.nbytes > shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    return shards


def _check_plan(plan: list[Planned], files: Mapping[str, object], reserved: set[str]) -> None:
    if not plan:
        raise ValueError("no tensor to write")
    seen: set[str] = set()
    for tensor in plan:
        if tensor.name in seen or tensor.name == "__metadata__":
            raise ValueError(f"tensor name {tensor.name!r} is planned twice or reserved")
        if tensor.dtype not in CODES:
            raise ValueError(f"{tensor.name}: safetensors files of this writer hold no {tensor.dtype}")
        seen.add(tensor.name)
    for name, content in files.items():
        if name in reserved or Path(name).name != name or name in ("", ".", ".."):
            raise ValueError(f"extra file {name!r} must be a plain name other than {', '.join(sorted(reserved))}")
        if isinstance(content, Path) and not content.is_file():
            raise InputRefused(f"extra file {name!r}: {content} is missing or not a regular file")


def _write_shard(path: Path, shard: list[Planned]) -> None:
    """Header first, from the plan; then each tensor at its offset. Wide dtypes lie first, so that all are aligned."""
    entries: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in sorted(shard, key=lambda tensor: -tensor.dtype.itemsize):
        span = [offset, offset + tensor.nbytes]
        entries[tensor.name] = {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
        offset += tensor.nbytes
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + offset)
        for tensor in shard:
            file.seek(8 + len(header) + entries[tensor.name]["data_offsets"][0])
            file.write(_bytes_of(tensor))
        _sync_file(file)
    if {name: record.shape for name, record in read_header(path).items()} != {t.name: t.shape for t in shard}:
        raise ResourceError(f"{path} does not read back as it was written; is the disk failing?")
    with safe_open(path, framework="pt"):  # the library's own opinion
        pass


def _bytes_of(planned: Planned) -> memoryview:
    tensor = planned.make()
    if tuple(tensor.shape) != planned.shape or tensor.dtype != planned.dtype:
        raise ValueError(
            f"{planned.name} came out as {list(tensor.shape)} {tensor.dtype}, "
            f"planned were {list(planned.shape)} {planned.dtype}"
        )
    nans, infs = count_nonfinite(tensor)
    if nans or infs:
        raise NumericalError(
            f"{planned.name} {list(planned.shape)} came out with {nans} NaN and {infs} Inf in {planned.dtype}; "
            "nothing was written; a smaller --alpha or a wider dtype avoids overflow"
        )
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    return memoryview(plain.reshape(-1).view(torch.uint8).numpy())


def _write_file(path: Path, content: bytes | str | Path) -> None:
    data = content.read_bytes() if isinstance(content, Path) else content
    with path.open("wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        _sync_file(file)


def _sync_file(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put_in_place(staging: Path, target: Path, *, overwrite: bool) -> None:
    """Rename; an old folder goes aside first, comes back if that fails, and is removed at the end."""
    aside = target.with_name(f".{target.name}.old-{secrets.token_hex(4)}")
    try:
        if overwrite and target.exists():
            os.rename(target, aside)
        os.rename(staging, target)
    except BaseException:
        if aside.exists() and not target.exists():
            os.rename(aside, target)
        raise
    _sync(target.parent)
    shutil.rmtree(aside, ignore_errors=True)
    if aside.exists():
        log.warning("%s is written; the folder it replaced could not be removed: %s", target, aside)
