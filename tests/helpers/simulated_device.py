"""A device whose streams lag as far as they may, for uploads to it."""

import threading
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from theseus_transport.streaming import upload as module
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

BUFFER = 64  # bytes, so that a matrix goes in many pieces
LOST = 0xFF  # bytes of what nobody wrote: NaN in every format of floating point


class Reached:
    """A point in a simulated stream."""

    def __init__(self, wait: Callable[[], None]) -> None:
        self.synchronize = wait


@dataclass
class Memory:
    """Of a simulated device; ``free``: the moment of computing from which another tensor may have it."""

    storage: StorageWeakRef
    nbytes: int
    used: bool = False
    free: int | None = None


class Simulated:
    """A device whose streams do nothing before somebody waits for them, and whose memory is free no sooner.

    What was copied from or never written holds NaN. Computing itself is the CPU's own, at once; but what it used is
    free only once an event behind that has been waited for, as a GPU may lag.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.copies: list[tuple[Tensor, Tensor]] = []
        self.copied = 0
        self.now, self.passed = 1, 0  # of the computing stream
        self.memory: list[Memory] = []
        self.peak = self.pinned_bytes = 0
        self.fails = False

    def pinned(self, nbytes: int) -> Tensor:
        self.pinned_bytes += nbytes
        return torch.full((nbytes,), LOST, dtype=torch.uint8)

    def empty(self, like: Tensor) -> Tensor:
        with self.lock:
            tensor = torch.empty_like(like)
            module._bytes(tensor).fill_(LOST)
            self.memory.append(Memory(StorageWeakRef(tensor.untyped_storage()), tensor.nbytes))
            self.peak = max(self.peak, self.in_use)
            return tensor

    def copy(self, piece: Tensor, into: Tensor) -> Reached:
        if self.fails:
            raise RuntimeError("the device fell off the bus")
        self.copies.append((piece, into))
        end = len(self.copies)
        return Reached(lambda: self.run(end))

    def computed(self) -> Reached:
        with self.lock:
            self.in_use  # noqa: B018 - what was given up so far is given up by now
            now, self.now = self.now, self.now + 1
            return Reached(lambda: self.pass_by(now))

    def use(self, tensor: Tensor, arrived: Reached) -> None:
        arrived.synchronize()
        (entry,) = (m for m in self.memory if m.storage == StorageWeakRef(tensor.untyped_storage()))
        entry.used = True

    def run(self, end: int) -> None:
        with self.lock:
            for i in range(self.copied, end):
                piece, into = self.copies[i]
                into.copy_(piece)
                piece.fill_(LOST)
                self.copies[i] = (piece[:0], piece[:0])
            self.copied = max(self.copied, end)

    def pass_by(self, now: int) -> None:
        with self.lock:
            self.passed = max(self.passed, now)

    @property
    def in_use(self) -> int:
        """Bytes that nothing else can have."""
        for entry in self.memory:
            if entry.free is None and entry.storage.expired():
                entry.free = self.now if entry.used else 0
        return sum(entry.nbytes for entry in self.memory if entry.free is None or entry.free > self.passed)


def simulated_devices(monkeypatch: pytest.MonkeyPatch) -> list[Simulated]:
    """Small buffers; every Upload from now on has a simulated device, which is put in this list."""
    made: list[Simulated] = []

    def simulated(device: torch.device) -> Simulated:
        made.append(Simulated())
        return made[-1]

    monkeypatch.setattr(module, "machine_of", simulated)
    monkeypatch.setattr(module, "BUFFER", BUFFER)
    return made


def bits(tensor: Tensor) -> bytes:
    return module._bytes(tensor.cpu()).numpy().tobytes()
