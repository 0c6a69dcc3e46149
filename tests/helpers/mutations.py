"""Ways to break any file of a folder at random: each takes a generator and a path, and says in words what it did."""

import copy
import json
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from helpers import hostile_folders

NESTED = "[" * 3000 + "]" * 3000
OBJECTS = '{"a":' * 300 + "1" + "}" * 300
RAW = ["1" * 5000, "1e400", "-0", "NaN", "-Infinity", '"\\ud800"', '"\\u0000"', NESTED, OBJECTS]
CONTROL = ["\x1b[31m\x1b]0;title\x07", "a\rb\x08", "\u202eevil", "\u200b\u2028", "<script>`|\n---\n#", "\x9b2J", "\x00"]
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 64, 10**6, 2**31, 2**63 - 1, 2**63, 10**19, 0.5, -2.5, 1e308, 1e-320,
    "", "x",
    "1", "true", "llama", "../x", "/etc/passwd", "x" * 5000, [], [[]], [None], [1, "a"], ["x"] * 50, {}, {"a": 1},
    {"": None}, {"a": {"b": []}}, [{}], *CONTROL, *([text] for text in CONTROL), *({text: 1} for text in CONTROL),
]  # fmt: skip
DTYPES = ["F64", "F32", "F16", "BF16", "I64", "I8", "U8", "BOOL", "F8_E4M3", "C64", "X", ""]
TEXTS = [
    b"", b"\xff\xfe", b"\x00" * 100, b"a" * 20_000, b"{" * 1000, b"\n" * 1000, b'{"text": 1}\n',
    b'{"text": "a"}\n' * 50,
    b'{"messages": [{"role": "\\u001b[31m", "content": "x"}]}\n',
    b'{"text": "' + b"\\u202e" * 200 + b'"}\n', b"[1, 2]\n",
    "\x1b]0;x\x07\u202e".encode() * 50, NESTED.encode(), b'{"messages": {}}\n', b'{"text": "a", "messages": []}',
    b"\r\r\r",
]  # fmt: skip
YAMLS = [
    "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nd: [*c, *c]\n",
    "a: &a\n  - *a\n", "!!python/object/apply:os.system ['touch pwned']", "{" * 500, "- 1\n", "tokens: [1, [2, [3]]]",
    "seed: 0x" + "f" * 500, "tokens: .nan", "alpha: .inf", "seed: 1_000", "1: 2", "null: 1", "alpha: '\x1b[31m'",
    "? [a]\n: b",
    'alpha: "\\u001b[31m"', "leave: {a: b}", "seed: 2020-01-01", "tokens: !!binary aGVsbG8=", "alpha: *nobody",
    "%YAML 9",
    "<<: {alpha: 2}", "<<: [1]", "seed: 60:60", "recipe: paper\nfloor: x", "device: 'cpu\\n'", "max_ram: 1e999",
    "alpha: " + "9" * 5000,
    "recipe: [paper]", "leave: ['[', '*', '']", "batch_size: true", "held_out: maybe", "out_dtype: 3",
    "tokens: 1.5", "\x00", "alpha: []",
]  # fmt: skip


def broken(path: Path, chance: random.Random) -> str:
    """Break one file by what its name says it is, or as any file may be broken."""
    kinds = {".json": in_json, ".jsonl": in_text, ".txt": in_text, ".jinja": in_text, ".safetensors": in_tensors}
    own = kinds.get(path.suffix)
    make = chance.choices([own or in_bytes, in_bytes, as_other], [8, 1, 2])[0]
    return f"{path.name}: {make(path, chance)}"


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    if len(path) > 20:  # broken so before
        return found
    if isinstance(value, dict):
        found += [place for key in value for place in _places(value[key], (*path, key))]
    if isinstance(value, list):
        found += [place for i in range(min(len(value), 4)) for place in _places(value[i], (*path, i))]
    return found


def _changed(value: Any, chance: random.Random) -> str:
    """Change one place of a JSON value, the upper ones more often."""
    places = _places(value)
    if not places:
        return "nothing"
    place = chance.choice(sorted(places, key=len)[: chance.choice((8, 40, 10**6))])
    inner = value
    for key in place[:-1]:
        inner = inner[key]
    key, how = place[-1], chance.random()
    if how < 0.1:
        del inner[key]
        return f"without {place}"
    if how < 0.2 and isinstance(inner, dict):
        inner[chance.choice(CONTROL)] = inner.pop(key)
        return f"{place} renamed"
    if how < 0.3 and isinstance(inner[key], (dict, list)):
        inner[key] = [inner[key]] if chance.random() < 0.5 else list(inner[key])
        return f"{place} in a list"
    if how < 0.4 and isinstance(inner[key], (int, float)):
        inner[key] = chance.choice((inner[key] + 1, -inner[key], inner[key] * 1000, float(inner[key]), str(inner[key])))
        return f"{place} is {inner[key]!r}"
    inner[key] = copy.deepcopy(chance.choice(VALUES))
    return f"{place} is {str(inner[key])[:40]!r}"


def in_json(path: Path, chance: random.Random) -> str:
    try:
        value = json.loads(path.read_text())
    except (ValueError, RecursionError):
        return in_bytes(path, chance)
    if chance.random() < 0.15:
        raw = chance.choice(RAW)
        marked = chance.choice(_places(value) or [()])
        inner = value
        for key in marked[:-1]:
            inner = inner[key]
        if marked:
            inner[marked[-1]] = "@@"
        path.write_text(json.dumps(value).replace('"@@"', raw))
        return f"{marked} is {raw[:20]}"
    said = [_changed(value, chance) for _ in range(chance.choice((1, 1, 1, 2, 4)))]
    path.write_text(json.dumps(value))
    return "; ".join(said)


def in_text(path: Path, chance: random.Random) -> str:
    if path.suffix == ".jinja":
        made = chance.choice((b"{% for a in", b"{{ 1 / 0 }}", b"{{ messages.__class__ }}", b"", b"\xff", b"{{ x.y }}"))
    else:
        made = chance.choice(TEXTS)
    path.write_bytes(made if chance.random() < 0.7 else path.read_bytes()[:500] + b"\n" + made)
    return f"holds {made[:30]!r}"


def in_bytes(path: Path, chance: random.Random) -> str:
    data = bytearray(path.read_bytes())
    if chance.random() < 0.4:
        size = chance.randrange(len(data) + 1)
        path.write_bytes(data[:size])
        return f"cut to {size}"
    for _ in range(chance.choice((1, 3, 30)) if data else 0):
        data[chance.randrange(min(len(data), chance.choice((64, 10**9))))] = chance.randrange(256)
    path.write_bytes(data)
    return "other bytes"


def in_tensors(path: Path, chance: random.Random) -> str:
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0] if len(data) > 8 else 0
    try:
        header = json.loads(data[8 : 8 + length])
    except (ValueError, RecursionError):
        return in_bytes(path, chance)
    names, body, how = [n for n in header if n != "__metadata__"], bytearray(data[8 + length :]), chance.randrange(6)
    name = chance.choice(names) if names else ""
    if how == 0:
        said = _changed(header, chance)
    elif how == 1 and name:
        said = f"{name} renamed"
        new = chance.choice((*CONTROL, "x")) + name
        header = {new if key == name else key: entry for key, entry in header.items()}
    elif how == 2 and name:
        header[name]["dtype"], said = chance.choice(DTYPES), f"{name} of another dtype"
    elif how == 3 and name:
        header[name]["shape"] = header[name]["shape"][::-1] + [1] * chance.randrange(2)
        said = f"{name} of another shape"
    elif how == 4 and name:
        first, last = header[name]["data_offsets"]
        value = chance.choice((b"\0", b"\xff", b"\x7f", b"\x80\x7f", b"\xc0\x7f"))
        body[first:last] = (value * (last - first))[: last - first]
        said = f"{name} all {value!r}"
    else:
        size = chance.randrange(len(body) + 1)
        body[size:], said = b"", f"{size} bytes of data"
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return said


def as_other(path: Path, chance: random.Random) -> str:
    """Something else in its place."""
    path.unlink()
    links = ("/etc/passwd", "/dev/zero", "/dev/stdin", path.name, "absent", "..", "../outside/secret", "x" * 300)
    others: dict[str, Callable[[], object]] = {
        "nothing": lambda: None,
        "a pipe": lambda: os.mkfifo(path),
        "a folder": path.mkdir,
        "a socket": lambda: hostile_folders.socket(path),
        **{f"a link to {to[:20]}": lambda to=to: path.symlink_to(to) for to in links},  # type: ignore[misc]
    }
    said = chance.choice(sorted(others))
    others[said]()
    return f"is {said}"
