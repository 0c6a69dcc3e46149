"""Writing checkpoints: planned ahead, streamed one tensor at a time, several of the same plan side by side."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open

from ..errors import InputRefused, NumericalError, ResourceError
from .checkpoint import count_nonfinite
from .headers import DTYPES, read_header, read_json, real
from .result_folder import MANIFEST, new_folder, write_file

Files = Mapping[str, bytes | str | Path]
PIECE = 1 << 22  # bytes copied at once
CODES = {dtype: code for code, dtype in DTYPES.items()}


class Planned(NamedTuple):
    """A tensor to write, its shape and dtype known before `make` computes it.

    Attributes:
        make: the tensor for None, or the rows it is asked for.
        tiles: slices of rows, in order and together all of them, made and written one by one; empty: in one piece.
        needs: what has to be known before `make` can answer; the writer does not read it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[slice | None], torch.Tensor]
    tiles: tuple[slice, ...] = ()
    needs: frozenset[str] = frozenset()

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor on disk."""
        return math.prod(self.shape) * self.dtype.itemsize


class Output(NamedTuple):
    """A folder to write: what is planned for it, in order, and what `write_checkpoint` says of the rest."""

    folder: str | Path
    tensors: Sequence[Planned]
    files: Files | None = None
    metadata: Mapping[str, Any] | None = None


class Ending(NamedTuple):
    """What is told beside an output's tensors once all are written: more texts, and more of the manifest."""

    files: Mapping[str, str]
    metadata: Mapping[str, Any]


def planned_bytes(tensors: Iterable[Planned]) -> int:
    """Bytes that tensors take on disk, without computing any."""
    return sum(tensor.nbytes for tensor in tensors)


class ShardLayout:
    """Where each tensor of a plan lies: consecutive shards of at most `shard_size` bytes, or a single larger tensor.

    Attributes: `index`, the name of the index; `shards`, file name -> what it holds; `headers` and `sizes` in bytes of
    these files; `places`, tensor name -> (file name, byte in it); `nbytes` of all tensors.
    """

    def __init__(self, plan: Sequence[Planned], stem: str, shard_size: int | None) -> None:
        self._made_of = plan, stem, shard_size
        self.index, self.nbytes = f"{stem}.safetensors.index.json", planned_bytes(plan)
        parts = _split(plan, None if stem == "adapter_model" else shard_size)
        names = [f"{stem}-{i:05}-of-{len(parts):05}.safetensors" for i in range(1, len(parts) + 1)]
        self.shards = dict(zip(names if len(parts) > 1 else [f"{stem}.safetensors"], parts, strict=True))
        self.headers: dict[str, bytes] = {}
        self.sizes: dict[str, int] = {}
        self.places: dict[str, tuple[str, int]] = {}
        for file, shard in self.shards.items():
            self.headers[file], starts, self.sizes[file] = _header(shard)
            self.places |= {name: (file, start) for name, start in starts.items()}

    def without(self, names: set[str]) -> ShardLayout:
        """The layout that the same plan has if it lacks some tensors."""
        plan, stem, shard_size = self._made_of
        return ShardLayout([tensor for tensor in plan if tensor.name not in names], stem, shard_size)

    def create(self, folder: Path) -> None:
        """Files of their final size that hold their headers; the rest is sparse."""
        for name, header in self.headers.items():
            with (folder / name).open("wb") as file:
                file.write(header)
                file.truncate(self.sizes[name])

    def complete(self, folder: Path, files: Files) -> None:
        """Check that the shards read back, then add the index and `files`."""
        for name, shard in self.shards.items():
            found = {tensor: record.shape for tensor, record in read_header(folder / name).items()}
            if found != {tensor.name: tensor.shape for tensor in shard}:
                raise ResourceError(f"{folder / name} does not read back as it was written; is the disk failing?")
            with safe_open(folder / name, framework="pt"):  # the library's own opinion
                pass
        if len(self.shards) > 1:
            weight_map = {tensor.name: file for file, shard in self.shards.items() for tensor in shard}
            listing = {"metadata": {"total_size": self.nbytes}, "weight_map": weight_map}
            write_file(folder / self.index, json.dumps(listing, indent=2) + "\n")
        for name in sorted(files, key=lambda name: name == "config.json"):  # what makes it a model comes last
            (folder / name).parent.mkdir(exist_ok=True)
            write_file(folder / name, files[name])


def write_checkpoint(
    folder: str | Path,
    tensors: Iterable[Planned],
    *,
    stem: str = "model",
    shard_size: int = 5_000_000_000,
    files: Files | None = None,
    metadata: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    inputs: Sequence[Path] = (),
) -> dict[str, Any]:
    """Write what is planned, in order, as the folder `from_pretrained` loads; returns the manifest.

    `make` is called once per tensor or tile, on writing it; no more than one result is held. Shards hold at most
    `shard_size` bytes, or one tensor; an adapter (`stem="adapter_model"`) is never split, since PEFT reads one file.
    `files` maps a name (config.json, inner/one.jinja, ...) to bytes, text, or a Path to copy; `metadata` (JSON) goes to
    the manifest.
    The folder appears by one rename when all is on disk; after any error nothing is left, an old folder is untouched.

    Raises InputRefused and ResourceError as `check_writable`; NumericalError for a NaN or Inf; ValueError if a tensor
    is not as planned; and whatever `make` raises.
    """
    output = Output(folder, list(tensors), files, metadata)
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
    plans, layout = laid_out(outputs, stem, shard_size)
    options: dict[str, Any] = {"nbytes": layout.nbytes, "overwrite": overwrite, "inputs": inputs}
    with ExitStack() as stack:
        stagings = [stack.enter_context(new_folder(o.folder, metadata=o.metadata, **options)) for o in outputs]
        for staging in stagings:
            layout.create(staging)
        for name, shard in layout.shards.items():
            files = [staging / name for staging in stagings]
            for tensor in shard:
                write_tensor(files, layout.places[tensor.name][1], [plan[tensor.name] for plan in plans])
        for staging, output in zip(stagings, outputs, strict=True):
            layout.complete(staging, output.files or {})
    return [read_json(real(o.folder) / MANIFEST) for o in outputs]


def laid_out(outputs: Sequence[Output], stem: str, shard_size: int) -> tuple[list[dict[str, Planned]], ShardLayout]:
    """What each output holds by name, and the one layout of all; ValueError for a plan that cannot be written."""
    listed = [[t._replace(shape=tuple(t.shape)) for t in output.tensors] for output in outputs]
    if any([(*t[:3], t.tiles) for t in plan] != [(*t[:3], t.tiles) for t in listed[0]] for plan in listed):
        raise ValueError("the folders to write side by side hold different tensors")
    layout = ShardLayout(listed[0], stem, shard_size)
    for plan, output in zip(listed, outputs, strict=True):
        _check_plan(plan, output.files or {}, {*layout.shards, layout.index, MANIFEST})
    return [{tensor.name: tensor for tensor in plan} for plan in listed], layout


def write_tensor(files: Sequence[Path], start: int, same: Sequence[Planned]) -> None:
    """Make a tensor for every file, tile by tile, and write it from byte `start` of each; one is open at a time."""
    for rows in same[0].tiles or (None,):
        for path, tensor in zip(files, same, strict=True):
            row = math.prod(tensor.shape[1:]) * tensor.dtype.itemsize
            made = _bytes_of(tensor, rows)
            with path.open("r+b") as file:
                file.seek(start + (rows.start * row if rows else 0))
                file.write(made)


def write_plain(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Tensors as they are, NaN included, as one durable file."""
    header, starts, _ = _header([Planned(name, tuple(t.shape), t.dtype, t.__getitem__) for name, t in tensors.items()])
    with path.open("wb") as file:
        file.write(header)
        for name in starts:  # in the order of the file
            file.write(raw(tensors[name]))
        file.flush()
        os.fsync(file.fileno())


def copy_tensors(layout: ShardLayout, old: Path, kept: ShardLayout, new: Path) -> None:
    """Copy from the folder `old`, which is laid out as `layout`, what `kept` places into the folder `new`."""
    for shard, tensors in kept.shards.items():
        with (new / shard).open("wb") as into:
            into.write(kept.headers[shard])
            for tensor in sorted(tensors, key=lambda tensor: kept.places[tensor.name][1]):
                file, start = layout.places[tensor.name]
                with (old / file).open("rb") as origin:
                    origin.seek(start)
                    for left in range(tensor.nbytes, 0, -PIECE):
                        into.write(origin.read(min(left, PIECE)))


def _split(plan: Sequence[Planned], shard_size: int | None) -> list[list[Planned]]:
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


def _header(shard: Sequence[Planned]) -> tuple[bytes, dict[str, int], int]:
    """Header, start of each tensor and size of a file. Wide dtypes lie first, so that all are aligned."""
    entries: dict[str, dict[str, Any]] = {"__metadata__": {"format": "pt"}}
    starts, offset = {}, 0
    for tensor in sorted(shard, key=lambda tensor: -tensor.dtype.itemsize):
        span = [offset, offset + tensor.nbytes]
        code = CODES.get(tensor.dtype)  # None is refused with the plan
        entries[tensor.name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": span}
        starts[tensor.name], offset = offset, offset + tensor.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + start for name, start in starts.items()}, len(header) + offset


def _check_plan(plan: Sequence[Planned], files: Mapping[str, object], reserved: set[str]) -> None:
    if not plan:
        raise ValueError("no tensor to write")
    seen: set[str] = set()
    for tensor in plan:
        if tensor.name in seen or tensor.name == "__metadata__":
            raise ValueError(f"tensor name {tensor.name!r} is planned twice or reserved")
        if tensor.dtype not in CODES:
            raise ValueError(f"{tensor.name}: safetensors files of this writer hold no {tensor.dtype}")
        ends = [0, *(tile.stop for tile in tensor.tiles)]
        whole = tensor.shape[:1] == (ends[-1],) and [tile.start for tile in tensor.tiles] == ends[:-1]
        if tensor.tiles and not (whole and sorted(ends) == ends and all(tile.step is None for tile in tensor.tiles)):
            raise ValueError(f"{tensor.name} {list(tensor.shape)}: {tensor.tiles} are not all its rows, in order")
        seen.add(tensor.name)
    for name, content in files.items():
        parts = name.split("/")
        plain = all(Path(part).name == part and part not in ("", ".", "..") for part in parts)
        if name in reserved or len(parts) > 2 or not plain:
            raise ValueError(
                f"extra file {name!r} must be a plain name, in one folder at most, other than "
                f"{', '.join(sorted(reserved))}"
            )
        if isinstance(content, Path) and not content.is_file():
            raise InputRefused(f"extra file {name!r}: {content} is missing or not a regular file")


def raw(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor as they stand in a file."""
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    return memoryview(plain.reshape(-1).view(torch.uint8).numpy())


def _bytes_of(planned: Planned, rows: slice | None) -> memoryview:
    tensor = planned.make(rows)
    shape = (rows.stop - rows.start, *planned.shape[1:]) if rows else planned.shape
    where = f"{planned.name} {list(planned.shape)}" + (f", rows {rows.start} to {rows.stop - 1}," if rows else "")
    if tuple(tensor.shape) != shape or tensor.dtype != planned.dtype:
        raise ValueError(
            f"{where} came out as {list(tensor.shape)} {tensor.dtype}, planned were {list(shape)} {planned.dtype}"
        )
    nans, infs = count_nonfinite(tensor)
    if nans or infs:
        raise NumericalError(
            f"{where} came out with {nans} NaN and {infs} Inf in {planned.dtype}; "
            "nothing was written; a smaller --alpha or a wider dtype avoids overflow"
        )
    return raw(tensor)
