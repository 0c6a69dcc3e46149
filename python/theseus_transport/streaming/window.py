"""A window over a checkpoint: weights read once, held while a block needs them, the next ones read ahead."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import TypeVar

import torch
from torch import Tensor

from ..files.checkpoint import Checkpoint, check_finite
from ..updates.merged import Merged
from .resident import Resident
from .upload import Upload

log = logging.getLogger(__name__)
T = TypeVar("T")


class Window(Mapping[str, Tensor]):
    """The tensors of a checkpoint; those held are in memory, any other is read at each access. All are checked.

    Use it from one thread; at most one more thread reads ahead. Tensors held are handed out themselves, not copied:
    leave them as they are.

    Attributes:
        checkpoint: what is read; `folder`, `config`, `shapes` and `dtypes` are its own.
        seconds_waiting: the time callers spent until their tensors were read.
        peak_held_bytes: the largest `held_bytes` so far.

    Every reading method raises KeyError for a name the checkpoint does not have, ReadFailed as Checkpoint does, and
    InputRefused for NaN or Inf.
    """

    def __init__(self, checkpoint: Checkpoint | Merged | Resident) -> None:
        """Nothing is read yet."""
        self.checkpoint = checkpoint
        self.folder, self.config = checkpoint.folder, checkpoint.config
        self.shapes, self.dtypes = checkpoint.shapes, checkpoint.dtypes
        self.seconds_waiting = 0.0
        self.peak_held_bytes = 0
        self._upload: Upload | None = None
        self._held: dict[str, Tensor] = {}
        self._coming: dict[str, Future[Tensor]] = {}
        self._reader: ThreadPoolExecutor | None = None
        self._alone = False  # no other thread could be started

    def send_to(self, upload: Upload) -> None:
        """Have `upload` send on to its device what is read ahead, and drop what is released, until this is closed."""
        self._upload = upload

    def prefetch(self, names: Iterable[str]) -> None:
        """Start to read these on another thread, in this order; those held or on their way are not read again.

        Sent on, they are one block. What fails, there too, is raised by the `hold` (or access) that wants it.
        """
        send = None
        for name in names:
            if name not in self._held and name not in self._coming:
                self._expect(name)
                if send is None and self._upload is not None:
                    send = self._upload.ahead()
                if (coming := self._submitted(name, send)) is None:
                    return
                self._coming[name] = coming

    def _submitted(self, name: str, send: Callable[[str, Tensor], None] | None) -> Future[Tensor] | None:
        """A read on the other thread; None where the system starts no thread: then each is read when it is wanted."""
        if self._alone:
            return None
        reader = self._reader or ThreadPoolExecutor(1, thread_name_prefix="theseus-reader")
        try:
            coming = reader.submit(self._onward, name, send)
        except RuntimeError as error:
            log.warning("%s: weights are not read ahead: %s", self.folder, error)
            self._alone = True
            return None
        self._reader = reader
        return coming

    def hold(self, names: Iterable[str]) -> None:
        """Have these in memory until they are released, each read once."""
        for name in names:
            if (coming := self._coming.pop(name, None)) is not None:
                self._held[name] = self._waiting(coming.result)
            elif name not in self._held:
                self._expect(name)
                self._held[name] = self._waiting(lambda name=name: self._whole(name))  # type: ignore[misc]

    def release(self, names: Iterable[str] | None = None, *, keep: Iterable[str] = ()) -> None:
        """Let go of these, on their way or held; without `names`, of all that is held. Never of those in `keep`."""
        gone = set(self._held if names is None else names) - set(keep)
        self._held = {name: tensor for name, tensor in self._held.items() if name not in gone}
        coming = [self._coming.pop(name) for name in gone & self._coming.keys()]
        wait([read for read in coming if not read.cancel()])  # the memory is free when this returns
        if self._upload is not None:
            self._upload.drop(gone)

    def close(self) -> None:
        """Release everything, end the reading thread, send nothing on; the window can still be used."""
        self.release([*self._held, *self._coming])
        if self._reader is not None:
            self._reader.shutdown()
        self._reader = self._upload = None

    def rows(self, name: str, rows: slice) -> Tensor:
        """Consecutive rows of a tensor, [rows, ...]; where it is not held, only their bytes are read."""
        if (held := self._ready(name)) is not None:
            return held[rows]
        return self._waiting(lambda: self._checked(name, self.checkpoint.rows(name, rows)))

    def take(self, name: str, index: Tensor) -> Tensor:
        """The rows that `index` names (int64, ascending, each once), [len(index), ...]."""
        if (held := self._ready(name)) is not None:
            return held[index]
        return self._waiting(lambda: self._checked(name, self.checkpoint.take(name, index)))

    @property
    def held_bytes(self) -> int:
        """Bytes of the tensors held or on their way."""
        return sum(self._nbytes(name) for name in (*self._held, *self._coming))

    @property
    def bytes_read(self) -> int:
        """Bytes of tensors read from the checkpoint, by anyone, since it was opened."""
        return self.checkpoint.bytes_read

    def __getitem__(self, name: str) -> Tensor:
        held = self._ready(name)
        return self._waiting(lambda: self._whole(name)) if held is None else held

    def __contains__(self, name: object) -> bool:
        return name in self.checkpoint

    def __iter__(self) -> Iterator[str]:
        return iter(self.checkpoint)

    def __len__(self) -> int:
        return len(self.checkpoint)

    def __enter__(self) -> Window:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _nbytes(self, name: str) -> int:
        return torch.Size(self.shapes[name]).numel() * self.dtypes[name].itemsize

    def _expect(self, name: str) -> None:
        self.peak_held_bytes = max(self.peak_held_bytes, self.held_bytes + self._nbytes(name))

    def _ready(self, name: str) -> Tensor | None:
        if name in self._coming:
            self.hold([name])
        return self._held.get(name)

    def _onward(self, name: str, send: Callable[[str, Tensor], None] | None) -> Tensor:
        tensor = self._whole(name)
        if send is not None:
            send(name, tensor)
        return tensor

    def _whole(self, name: str) -> Tensor:
        return self._checked(name, self.checkpoint[name])

    def _checked(self, name: str, tensor: Tensor) -> Tensor:
        check_finite(f"{name} of {self.folder}", tensor)
        return tensor

    def _waiting(self, read: Callable[[], T]) -> T:
        began = time.perf_counter()
        try:
            return read()
        finally:
            self.seconds_waiting += time.perf_counter() - began
