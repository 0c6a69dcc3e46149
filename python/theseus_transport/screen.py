"""Errors of a command: one message on the screen, and an exit code."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer

from .errors import AlreadyDone, TheseusError
from .terminal import console


@contextmanager
def errors(as_json: bool) -> Iterator[None]:
    """Errors a user can act on become one message and an exit code."""
    try:
        yield
    except AlreadyDone as done:
        if as_json:
            print(json.dumps({"done": str(done)}))
        else:
            console().print(str(done), markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit() from None
    except TheseusError as error:
        _fail(str(error), error.exit_code, as_json)
    except (MemoryError, RuntimeError) as error:
        from .checks import out_of_memory

        if not out_of_memory(error):
            raise
        _fail(f"out of memory: {error}; free some, lower --batch-size, or use smaller models", 4, as_json)
    except OSError as error:
        _fail(f"{error}; check the path, its permissions and the disk", 4, as_json)
    except KeyboardInterrupt as error:
        _fail(str(error) or "interrupted; nothing was written", 130, as_json)


def _fail(message: str, code: int, as_json: bool) -> NoReturn:
    if as_json:
        print(json.dumps({"error": message, "exit_code": code}))
    screen = console(stderr=True)
    screen.print("[bold red]error[/]", end=" ")
    screen.print(message, markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(code)
