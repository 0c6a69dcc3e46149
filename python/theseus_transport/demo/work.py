"""Where the demo works: a folder of its own and processes, which end with it however it ends."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..errors import InputRefused
from ..files.earlier_runs import workplace_of
from ..files.headers import real
from ..files.result_folder import check_writable, make_private
from ..files.run_record import JOURNAL, lock

T = TypeVar("T")


@contextmanager
def workshop(out: Path) -> Iterator[Path]:
    """An empty folder beside ``out`` until the block ends; what a process left there that was killed is removed.

    Raises:
        InputRefused: ``out`` cannot be written, another process is at work, or the folder is of another command.
    """
    out = real(out)
    check_writable(out / "demo", 0)
    place = workplace_of(out)
    if (place / JOURNAL).exists():
        raise InputRefused(f"an unfinished run lies in {place}; name another --out, or remove it")
    created = [parent for parent in place.parents if not parent.exists()]
    make_private(place)
    held = lock(place)
    try:
        for left in place.iterdir():
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
        (place / "files").mkdir()
        yield place / "files"
    finally:
        shutil.rmtree(place, ignore_errors=True)
        os.close(held)
        for parent in created:
            with suppress(OSError):  # results lie in it
                parent.rmdir()


@contextmanager
def workers(count: int) -> Iterator[Callable[[Callable[..., T], Sequence[tuple[Any, ...]]], Iterator[tuple[Any, T]]]]:
    """A function that runs a job for many keys and yields (key, result) in the order they come.

    Args:
        count: processes of one thread each; 1 stays in this process.
    """
    if count == 1:
        yield lambda job, keys: ((key, job(*key)) for key in keys)
        return
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(count, spawn, initializer=_begin)

    def run(job: Callable[..., T], keys: Sequence[tuple[Any, ...]]) -> Iterator[tuple[Any, T]]:
        with _interrupts_ignored():  # by those that start here; this process ends them
            futures = {pool.submit(job, *key): key for key in keys}
        yield from ((futures[future], future.result()) for future in as_completed(futures))

    try:
        yield run
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    main = threading.current_thread() is threading.main_thread()  # no other may
    before = signal.signal(signal.SIGINT, signal.SIG_IGN) if main else None
    try:
        yield
    finally:
        if main:
            signal.signal(signal.SIGINT, before)


def _begin() -> None:
    """In a worker: one thread, and an end with the process that began it, killed or not."""
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
