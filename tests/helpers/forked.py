"""Work in a process of its own that has nothing to import: a fork of one that has imported it, and has one thread."""

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import forkserver, get_context
from multiprocessing.process import BaseProcess
from typing import Any
from unittest.mock import patch

IMPORTED = [
    "theseus_transport.cli.main",
    "theseus_transport.jobs.align_job",
    "peft",
    "transformers.models.llama.modeling_llama",
]
TRIAL = 64  # instead of machine.TRIAL: every job multiplies matrices for longer than it moves tiny models
STEADY = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # else glibc raises it, and holes of its heap vary by tens of MiB


def _context() -> Any:
    context = get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    with patch.dict(os.environ, {"OMP_NUM_THREADS": "1", **STEADY}):
        forkserver.ensure_running()
    return context


def _ready() -> None:
    import torch
    from theseus_transport import machine

    torch.set_num_threads(1)
    machine.TRIAL = TRIAL


def _made_ready(work: Callable[..., object], arguments: tuple[object, ...]) -> None:
    _ready()
    work(*arguments)


def started(work: Callable[..., object], *arguments: object) -> BaseProcess:
    """A process that does ``work(*arguments)``."""
    process: BaseProcess = _context().Process(target=_made_ready, args=(work, arguments))
    process.start()
    return process


def apart(work: Callable[..., Any], *arguments: object) -> Any:
    """What ``work(*arguments)`` returns in such a process, or raises."""
    with ProcessPoolExecutor(1, mp_context=_context(), initializer=_ready) as pool:
        return pool.submit(work, *arguments).result()
