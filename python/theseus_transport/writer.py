"""Writing checkpoints: planned ahead, streamed one tensor at a time, several of the same plan side by side."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open

from .checkpoint import count_nonfinite
from .errors import InputRefused, NumericalError, ResourceError
from .folder import MANIFEST, new_folder, sync_file, write_file
from .headers import DTYPES, read_header, read_json

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


def planned_bytes(tensors: Iterable[tuple[Any, ...]]) -> int:
    """Bytes that (name, shape, dtype, make) tuples take on disk, without computing any."""
    return sum(Planned(*entry).nbytes for entry in tensors)


class Output(NamedTuple):
    """A folder to write: (name, shape, dtype, make) tuples in order, and what `write_checkpoint` says of the rest."""

    folder: str | Path
    tensors: Iterable[tuple[str, Sequence[int], torch.dtype, Callable[[], torch.Tensor]]]
    files: Mapping[str, bytes | str | Path | Callable[[], str]] | None = None
    metadata: Mapping[str, Any] | Callable[[], Mapping[str, Any]] | None = None


def write_checkpoint(
    folder: str | Path,
    tensors: Iterable[tuple[str, Sequence[int], torch.dtype, Callable[[], torch.Tensor]]],
    *,
    stem: str = "model",
    shard_size: int = 5_000_000_000,
    files: Mapping[str, bytes | str | Path | Callable[[], str]] | None = None,
    metadata: Mapping[str, Any] | Callable[[], Mapping[str, Any]] | None = None,
    overwrite: bool = False,
    inputs: Sequence[Path] = (),
) -> dict[str, Any]:
    """Write (name, shape, dtype, make) tuples, in order, as the folder `from_pretrained` loads; returns the manifest.

    `make` is called once per tensor, on writing it; no more than one result is held. Shards hold at most `shard_size`
    bytes, or one tensor; an adapter (`stem="adapter_model"`) is never split, since PEFT reads one file. `files` maps
    a name (config.json, README.md, ...) to bytes, text, or a Path to copy. `metadata` (JSON, or a
    function that makes it once all tensors are written) goes to the manifest.
    The folder appears by one rename when all is on disk; after any error nothing is left, an old folder is untouched.

    Raises InputRefused and ResourceError as `check_writable`; NumericalError for a NaN or Inf; ValueError if a tensor
    is not as planned; and whatever `make` raises.
    """
    output = Output(folder, tensors, files, metadata)
    return write_checkpoints([output], stem=stem, shard_size=shard_size, overwrite=overwrite, inputs=inputs)[0]


def write_checkpoints(
    outputs: Sequence[Output],
    *,
    stem: str = "model",
    shard_size: int = 5_000_000_000,
    overwrite: bool = False,
    inputs: Sequence[Path] = (),
) -> list[dict[str, Any]]:
    """Write folders of the same tensor names, shapes and dtypes side by side, each as `write_checkpoint` does.

    A tensor is made for every folder before the next one is, so that what their `make` share is computed once.
    """
    plans = [[Planned(name, tuple(shape), dtype, make) for name, shape, dtype, make in o.tensors] for o in outputs]
    if any([t[:3] for t in plan] != [t[:3] for t in plans[0]] for plan in plans):
        raise ValueError("the folders to write side by side hold different tensors")
    shards = [_split(plan, None if stem == "adapter_model" else shard_size) for plan in plans]
    count = len(shards[0])
    names = [f"{stem}.safetensors"]
    if count > 1:
        names = [f"{stem}-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    index = f"{stem}.safetensors.index.json"
    for plan, output in zip(plans, outputs, strict=True):
        _check_plan(plan, output.files or {}, {*names, index, MANIFEST})
    total = sum(tensor.nbytes for tensor in plans[0])
    with ExitStack() as stack:
        stagings = [
            stack.enter_context(
                new_folder(o.folder, nbytes=total, metadata=o.metadata, overwrite=overwrite, inputs=inputs)
            )
            for o in outputs
        ]
        for i, name in enumerate(names):
            _write_shards([staging / name for staging in stagings], [shard[i] for shard in shards])
        for staging, output in zip(stagings, outputs, strict=True):
            files = output.files or {}
            for name in sorted(files, key=lambda name: name == "config.json"):  # what makes it a model comes late
                content = files[name]
                write_file(staging / name, content() if callable(content) else content)
            if count > 1:
                weight_map = {t.name: name for name, shard in zip(names, shards[0], strict=True) for t in shard}
                listing = {"metadata": {"total_size": total}, "weight_map": weight_map}
                write_file(staging / index, json.dumps(listing, indent=2) + "\n")
    return [read_json(Path(o.folder).expanduser() / MANIFEST) for o in outputs]


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


def _write_shards(paths: list[Path], shards: list[list[Planned]]) -> None:
    """Header first, from the plan; then each tensor at its offset. Wide dtypes lie first, so that all are aligned."""
    entries: dict[str, dict[str, Any]] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in sorted(shards[0], key=lambda tensor: -tensor.dtype.itemsize):
        span = [offset, offset + tensor.nbytes]
        entries[tensor.name] = {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
        offset += tensor.nbytes
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with ExitStack() as stack:
        files = [stack.enter_context(path.open("wb")) for path in paths]
        for file in files:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + offset)
        for same in zip(*shards, strict=True):
            for file, tensor in zip(files, same, strict=True):
                file.seek(8 + len(header) + entries[tensor.name]["data_offsets"][0])
                file.write(_bytes_of(tensor))
        for file in files:
            sync_file(file)
    for path in paths:
        if {name: record.shape for name, record in read_header(path).items()} != {t.name: t.shape for t in shards[0]}:
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
