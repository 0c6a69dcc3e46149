"""Text on disk: pieces of a file, or records line by line, of which only what is drawn is read."""

from __future__ import annotations

import codecs
import json
import logging
import shlex
import sysconfig
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, overload

from ..errors import InputRefused
from ..files.headers import open_regular
from .formats import Example, Template, read_example

log = logging.getLogger(__name__)
PIECE = 4096  # bytes: about the unit in which text is sampled
BLOCK = 1 << 20  # bytes read at a time
LINES = (".jsonl", ".ndjson", ".json")
_JSON = "import json, sys; [print(json.dumps(record)) for record in json.load(sys.stdin)]"
_CSV = "import csv, json, sys; [print(json.dumps(row)) for row in csv.DictReader(sys.stdin{})]"
_PARQUET = (
    "import io, pandas, sys; "
    'print(pandas.read_parquet(io.BytesIO(sys.stdin.buffer.read())).to_json(orient="records", lines=True))'
)
_ARROW = (
    "import io, json, pyarrow.ipc, sys; "
    "[print(json.dumps(row)) for batch in pyarrow.ipc.open_stream(sys.stdin.buffer) for row in batch.to_pylist()]"
)
PROGRAMS = {".csv": _CSV.format(""), ".tsv": _CSV.format(', delimiter="\\t"'), ".parquet": _PARQUET, ".arrow": _ARROW}
UNPACK = {".gz": "gzip -dc", ".bz2": "bzip2 -dc", ".xz": "xz -dc", ".zst": "zstd -dc"}
TENSORS = (".npy", ".npz", ".pt", ".pth", ".bin", ".pkl")


class TextFile(Sequence[str]):
    """The pieces of a utf-8 file, each read when it is asked for; it is checked whole before."""

    def __init__(self, path: Path) -> None:
        """InputRefused names the byte that is not utf-8."""
        self._path, self._cuts, blank = path, array("Q"), True
        with open_regular(path) as file:
            at = _start(file.read(len(codecs.BOM_UTF8)))
            file.seek(at)
            self._cuts.append(at)
            while piece := file.read(PIECE) + file.readline(PIECE):
                try:
                    text, used = codecs.utf_8_decode(piece, "strict", False)
                except UnicodeDecodeError as error:
                    raise _no_text(path, at + error.start) from None
                if not used:  # a character that never ends
                    raise _no_text(path, at)
                if used < len(piece):
                    file.seek(at + used)
                blank, at = blank and not text.strip(), at + used
                self._cuts.append(at)
        if blank:
            raise InputRefused(f"{path} holds no text")

    @property
    def words(self) -> str:
        return "plain text"

    def __len__(self) -> int:
        return len(self._cuts) - 1

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> list[str]: ...
    def __getitem__(self, i: int | slice) -> str | list[str]:
        if isinstance(i, slice):
            return [self[k] for k in range(len(self))[i]]
        with open_regular(self._path) as file:
            file.seek(self._cuts[i])
            text = file.read(self._cuts[i + 1] - self._cuts[i]).decode(errors="replace")
        return text.replace("\r\n", "\n").replace("\r", "\n")


class Records(Sequence[str]):
    """The records of a file of JSON lines in pieces, each read when it is asked for; all are checked before.

    A chat is told through `template`, if there is one, so that both models read the same.
    """

    def __init__(self, path: Path, template: Template | None, *, skip_bad: bool) -> None:
        """InputRefused names the line that is malformed; with `skip_bad` such lines are left out and counted."""
        _check_lines(path)
        self._path, self._template, self._skip_bad = path, template, skip_bad
        self._starts, self._ends = array("Q"), array("Q", [0])  # of a record's line; pieces up to each record
        self._used: dict[int, str] = {}  # record -> format
        self._bad: dict[int, str] = {}  # a line's start -> what is wrong with it
        with open_regular(path) as file:
            at = _start(file.read(len(codecs.BOM_UTF8)))
            file.seek(at)
            for line in file:
                if line.strip() and (example := self._example(at, line)):
                    self._starts.append(at)
                    self._ends.append(self._ends[-1] + 1 + len(example.text()) // (2 * PIECE))
                at += len(line)
        if self._bad:
            first = self._line_of(next(iter(self._bad)))
            log.warning(
                "%d lines of %s cannot be read and were left out, first line %d", len(self._bad), path.name, first
            )
        if not self._starts:
            raise InputRefused(f"{path} holds no text")

    @property
    def words(self) -> str:
        """The formats, and how many records were used and skipped."""
        formats = ", ".join(sorted(set(self._used.values())))
        skipped = f", {len(self._bad)} skipped" if self._bad else ""
        return f"{formats}: {len(self._used)} of {len(self._starts)} records{skipped}"

    def __len__(self) -> int:
        return self._ends[-1]

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> list[str]: ...
    def __getitem__(self, i: int | slice) -> str | list[str]:
        if isinstance(i, slice):
            return [self[k] for k in range(len(self))[i]]
        record = bisect_right(self._ends, i) - 1
        at = self._starts[record]
        if at in self._bad:
            return ""
        with open_regular(self._path) as file:
            file.seek(at)
            example = self._example(at, file.readline())
        try:
            text = example.text(self._template).rstrip() + "\n" if example else ""
        except ValueError as error:
            self._refuse(at, error)
            log.warning("line %d of %s was left out: %s", self._line_of(at), self._path.name, error)
            return ""
        self._used[record] = example.format if example else ""
        part, parts = i - self._ends[record], self._ends[record + 1] - self._ends[record]
        return text[len(text) * part // parts : len(text) * (part + 1) // parts]

    def _example(self, at: int, line: bytes) -> Example | None:
        try:
            example = read_example(json.loads(line))
            example.text().encode()  # JSON can spell halves of characters
            return example
        except json.JSONDecodeError as error:  # whose own words count lines within this one
            self._refuse(at, ValueError(f"{error.msg} at character {error.pos + 1}"))
        except (ValueError, RecursionError) as error:  # no utf-8 is a ValueError too
            self._refuse(at, error)
        return None

    def _refuse(self, at: int, error: Exception) -> None:
        if not self._skip_bad:
            told = f"{self._path} line {self._line_of(at)}: {error}"
            raise InputRefused(f"{told}; mend it, or --skip-bad-inputs") from None
        self._bad[at] = str(error)

    def _line_of(self, at: int) -> int:
        """The number of the line that begins at this byte."""
        with open_regular(self._path) as file:
            return 1 + sum(file.read(min(BLOCK, at - k)).count(b"\n") for k in range(0, at, BLOCK))


class Size(NamedTuple):
    """How long a file of text is: its lines, and the bytes of the longest."""

    lines: int
    longest: int


def measured(path: Path) -> Size:
    """Reads all of a file once, holding little of it."""
    lines = longest = length = 0
    with open_regular(path) as file:
        for block in iter(lambda: file.read(BLOCK), b""):
            first, *more = block.split(b"\n")
            length += len(first)
            for line in more:
                lines, longest, length = lines + 1, max(longest, length), len(line)
    return Size(lines + 1, max(longest, length))


def builtin_pieces() -> list[list[str]]:
    """Two groups that every Python has: its documentation topics (English) and the sources of its standard library."""
    from pydoc_data.topics import topics

    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = (
        [topics[name] for name in sorted(topics)],
        [s.read_text(encoding="utf-8", errors="replace") for s in sources],
    )
    return [[piece for text in group for piece in _pieces(text)] for group in texts]


def refuse_other_files(path: Path) -> None:
    """Refuse a file that is neither text nor lines of records, by its name, with what makes it one that is read."""
    kind, made = path.suffix.lower(), path.with_suffix(".jsonl")
    if kind in PROGRAMS:
        raise InputRefused(f"calibration {path} is {kind[1:]}; make lines of records of it: {_made(kind, path, made)}")
    if kind in UNPACK:
        out = path.with_suffix("")
        raise InputRefused(
            f"calibration {path} is compressed; unpack it: {UNPACK[kind]} {_quoted(path)} > {_quoted(out)}"
        )
    if kind in TENSORS:
        raise InputRefused(
            f"calibration {path} is {kind[1:]}, of which only .safetensors is read; in Python: "
            f"safetensors.torch.save_file({{'input_ids': ids}}, {str(path.with_suffix('.safetensors'))!r}), "
            "ids int64 [n, tokens]"
        )


def _check_lines(path: Path) -> None:
    """Refuse one JSON value over a whole file: lines are read one by one."""
    with open_regular(path) as file:
        head = file.read(BLOCK).removeprefix(codecs.BOM_UTF8).lstrip()
    if head.startswith(b"["):
        made = path.with_suffix(".jsonl") if path.suffix == ".json" else path.with_suffix(".lines.jsonl")
        cure = _made(".json", path, made)
        raise InputRefused(f"calibration {path} is a JSON list; make lines of records of it: {cure}")
    if head.partition(b"\n")[0].strip() == b"{":
        raise InputRefused(f"calibration {path} is one JSON object over many lines; give a record a line, as .jsonl")


def _made(kind: str, path: Path, made: Path) -> str:
    """A command that writes lines of records."""
    return f"python3 -c '{PROGRAMS.get(kind, _JSON)}' < {_quoted(path)} > {_quoted(made)}"


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def _start(first: bytes) -> int:
    return len(codecs.BOM_UTF8) if first == codecs.BOM_UTF8 else 0


def _no_text(path: Path, byte: int) -> InputRefused:
    return InputRefused(f"{path} is no utf-8 text (byte {byte}); convert it, or give a .safetensors")


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        stop = text.find("\n", start + PIECE, start + 2 * PIECE) + 1 or start + 2 * PIECE
        yield text[start:stop]
        start = stop
