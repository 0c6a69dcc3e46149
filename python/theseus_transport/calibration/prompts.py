"""What a model is given to go on with when it samples text: lines of text, or chats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from ..errors import InputRefused
from ..files.headers import read_file
from .chat import ChatTemplate
from .documents import LINES, log, refuse_other_files
from .formats import Example, read_prompt

MOST = 16 << 20  # bytes of a file of prompts


class Prompt(NamedTuple):
    """A text to go on with; `told` by a chat template, so that its special tokens are in it already."""

    text: str
    told: bool = False


def read_prompts(path: Path, template: ChatTemplate | None, *, skip_bad: bool = False) -> list[Prompt]:
    """The prompts in a file: each line of a text, or, of .jsonl, what each record asks.

    A record is one of training data, whose answer is left out, or holds a `prompt` alone. Chats are told by `template`
    up to where the model answers; without one, as lines of `role: content`.

    Args:
        skip_bad: leave out lines that cannot be read, and count them.

    Raises:
        InputRefused: there is no such file, it is no utf-8, or holds no prompt; a line that is malformed.
    """
    if not path.is_file():
        raise InputRefused(f"--prompts {path} is no file; give a text, a prompt a line, or records as .jsonl")
    refuse_other_files(path)
    try:
        text = read_file(path, most=MOST).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputRefused(f"--prompts {path} is no utf-8 text (byte {error.start}); convert it") from None
    lines = [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    if path.suffix.lower() not in LINES:
        found = [Prompt(line.rstrip("\r")) for _, line in lines]
    else:
        found = _of_records(path, lines, template, skip_bad)
    if not found:
        raise InputRefused(f"--prompts {path} holds no prompt; give a text, a prompt a line, or leave it out")
    return found


def _of_records(
    path: Path, lines: list[tuple[int, str]], template: ChatTemplate | None, skip_bad: bool
) -> list[Prompt]:
    found, bad = [], list[int]()
    for number, line in lines:
        try:
            prompt = _told(read_prompt(json.loads(line)), template)
            prompt.text.encode()  # JSON can spell halves of characters
            found.append(prompt)
        except (ValueError, RecursionError) as error:  # no JSON and no utf-8 are ValueErrors too
            if not skip_bad:
                raise InputRefused(f"{path} line {number}: {error}; mend it, or --skip-bad-inputs") from None
            bad.append(number)
    if bad:
        log.warning("%d lines of %s cannot be read and were left out, first line %d", len(bad), path.name, bad[0])
    return found


def _told(example: Example, template: ChatTemplate | None) -> Prompt:
    if isinstance(example.said, str):
        return Prompt(example.said)
    if template is None:
        return Prompt(f"{example.text()}\nassistant:")
    return Prompt(template(example.said, example.tools, asking=True), told=True)
