"""Folders of results: whole under their name with a manifest, or absent; and what a manifest says later."""

from __future__ import annotations

import errno
import glob
import json
import logging
import os
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..errors import InputRefused, ResourceError
from .headers import file_blake2b, inside, read_json, real

log = logging.getLogger(__name__)
MANIFEST = "theseus.json"
FULL = (errno.ENOSPC, errno.EDQUOT)
AROUND = len("..old-01234567")  # bytes of the longest name that is put around an output's, for a folder beside it
INSIDE = 100  # bytes of the longest path in such a folder


def check_writable(folder: str | Path, nbytes: int, *, overwrite: bool = False, inputs: Sequence[Path] = ()) -> None:
    """Raise before any computation if `nbytes` cannot be written as `folder`.

    Raises InputRefused if the folder is or holds or lies in one of `inputs`, is not empty without `overwrite`, is a
    mount point, holds the home or working directory, or has too long a name; ResourceError, with numbers, if the disk
    has too little room.
    """
    target = real(folder)
    nearest = next((parent for parent in target.parents if os.path.exists(parent)), target)
    refuse_overlap(target, inputs)
    _refuse_long(target, nearest)
    if target.exists() and not target.is_dir():
        raise InputRefused(f"output {target} is a file; name a folder")
    if any(target == place or target in place.parents for place in (*_home(), Path.cwd())):
        raise InputRefused(f"output {target} holds the home or working directory; name a folder of its own")
    if os.path.ismount(target):
        raise InputRefused(f"output {target} is a mount point and cannot be renamed into place; name a folder in it")
    if not overwrite and target.exists() and any(target.iterdir()):
        raise InputRefused(f"output {target} is not empty; name another folder, or --overwrite")
    if overwrite and target.exists() and any(target.iterdir()) and not (target / MANIFEST).exists():
        raise InputRefused(f"output {target} holds no {MANIFEST}, so it is not ours to replace; remove it first")
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise InputRefused(f"output {target}: {nearest} is not a folder that may be written; name another")
    free = shutil.disk_usage(nearest).free
    if free < nbytes:
        raise ResourceError(
            f"output {target} needs {nbytes} bytes, {nearest} has {free} free; free some, or go elsewhere"
        )


def _home() -> list[Path]:
    with suppress(RuntimeError):  # a user without one
        return [real(Path.home())]
    return []


def _refuse_long(target: Path, nearest: Path) -> None:
    """Raise InputRefused where the file system has no room for a name, or for those of folders beside it."""
    most, longest = os.pathconf(nearest, "PC_NAME_MAX"), os.pathconf(nearest, "PC_PATH_MAX")
    parts = target.relative_to(nearest).parts
    for i, part in enumerate(parts):
        around = AROUND if i + 1 == len(parts) else 0
        if len(os.fsencode(part)) > most - around:
            raise InputRefused(
                f"output {target}: a name has at most {most} bytes there, {part!r} has {len(os.fsencode(part))}"
                + (f", and {around} more while it is written" if around else "")
                + f"; choose one of at most {most - around}"
            )
    if len(os.fsencode(target)) > longest - INSIDE:
        raise InputRefused(
            f"output {target}: a path has at most {longest} bytes there, this one has "
            f"{len(os.fsencode(target))}, and up to {INSIDE} more for what is written in it; choose one of at most "
            f"{longest - INSIDE}"
        )


def refuse_overlap(target: Path, inputs: Sequence[Path]) -> None:
    """Raise InputRefused if a resolved path is, holds or lies in one of `inputs`."""
    for given in map(real, inputs):
        if target == given or given in target.parents or target in given.parents:
            raise InputRefused(f"output {target} overlaps the input {given}; name a folder outside every input")


def warn_leftovers(target: Path) -> None:
    """Name what a killed process left beside a folder."""
    if leftovers := [path.name for kind in ("tmp", "old") for path in _left_by_others(target, kind)]:
        log.warning("%s holds %s from an interrupted run; remove it", target.parent, ", ".join(leftovers))


def _left_by_others(target: Path, kind: str) -> list[Path]:
    return [*target.parent.glob(f".{glob.escape(target.name)}.{kind}-" + "[0-9a-f]" * 8)]


def remove_replaced(target: Path) -> None:
    """Remove what a killed process had put aside for a folder which is written now."""
    for path in _left_by_others(target, "old"):
        shutil.rmtree(path, ignore_errors=True)


def make_private(folder: Path) -> None:
    """A folder of this user alone, made (with those above it) unless it is there; InputRefused as `refuse_foreign`."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    refuse_foreign(folder)


def refuse_foreign(folder: Path) -> None:
    """Raise InputRefused unless this path is a folder, no link to one, of this user, that not everyone may write."""
    found = os.lstat(folder)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & stat.S_IWOTH:
        raise InputRefused(f"{folder} is in the way and no folder of yours alone; remove it first")


@contextmanager
def new_folder(
    folder: str | Path,
    *,
    nbytes: int = 0,
    metadata: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    inputs: Sequence[Path] = (),
) -> Iterator[Path]:
    """An empty folder to fill; when the block ends it gets its manifest and becomes `folder` by one rename.

    After any error nothing is left, and an old folder is untouched. Arguments and errors as `write_checkpoint`;
    `nbytes` is about what will be written.
    """
    described = metadata or {}
    json.dumps(described)  # raises TypeError now rather than after the computation
    check_writable(folder, nbytes, overwrite=overwrite, inputs=inputs)
    target = real(folder)
    created = [parent for parent in target.parents if not parent.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    warn_leftovers(target)
    staging = target.with_name(f".{target.name}.tmp-{secrets.token_hex(4)}")
    try:
        staging.mkdir()
        yield staging
        seal(staging, described)
        put_in_place(staging, target, overwrite=overwrite)
    except BaseException as error:  # KeyboardInterrupt too: nothing may be left behind
        shutil.rmtree(staging, ignore_errors=True)
        free = shutil.disk_usage(target.parent).free
        for parent in created:
            with suppress(OSError):  # another folder is written beside this one
                parent.rmdir()
        if isinstance(error, OSError) and error.errno in FULL:
            raise ResourceError(f"{target}: disk full, {nbytes} bytes of tensors and {free} left: {error}") from error
        raise


def seal(staging: Path, metadata: Mapping[str, Any], **more: Any) -> None:
    """Add the manifest of what a folder holds, `more` being further keys of it, and make all of it durable."""
    written = {name: staging / name for name in names_in(staging) if name != MANIFEST}
    files = {n: {"size": path.stat().st_size, "blake2b": file_blake2b(path)} for n, path in written.items()}
    write_file(staging / MANIFEST, json.dumps({"files": files, "metadata": dict(metadata), **more}, indent=2) + "\n")
    for path in (*written.values(), *{path.parent for path in written.values()}, staging):
        sync(path)


def names_in(folder: Path) -> list[str]:
    """Names of what lies in a folder, and in folders in it as "inner/name"; an empty folder in it by its own name."""
    found = []
    for path in sorted(folder.iterdir()):
        inner = sorted(path.iterdir()) if path.is_dir() and not path.is_symlink() else []
        found += [f"{path.name}/{below.name}" for below in inner] or [path.name]
    return found


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest {"files": {name: {size, blake2b}}, "metadata": ...} of a folder made by `new_folder`."""
    manifest = read_json(inside(Path(folder), MANIFEST))
    rows = manifest.get("files")
    if not isinstance(rows, dict) or not all(isinstance(row, dict) for row in rows.values()):
        raise InputRefused(f"{Path(folder) / MANIFEST} lists no files; was it edited?")
    return manifest


def differences(folder: str | Path) -> list[str]:
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
    return faults + [f"{name} is not in the manifest" for name in names_in(folder) if name not in {*rows, MANIFEST}]


def write_file(path: Path, content: bytes | str | Path) -> None:
    data = content.read_bytes() if isinstance(content, Path) else content
    with path.open("wb") as file:
        file.write(data.encode(errors="backslashreplace") if isinstance(data, str) else data)  # paths may be no text
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Make a file, or the names in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def put_in_place(staging: Path, target: Path, *, overwrite: bool) -> None:
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
    sync(target.parent)
    shutil.rmtree(aside, ignore_errors=True)
    if aside.exists():
        log.warning("%s is written; the folder it replaced could not be removed: %s", target, aside)
