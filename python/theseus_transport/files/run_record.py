"""The record of an unfinished run: its last commit, what must be the same to go on, and who is at work on it."""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import InputRefused
from .headers import digest, inside, read_json
from .result_folder import sync, write_file

log = logging.getLogger(__name__)
FORMAT = 2
JOURNAL, NEXT, LOCK = "journal.json", "journal.json.next", "lock"
NAMED = 5  # differences a message names
WORDS = {"size": "size in bytes", "mtime_ns": "time of change in ns", "header_blake2b": "header", "blake2b": "content"}


@dataclass(frozen=True)
class Record:
    """What `journal.json` holds.

    Attributes:
        key: JSON of all that decides what is written; plan: digest of where the tensors lie.
        step: commits so far; state: JSON of the last; tensors: digest of the header of its own, "" where it has none.
        written, dropped: names of tensors.
        whole: every folder is complete and waits for its name.
    """

    key: dict[str, Any]
    plan: str
    step: int = 0
    state: dict[str, Any] = field(default_factory=dict)
    tensors: str = ""
    written: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    whole: bool = False

    @property
    def begun(self) -> bool:
        """Whether there is something to lose."""
        return self.step > 0 or self.whole

    def save(self, folder: Path) -> None:
        """Replace the record of a folder: by one rename, durable."""
        write_file(folder / NEXT, json.dumps(signed({"format": FORMAT, **vars(self)})))
        os.replace(folder / NEXT, folder / JOURNAL)
        sync(folder)

    @classmethod
    def load(cls, folder: Path) -> Record | None:
        """The record of a folder, None where there is none; InputRefused for what `save` does not write."""
        if not os.path.lexists(folder / JOURNAL):
            return None
        found = read_json(inside(folder, JOURNAL))
        whole = found == signed(found)
        found.pop("blake2b", None)
        if found.pop("format", None) != FORMAT:
            raise InputRefused(f"{folder / JOURNAL} is of another version of this program; remove {folder}")
        kinds = {name: type(getattr(cls({}, ""), name)) for name in cls.__dataclass_fields__}
        names = [*listed] if isinstance(listed := found.get("written"), list) else []
        names += [*listed] if isinstance(listed := found.get("dropped"), list) else []
        if not whole or {name: type(value) for name, value in found.items()} != kinds or found["step"] < 0 or any(
            not isinstance(name, str) for name in names
        ):  # fmt: skip
            raise InputRefused(f"{folder / JOURNAL} is damaged; remove {folder}")
        return cls(**found)

    def changes(self, key: Mapping[str, Any]) -> str:
        """What differs between the key of this record and another, in words; of many differences the first."""
        before, now = dict(_leaves(self.key)), dict(_leaves(key))
        missing = object()
        changed = [
            f"{name} is {_said(now, name)}, was {_said(before, name)}"
            for name in {**before, **now}
            if before.get(name, missing) != now.get(name, missing)
        ]
        return "; ".join(changed[:NAMED]) + (f" and {len(changed) - NAMED} more" if len(changed) > NAMED else "")


def signed(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record (JSON) with the digest that tells whether it is as it was saved."""
    rest = {key: value for key, value in record.items() if key != "blake2b"}
    return {**rest, "blake2b": digest(json.dumps(rest, sort_keys=True).encode())}


def _leaves(key: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    for name, value in key.items():
        below = path if name == "files" else (*path, WORDS.get(name, name))
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, below)
        else:
            yield " ".join(below), value


def _said(leaves: Mapping[str, Any], name: str) -> str:
    return json.dumps(leaves[name]) if name in leaves else "absent"


def lock(folder: Path) -> int:
    """Make this process the one at work on a folder, until it closes the descriptor or dies; InputRefused if it cannot.

    The file tells the number of the process. A lock that the system keeps is free the moment its process is killed.
    """
    gone = InputRefused(f"another process has just removed {folder}; run again")
    try:
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    except FileNotFoundError:
        raise gone from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        other = os.read(descriptor, 20).decode(errors="replace").strip()
        os.close(descriptor)
        raise InputRefused(f"process {other} is at work in {folder}; wait for it, or stop it first") from None
    except OSError as error:  # a file system that knows no locks
        log.warning("%s cannot be locked (%s): let no second process write there", folder, error)
    if not os.fstat(descriptor).st_nlink:  # it ended between these two lines
        os.close(descriptor)
        raise gone
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor
