"""What people see: a terminal, or a page, shows what would command it, such as escape sequences in a tensor's name."""

from __future__ import annotations

import re
from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

# C0 and C1 controls, zero width, line separators, bidirectional overrides, halves of surrogate pairs, byte order marks
COMMANDS = re.compile(
    "[\\x00-\\x09\\x0b-\\x1f\\x7f-\\x9f\\u061c\\u200b-\\u200f\\u2028-\\u202e\\u2060-\\u2069\\ud800-\\udfff\\ufeff\\ufff9-\\ufffb]"
)


def visible(text: str) -> str:
    """The text with every character but line breaks that is a command, not to be seen, written as Python would."""
    return COMMANDS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def in_page(text: object) -> str:
    """A name or a message within a line of Markdown, in code or not: it opens and ends nothing."""
    line = visible(" ".join(str(text).split("\n")))
    for mark, shown in (("&", "&amp;"), ("<", "&lt;"), ("`", "'"), ("|", "\\|"), ("](", "]\\(")):
        line = line.replace(mark, shown)
    return line


class Terminal(Console):
    """A console that makes all text :func:`visible`; colours and cursor movement of its own stay."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)


def console(*, stderr: bool = False) -> Console:
    """Where all that the command says and logs goes, but for JSON, which escapes by itself."""
    return Terminal(stderr=stderr, soft_wrap=False)
