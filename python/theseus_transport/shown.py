"""Text for people, on a screen or a page: what others wrote is shown and commands nothing; shares in percent."""

from __future__ import annotations

import re

# C0 and C1 controls, zero width, line separators, bidirectional overrides, halves of surrogate pairs, byte order marks
COMMANDS = re.compile(
    "[\\x00-\\x09\\x0b-\\x1f\\x7f-\\x9f\\u061c\\u200b-\\u200f\\u2028-\\u202e\\u2060-\\u2069\\ud800-\\udfff\\ufeff\\ufff9-\\ufffb]"
)


def visible(text: str) -> str:
    """The text; characters that a terminal obeys rather than shows, line breaks apart, are escaped as Python would."""
    return COMMANDS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def in_page(text: object) -> str:
    """A name or a message as one line of Markdown, :func:`visible`, in code or not: it opens and ends no markup."""
    line = visible(" ".join(str(text).split("\n")))
    for mark, shown in (("&", "&amp;"), ("<", "&lt;"), ("`", "'"), ("|", "\\|"), ("](", "]\\(")):
        line = line.replace(mark, shown)
    return line


def percent(share: float, digits: int = 0) -> str:
    """A share (1 is all) in percent; above 1000 % only that: rounding may cost any number of times a tiny update."""
    return f"{share:.{digits}%}" if share <= 10 else "over 1000%"
