"""What people see: a terminal, or a page, shows what would command it, such as escape sequences in a tensor's name."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from ..errors import ResourceError
from ..shown import visible


class Terminal(Console):
    """A console that makes all text :func:`visible`; colours and cursor movement of its own stay."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)


class Reader:
    """A standard stream whose reader may go away: what it misses is lost, and nothing else; ``error`` says why."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.error: OSError | None = None

    @property
    def _stream(self) -> TextIO:
        """The stream of now, behind what rich puts in its place while a progress bar is shown."""
        stream: TextIO = getattr(sys, self._name)
        return getattr(stream, "rich_proxied_file", stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self.error = error
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self.error = error


def console(*, stderr: bool = False) -> Console:
    """The console for all that the command says and logs, but for JSON, which escapes by itself; see :func:`say`."""
    return Terminal(file=Reader("stderr" if stderr else "stdout"))  # type: ignore[arg-type]


def say(what: RenderableType | dict[str, Any]) -> None:
    """Print a result: JSON of a dictionary, a text as it stands, or what is drawn.

    A reader that has seen enough (``| head``) is no error.

    Raises:
        ResourceError: it cannot be written for another reason, as to a full disk.
    """
    reader: Any = Reader("stdout")
    if isinstance(what, dict):
        print(json.dumps(what, indent=1), file=reader, flush=True)
    elif isinstance(what, str):
        Terminal(file=reader).print(what, markup=False, highlight=False, soft_wrap=True)
    else:
        Terminal(file=reader).print(what, crop=False)
    if reader.error and reader.error.errno != errno.EPIPE:
        raise ResourceError(f"standard output cannot be written: {reader.error.strerror}; all else is done")


@contextmanager
def standard_streams() -> Iterator[None]:
    """Streams that show every text, closed ones replaced; nothing is left for the interpreter to fail on at its end."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: no file of ours may get it
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:  # what is left would be tried again
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
