"""Weights on their way to a device: through a ring of pinned buffers, on a stream of their own, one block ahead.

window's thread      read b + 1, fill buffer 0, fill buffer 1, wait for 0, fill 0, ...
copy stream                           copy 0         copy 1            copy 0
computing stream     block b                                                     wait, convert, block b + 1
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import cycle

import torch
from torch import Tensor
from torch.cuda import Event

RING = 2  # buffers: one is filled while another is copied
BUFFER = 16 << 20  # bytes of one: 0.6 ms on PCIe 4, a hundred times what starting a copy takes
SLOTS = 2  # blocks in their stored dtype: the one that runs, and the one that is copied ahead


class Cuda:
    """All calls to the device; a test puts a simulated one in its place."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._copying = device, torch.cuda.Stream(device)

    def pinned(self, nbytes: int) -> Tensor:
        """Host memory that the device copies from by itself, uint8 [nbytes]."""
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def empty(self, like: Tensor) -> Tensor:
        """Memory on the device that belongs to the copy stream, of the shape and dtype of ``like``."""
        with torch.cuda.stream(self._copying):
            return torch.empty(like.shape, dtype=like.dtype, device=self._device)

    def copy(self, piece: Tensor, into: Tensor) -> Event:
        """Start to copy pinned bytes; the event: they have arrived, as has all that was copied before."""
        with torch.cuda.stream(self._copying):
            into.copy_(piece, non_blocking=True)
        return _reached(self._copying)

    def computed(self) -> Event:
        """The event: all is computed that was asked for so far."""
        return _reached(torch.cuda.current_stream(self._device))

    def use(self, tensor: Tensor, arrived: Event) -> None:
        """What is computed from now on waits for the tensor, and nothing takes its memory before that is over."""
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(arrived)
        tensor.record_stream(stream)


@dataclass
class Buffer:
    """Pinned memory, uint8 [BUFFER]; ``copied``: it may be filled again."""

    memory: Tensor
    copied: Event | None = None


@dataclass(eq=False)
class DeviceBlock:
    """A block on the device; ``room``: the block that had this memory before has been computed with."""

    room: Event
    sent: dict[str, tuple[Tensor, Event]] = field(default_factory=dict)  # on the device, and when it has arrived


class Upload:
    """Brings the weights of one model to a device; on the CPU it converts them, and nothing else of this exists.

    No more than SLOTS blocks lie on the device in their stored dtype, provided that a block is emptied before the one
    behind the next is sent. A tensor that is taken leaves its slot: it is freed once it is converted, or is the weight
    itself where its dtype is that of computing.

    One thread takes; one more may send ahead.
    """

    def __init__(self, device: torch.device, names: Iterable[str]) -> None:
        """Nothing is allocated yet. ``names``: stored tensors that will be taken; no others are sent ahead."""
        self._device, self._names, self._machine = device, frozenset(names), machine_of(device)
        self._ring: Iterator[Buffer] | None = None  # the next buffer's turn, round and round
        self._lock = threading.Lock()  # of the ring
        self._slots: tuple[DeviceBlock, ...] = ()

    def ahead(self) -> Callable[[str, Tensor], None]:
        """A slot for one more block: a function for another thread, which sends a tensor there by its stored name.

        The oldest slot goes, with what is left in it, and what was meant for it is not sent any more.
        """
        if self._machine is None:
            return lambda name, tensor: None
        slot = DeviceBlock(self._machine.computed())
        gone, self._slots = self._slots[: 1 - SLOTS], (*self._slots[1 - SLOTS :], slot)
        for old in gone:
            old.sent.clear()

        def send(name: str, tensor: Tensor) -> None:
            if name in self._names and slot in self._slots:
                slot.room.synchronize()
                slot.sent[name] = self._send(tensor)

        return send

    def take(self, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """A stored tensor on the device in ``dtype``: what was sent ahead under its name, or else sent now."""
        sent = next((slot.sent.pop(name) for slot in self._slots if name in slot.sent), None)
        return self.bring(tensor, dtype) if sent is None else self._used(*sent, dtype)

    def bring(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """A tensor on the device in ``dtype``, sent now."""
        return tensor.to(self._device, dtype) if self._machine is None else self._used(*self._send(tensor), dtype)

    def drop(self, names: Iterable[str]) -> None:
        """Free what was sent ahead of these and not taken."""
        for name in names:
            for slot in self._slots:
                slot.sent.pop(name, None)

    def _used(self, tensor: Tensor, arrived: Event, dtype: torch.dtype) -> Tensor:
        assert self._machine is not None
        self._machine.use(tensor, arrived)
        return tensor.to(dtype)

    def _send(self, tensor: Tensor) -> tuple[Tensor, Event]:
        assert self._machine is not None
        with self._lock:
            if self._ring is None:
                self._ring = cycle([Buffer(self._machine.pinned(BUFFER)) for _ in range(RING)])
            sent = self._machine.empty(tensor)
            # at least one piece, so that there is an event of an empty tensor too
            pieces = zip(_bytes(tensor).split(BUFFER), _bytes(sent).split(BUFFER), strict=True)
            for (piece, into), buffer in zip(pieces, self._ring, strict=False):
                if buffer.copied is not None:
                    buffer.copied.synchronize()
                filled = buffer.memory[: len(piece)].copy_(piece)
                buffer.copied = arrived = self._machine.copy(filled, into)
            return sent, arrived


def machine_of(device: torch.device) -> Cuda | None:
    """The calls to a device that weights are uploaded to; None for the CPU, where they stay where they are."""
    return Cuda(device) if device.type == "cuda" else None


def _reached(stream: torch.cuda.Stream) -> Event:
    """The point that a stream has been filled up to; who waits for it leaves the processor to others."""
    event = Event(blocking=True)
    stream.record_event(event)
    return event


def _bytes(tensor: Tensor) -> Tensor:
    """The memory of a contiguous tensor as uint8 [bytes]."""
    return tensor.reshape(-1).view(torch.uint8)
