"""What surrounds tensors on disk: JSON, file names, safetensors headers. All of it is taken to be hostile."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

import torch

from ..errors import InputRefused

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "C64": torch.complex64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "BOOL": torch.bool,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
}  # fmt: skip
MAX_HEADER = 100_000_000  # bytes; the same limit as the safetensors library
MAX_RANK = 16
MAX_DIGITS = 40  # of an integer in JSON; tokenizers without a limit say 10^30
MAX_DEPTH = 64  # of JSON: what writes it again, or shows it, goes down by recursion
QUANTISED_DTYPES = ("F4", "F6_", "F8_")
QUANTISED_TENSORS = (".qweight", ".qzeros", ".SCB", ".absmax", ".weight_packed", ".weight_scale_inv")
DEQUANTISE = "dequantise first, e.g. load with transformers in bf16 and save_pretrained"


class TensorRecord(NamedTuple):
    """One entry of a safetensors header; `start` and `stop` are byte offsets within the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


@contextmanager
def refuse_unreadable() -> Iterator[None]:
    """Turn what the system answers to reading (vanished, forbidden, a failing disk) into InputRefused with the file."""
    try:
        yield
    except OSError as error:
        raise InputRefused(f"{error.filename} cannot be read: {error.strerror}; did it change, is it yours?") from error


def parse_json(text: bytes, where: Path) -> dict[str, Any]:
    """An object from JSON text, each key once, integers of at most 40 digits; InputRefused names `where`."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError(f"key {Counter(key for key, _ in pairs).most_common(1)[0][0]!r} is given twice")
        return found

    def bounded(digits: str) -> int:
        if len(digits) > MAX_DIGITS:
            raise ValueError(f"an integer of {len(digits)} digits")
        return int(digits)

    try:
        parsed = json.loads(text.decode("utf-8-sig"), object_pairs_hook=once, parse_int=bounded)
        if b"\\u" in text:
            json.dumps(parsed, ensure_ascii=False).encode()  # half a surrogate pair could not even be printed
        if _deeper(parsed, MAX_DEPTH):
            raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise InputRefused(f"{where} holds no valid JSON: {error}; was it downloaded whole?") from None
    if not isinstance(parsed, dict):
        raise InputRefused(f"{where} holds a JSON {type(parsed).__name__}, expected an object")
    return parsed


def _deeper(value: object, limit: int) -> bool:
    """Whether objects and lists lie in each other more than ``limit`` times."""
    level = [value]
    for _ in range(limit):
        inner = (each.values() if isinstance(each, dict) else each for each in level if isinstance(each, (dict, list)))
        level = [each for part in inner for each in part if isinstance(each, (dict, list))]
    return bool(level)


@refuse_unreadable()
def open_regular(path: Path) -> BinaryIO:
    """A regular file, to be read; pipes, devices, sockets and folders are refused, and none is waited for.

    A file in a folder that others made goes through :func:`inside` or :func:`if_inside` first.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe opens without a writer
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    raise InputRefused(f"{path} is no regular file but a pipe, a device or a socket; give a file")


def read_file(path: Path, *, most: int = MAX_HEADER) -> bytes:
    """All of a regular file (:func:`open_regular`) of at most ``most`` bytes."""
    with open_regular(path) as file, refuse_unreadable():
        if (size := os.fstat(file.fileno()).st_size) > most:
            raise InputRefused(f"{path} has {size} bytes, more than the {most} that are read")
        return file.read(size)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of at most 100 MB, read as by :func:`read_file`."""
    return parse_json(read_file(path), path)


def real(path: str | Path) -> Path:
    """Where a path leads that a user named: absolute, ~ and links followed; InputRefused where it leads in a circle."""
    try:
        return Path(os.path.expanduser(path)).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle, a name too long, a zero in it
        raise InputRefused(f"{str(path)[:200]!r} leads nowhere: {str(error)[:200]}; name another") from error


def inside(folder: Path, name: str) -> Path:
    """`folder / name`, an existing regular file that really lies in the folder (or in its hub cache's blobs)."""
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or re.search(r"[\\\0]|^[A-Za-z]:", name):
        raise InputRefused(f"{folder}: file name {name!r} leads out of the folder; only plain relative names are read")
    try:
        real_folder, leads = folder.resolve(), (folder / name).resolve()
        is_file = leads.is_file()
    except (OSError, RuntimeError) as error:  # a name too long, links in a circle
        raise InputRefused(f"{folder}: file name {name[:200]!r} cannot be followed: {str(error)[:200]}") from error
    allowed = [real_folder]
    if real_folder.parent.name == "snapshots":  # <cache>/models--owner--name/snapshots/<revision>
        repository = real_folder.parent.parent
        allowed += [repository / "blobs", repository.parent / "blobs"]  # the second is shared between repositories
    if not any(leads.is_relative_to(root) for root in allowed):
        raise InputRefused(f"{folder / name} links to {leads}, outside the model's folder; put the file itself there")
    if not is_file:
        raise InputRefused(f"{folder / name} is missing or not a regular file; was the model downloaded whole?")
    return folder / name


def if_inside(folder: Path, name: str) -> Path | None:
    """`folder / name` as :func:`inside` finds it; None where the folder has nothing of this name.

    A dangling or foreign link is refused.
    """
    return inside(folder, name) if os.path.lexists(folder / name) else None


def _header_bytes(path: Path) -> bytes:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(prefix, "little") if len(prefix := file.read(8)) == 8 else -1
        if not 2 <= length <= min(MAX_HEADER, size - 8):
            raise InputRefused(
                f"{path} announces a header of {length} bytes, but the file has {size} and a header at most "
                f"{MAX_HEADER}: truncated, or no safetensors file; download it again"
            )
        return file.read(length)


def _record(path: Path, name: str, entry: object) -> TensorRecord:
    if not (isinstance(entry, dict) and set(entry) == {"dtype", "shape", "data_offsets"}):
        raise InputRefused(f"{path}: entry {name!r} must hold exactly dtype, shape and data_offsets")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if isinstance(code, str) and code.startswith(QUANTISED_DTYPES):
        raise InputRefused(f"{path}: {name!r} is quantised ({code[:20]}); {DEQUANTISE}")
    if not isinstance(code, str) or code not in DTYPES:
        raise InputRefused(f"{path}: {name!r} has unknown dtype {str(code)[:40]!r}; known: {', '.join(DTYPES)}")
    for label, values in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(values, list) or len(values) > MAX_RANK or any(
            type(value) is not int or not 0 <= value < 2**63 for value in values
        ):  # fmt: skip
            raise InputRefused(f"{path}: {name!r} has {label} {str(values)[:80]}, expected integers in [0, 2^63)")
    if len(offsets) != 2:
        raise InputRefused(f"{path}: {name!r} has data_offsets {offsets}, expected [start, stop]")
    if math.prod(max(size, 1) for size in shape) >= 2**60 and 0 in shape:
        raise InputRefused(f"{path}: {name!r} has shape {shape}: nothing, of a size that cannot be counted")
    needed, span = math.prod(shape) * DTYPES[code].itemsize, offsets[1] - offsets[0]
    if needed != span:
        raise InputRefused(f"{path}: {name!r} of shape {shape} in {code} needs {needed} bytes, its offsets span {span}")
    return TensorRecord(DTYPES[code], tuple(shape), *offsets)


@refuse_unreadable()
def read_header(path: Path) -> dict[str, TensorRecord]:
    """Name -> record of a safetensors file; nothing is allocated for tensors, every size is checked against the file.

    Raises InputRefused for whatever is not a whole, gapless safetensors file.
    """
    text = _header_bytes(path)
    parsed = parse_json(text, path)
    parsed.pop("__metadata__", None)
    records = {name: _record(path, name, entry) for name, entry in parsed.items()}
    end = 0
    for name, record in sorted(records.items(), key=lambda item: (item[1].start, item[1].stop)):
        if record.start != end:
            fault = "overlaps the tensor before it" if record.start < end else "leaves a gap before it"
            raise InputRefused(f"{path}: {name!r} starts at byte {record.start}, not {end}: it {fault}")
        end = record.stop
    data = path.stat().st_size - 8 - len(text)
    if data != end:
        fault = "truncated; download it again" if data < end else "bytes that belong to no tensor"
        raise InputRefused(f"{path} holds {data} bytes of data, its header describes {end}: {fault}")
    for name in records:
        if name.endswith(QUANTISED_TENSORS):
            raise InputRefused(f"{path}: {name!r} is part of a quantised layer; {DEQUANTISE}")
    first = 8 + len(text)
    return {name: r._replace(start=first + r.start, stop=first + r.stop) for name, r in records.items()}


def digest(data: bytes) -> str:
    """BLAKE2b, 256 bits, in hex."""
    return hashlib.blake2b(data, digest_size=32).hexdigest()


@refuse_unreadable()
def head(path: Path) -> bytes:
    """The bytes that tell one version of a file from another without reading its tensors."""
    if path.suffix == ".safetensors":
        return _header_bytes(path)
    with path.open("rb") as file:  # JSON: all of it; a pickle: the end of the zip, where its directory and CRCs are
        file.seek(max(0, path.stat().st_size - (MAX_HEADER if path.suffix == ".json" else 1 << 16)))
        return file.read()


@refuse_unreadable()
def file_blake2b(path: Path) -> str:
    """BLAKE2b (256 bits, hex) of a whole file, read in pieces of 4 MiB."""
    running = hashlib.blake2b(digest_size=32)
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            running.update(piece)
    return running.hexdigest()
