"""How a command ends that goes wrong: one message on the screen and an exit code, for errors and for signals."""

from __future__ import annotations

import errno
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

import typer

from ..errors import AlreadyDone, HungUp, ResourceError, Terminated, TheseusError
from .terminal import console, say

INTERRUPTS = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated, signal.SIGHUP: HungUp}
LIMITS = {errno.EMFILE: "raise the limit of open files (ulimit -n)", errno.ENFILE: "close files elsewhere"}


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM and SIGHUP interrupt what runs, as Ctrl-C does; those that were ignored (nohup) stay so."""
    main = threading.current_thread() is threading.main_thread()  # no other may
    before = {number: signal.getsignal(number) for number in INTERRUPTS if main}
    before = {number: handler for number, handler in before.items() if handler != signal.SIG_IGN}
    for number in before:
        signal.signal(number, _interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(number: int, frame: object) -> NoReturn:
    raise INTERRUPTS[signal.Signals(number)]


def deaf() -> None:
    """No signal disturbs what is left to do: to say how it ended."""
    if threading.current_thread() is threading.main_thread():
        for number in INTERRUPTS:
            signal.signal(number, signal.SIG_IGN)


@contextmanager
def errors(as_json: bool) -> Iterator[None]:
    """Errors a user can act on become one message and an exit code, and so do signals."""
    with interruptible():
        try:
            yield
        except AlreadyDone as done:
            say({"done": str(done)} if as_json else str(done))
            raise typer.Exit() from None
        except TheseusError as error:
            _fail(str(error), error.exit_code, as_json)
        except (MemoryError, RuntimeError) as error:
            _fail(*_of_resources(error), as_json)
        except OSError as error:
            cure = LIMITS.get(error.errno or 0, "check the path, its permissions and the disk")
            _fail(f"{error}; {cure}", 4, as_json)
        except KeyboardInterrupt as error:
            deaf()
            code = getattr(error, "exit_code", 130)
            _fail(str(error) or "interrupted; nothing was written", code, as_json)


def _of_resources(error: MemoryError | RuntimeError) -> tuple[str, int]:
    """What to say of memory or threads that did not suffice, and the exit code; any other error goes on."""
    from ..machine import out_of_memory

    if out_of_memory(error):
        return f"out of memory: {error}; free some, lower --batch-size, or use smaller models", 4
    if "can't start new thread" in str(error):
        return f"{error}; raise the limit of processes (ulimit -u)", 4
    raise error


def _fail(message: str, code: int, as_json: bool) -> NoReturn:
    with suppress(ResourceError):  # the exit code tells it too
        if as_json:
            say({"error": message, "exit_code": code})
    screen = console(stderr=True)
    screen.print("[bold red]error[/]", end=" ")
    screen.print(message, markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(code)
