"""Hidden states of one model between two blocks, a batch at a time: in memory, or in a file."""

from __future__ import annotations

import math
import os
import shutil
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputRefused, ReadFailed, ResourceError
from ..files.earlier_runs import workplace_of
from ..files.headers import digest, real
from ..files.result_folder import FULL, make_private


def own_folder(offload: Path, out: Path) -> Path:
    """The folder in ``offload`` where the run that writes ``out`` keeps its files; the same when the run is resumed."""
    return offload / f"theseus-{digest(os.fsencode(real(out)))[:12]}"


def check_offload(folder: Path, nbytes: int, out: Path, *, inputs: Sequence[Path]) -> None:
    """Raise before any computation if a run's own folder cannot hold ``nbytes`` of hidden states.

    Raises:
        InputRefused: it lies in what the run reads, or in ``out``, which it writes; or it cannot be made.
        ResourceError: the disk has too little room.
    """
    folder = real(folder)
    for other in (*map(real, inputs), real(out), workplace_of(real(out))):
        if folder == other or other in folder.parents:
            raise InputRefused(f"--offload-folder {folder.parent} lies in {other}; name a folder outside of it")
    nearest = next(parent for parent in folder.parents if os.path.exists(parent))
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise InputRefused(f"--offload-folder {folder.parent}: {nearest} may not be written; name another")
    held = sum(path.stat().st_size for path in folder.glob("*.bin"))  # of a run that goes on
    if (free := shutil.disk_usage(nearest).free) + held < nbytes:
        raise ResourceError(
            f"--offload-folder {folder.parent} is to hold {nbytes} bytes of hidden states, {nearest} has {free} "
            "free; free some, or name another"
        )


@contextmanager
def temporary(folder: Path | None) -> Iterator[Path | None]:
    """A place in a run's own folder for a pass that nobody resumes; None stays None: its states lie in memory."""
    if folder is None:
        yield None
        return
    place = folder / "before"
    make_private(folder)
    shutil.rmtree(place, ignore_errors=True)  # of a process that was killed
    make_private(place)
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)
        with suppress(OSError):  # the loop's files lie there
            folder.rmdir()


class Hidden:
    """Hidden states by batch, each [samples, tokens, width].

    In memory they are replaced in place; in files a sweep over all batches reads one file and writes the next. Either
    way :meth:`save` leaves a file from which :meth:`restored` goes on in another process.
    """

    def __init__(self, folder: Path, name: str, *, resident: bool) -> None:
        """Files are ``name-0.bin`` and so on in ``folder``; ``resident``: keep all batches in memory."""
        self._folder, self._name, self._resident = folder, name, resident
        self._held: list[Tensor | None] = []
        self._sizes: list[tuple[tuple[int, ...], torch.dtype]] = []
        self._at, self._saved = 0, -1  # the file that is read, and the last one that is to be kept
        self._written = 0  # batches of the running sweep

    def copied(self, name: str, batches: Sequence[int]) -> Hidden:
        """The states of these batches under another name, to go another way from here."""
        other = Hidden(self._folder, name, resident=self._resident)
        for i in batches:
            other.append(self[i])
        return other

    def __len__(self) -> int:
        return len(self._sizes)

    def append(self, state: Tensor) -> None:
        """The next batch of the first sweep."""
        self._sizes.append((tuple(state.shape), state.dtype))
        self._held.append(state.cpu() if self._resident else None)
        if not self._resident:
            self._write(self._at, len(self) - 1, state)

    def __getitem__(self, i: int) -> Tensor:
        held = self._held[i]
        return self._read(i) if held is None else held

    def put(self, i: int, state: Tensor) -> None:
        """Replace batch ``i``; within a sweep batches come in order, and the last one ends it."""
        if self._resident:
            self._held[i] = state.cpu()
        else:
            self._write(self._at + 1, i, state)
        self._written += 1
        if self._written == len(self):
            self._written = 0
            if not self._resident:
                self._advance()

    def keep(self, i: int | None) -> None:
        """Let go of all batches but this one, where they are in memory."""
        self._held = [state if k == i else None for k, state in enumerate(self._held)]

    @property
    def nbytes(self) -> int:
        """Bytes of all batches."""
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self._sizes)

    def save(self) -> Path:
        """The file that holds all batches now, to be made durable; call :meth:`committed` once it is."""
        if self._resident:
            self._at += 1
            for i in range(len(self)):
                self._write(self._at, i, self[i])
        return self._path(self._at)

    def committed(self) -> None:
        """Remove earlier files, now that the one :meth:`save` named is durable."""
        for number in range(self._saved, self._at):
            self._remove(number)
        self._saved = self._at

    def record(self) -> dict[str, Any]:
        """What :meth:`restored` needs beside the file, as JSON."""
        return {"at": self._at, "sizes": [(s, str(d).removeprefix("torch.")) for s, d in self._sizes]}

    @classmethod
    def restored(cls, folder: Path, name: str, record: dict[str, Any], *, resident: bool) -> Hidden:
        hidden = cls(folder, name, resident=resident)
        hidden._sizes = [(tuple(shape), getattr(torch, dtype)) for shape, dtype in record["sizes"]]
        hidden._at = hidden._saved = record["at"]
        hidden._held = [None] * len(hidden)
        if resident:
            hidden._held = [hidden._read(i) for i in range(len(hidden))]
        for path in folder.glob(f"{name}-*.bin"):
            if path != hidden._path(hidden._at):
                path.unlink()
        return hidden

    def _advance(self) -> None:
        self._at += 1
        if self._at - 1 > self._saved:
            self._remove(self._at - 1)

    def _remove(self, number: int) -> None:
        with suppress(FileNotFoundError):
            self._path(number).unlink()

    def _path(self, number: int) -> Path:
        path = self._folder / f"{self._name}-{number}.bin"
        if os.path.lexists(path) and not stat.S_ISREG(os.lstat(path).st_mode):
            raise InputRefused(f"{path} is no file of this run but a link, a pipe or a folder; remove it")
        return path

    def _offset(self, i: int) -> int:
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self._sizes[:i])

    def _write(self, number: int, i: int, state: Tensor) -> None:
        make_private(self._folder)
        try:
            with self._path(number).open("wb" if i == 0 else "r+b") as file:
                file.seek(self._offset(i))
                file.write(state.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        except OSError as error:
            if error.errno not in FULL:
                raise
            free = shutil.disk_usage(self._folder).free
            raise ResourceError(
                f"{self._folder}: disk full, {self.nbytes} bytes of hidden states a file and {free} free: {error}; "
                "free some, or name another place with --offload-folder"
            ) from error

    def _read(self, i: int) -> Tensor:
        shape, dtype = self._sizes[i]
        state, path = torch.empty(shape, dtype=dtype), self._path(self._at)
        buffer = state.reshape(-1).view(torch.uint8).numpy()
        cure = "remove the unfinished run and start again"
        try:
            with path.open("rb") as file:
                file.seek(self._offset(i))
                count = file.readinto(buffer)
        except OSError as error:
            raise ReadFailed(f"{path} cannot be read: {error.strerror}; {cure}") from error
        if count != len(buffer):
            raise ReadFailed(f"{path} ends after {count} of {len(buffer)} bytes of batch {i}; {cure}")
        return state
