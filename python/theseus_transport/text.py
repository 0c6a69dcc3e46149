"""Text as calibration data: sampled in pieces, tokenized by both models, packed so that row i is the same text."""

from __future__ import annotations

import io
import itertools
import json
import logging
import random
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from .chat import ChatTemplate
from .errors import InputRefused
from .headers import if_inside, open_regular
from .loading import tokenizer_of

log = logging.getLogger(__name__)

PIECE = 4096  # characters: about the unit in which text is sampled
ENCODED_AT_ONCE = 8  # pieces
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json",
                   "sentencepiece.bpe.model")  # fmt: skip


def read_pieces(path: Path) -> list[str]:
    """The pieces of a utf-8 file; InputRefused names the byte that is not utf-8."""
    try:
        with io.TextIOWrapper(open_regular(path), encoding="utf-8") as file:
            text = file.read()
    except UnicodeDecodeError as error:
        raise InputRefused(
            f"{path} is no utf-8 text (byte {error.start}); convert it, or give a .safetensors"
        ) from None
    if not text.strip():
        raise InputRefused(f"{path} holds no text")
    return _pieces(text)


def read_records(path: Path, tokenizers: Sequence[Tokenizer], *, skip_bad: bool) -> list[str]:
    """The texts of a .jsonl, each a piece: lines of {"text": ...} or {"messages": [{"role", "content"}, ...]}.

    Messages are joined by the first chat template the tokenizers have, or as `role: content`, so that both read the
    same. InputRefused names the line that is malformed; with `skip_bad` such lines are left out and counted.
    """
    found, bad = [], []
    with open_regular(path) as file:
        lines = file.read().splitlines()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found += _pieces(_text_of(json.loads(line), tokenizers).rstrip() + "\n")
        except (ValueError, RecursionError) as error:  # no JSON and no utf-8 are ValueErrors too
            if not skip_bad:
                raise InputRefused(f"{path} line {number}: {error}; mend it, or --skip-bad-inputs") from None
            bad.append(number)
    if bad:
        log.warning("%d lines of %s cannot be read and were left out, first line %d", len(bad), path.name, bad[0])
    if not found:
        raise InputRefused(f"{path} holds no text")
    return found


def _text_of(record: Any, tokenizers: Sequence[Tokenizer]) -> str:
    """The text of one record; ValueError says what is wrong with it."""
    if not isinstance(record, dict) or ("text" in record) == ("messages" in record):
        raise ValueError("expected an object with either text or messages")
    if "text" in record:
        if not isinstance(record["text"], str):
            raise ValueError(f"text is a {type(record['text']).__name__}, expected a string")
        return record["text"]
    messages = record["messages"]
    plain = isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    )
    if not plain or not messages:
        raise ValueError("messages must be a list of objects with role and content, both strings")
    template = next((t.chat for t in tokenizers if t.chat), None)
    if template is None:
        return "\n".join(f"{m['role']}: {m['content']}" for m in messages)
    return template(messages)


def builtin_pieces() -> list[list[str]]:
    """Two groups that every Python has: its documentation topics (English) and the sources of its standard library."""
    from pydoc_data.topics import topics

    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = (
        [topics[name] for name in sorted(topics)],
        [s.read_text(encoding="utf-8", errors="replace") for s in sources],
    )
    return [[piece for text in group for piece in _pieces(text)] for group in texts]


def _pieces(text: str) -> list[str]:
    found, start = [], 0
    while start < len(text):
        stop = text.find("\n", start + PIECE, start + 2 * PIECE) + 1 or start + 2 * PIECE
        found.append(text[start:stop])
        start = stop
    return found


class Tokenizer:
    """A model's own tokenizer, from its folder only; `prefix` and `suffix` are the special tokens around a text."""

    def __init__(self, folder: Path, name: str, vocab_size: int | None) -> None:
        """Load it; InputRefused with the cure if the folder has none."""
        self.name = name
        if not any(if_inside(folder, file) for file in TOKENIZER_FILES):
            raise InputRefused(
                f"{name}: {folder} has no tokenizer; copy the model's tokenizer files there, or give --calibration "
                "with a .safetensors of input_ids [n, tokens]"
            )
        self._call: Any = tokenizer_of(folder)
        plain, whole = self._call("a", add_special_tokens=False)["input_ids"], self._call("a")["input_ids"]
        place = next((i for i in range(len(whole)) if plain and whole[i : i + len(plain)] == plain), 0)
        added = len(whole) > len(plain)
        self.prefix: list[int] = whole[:place] if added else []
        self.suffix: list[int] = whole[place + len(plain) :] if added else []
        pad = self._call.pad_token_id
        self.pad = pad if pad is not None and pad < (vocab_size or pad + 1) else 0
        self.exact = bool(self._call.is_fast)  # only those know offsets
        self.chat: Callable[[list[Any]], str] | None = None  # messages -> text, where there is a chat template
        if getattr(self._call, "chat_template", None):
            tokens = {key: value for key, value in self._call.special_tokens_map.items() if isinstance(value, str)}
            self.chat = ChatTemplate(self._call.get_chat_template(), tokens, name)

    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        """Token ids [tokens] and character offsets [tokens, 2] (zeros if not `exact`) of each text, nothing added."""
        options = {"return_offsets_mapping": True} if self.exact else {}
        found = self._call(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False, **options)
        offsets = found.get("offset_mapping") or [[(0, 0)] * len(ids) for ids in found["input_ids"]]
        return [
            Encoded(np.asarray(ids, dtype=np.int64), np.asarray(spans, dtype=np.int64).reshape(-1, 2))
            for ids, spans in zip(found["input_ids"], offsets, strict=True)
        ]


class Encoded(NamedTuple):
    """A tokenized text: ids [tokens], offsets [tokens, 2] in characters."""

    ids: np.ndarray
    offsets: np.ndarray


def rows_of_text(
    groups: Sequence[Sequence[str]], tokenizers: tuple[Tokenizer, Tokenizer], *, tokens: int, length: int, seed: int
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Tensors of both sides, with at least `tokens` tokens each if the text has them, in rows of `length`.

    input_ids and attention_mask [n, length]; one dict for both where the tokenizers agree, else with offsets
    [n, length, 2]. Pieces are drawn with `seed`, alternating between groups, and stay in their order.
    """
    pieces, drawn = [piece for group in groups for piece in group], _draw([len(group) for group in groups], seed)
    source, target = tokenizers
    encoded: list[dict[int, Encoded]] = [{}, {}]
    counts = [0, 0]
    while drawn and min(counts) < tokens + length:
        chosen, drawn = drawn[:ENCODED_AT_ONCE], drawn[ENCODED_AT_ONCE:]
        for side, tokenizer in enumerate(tokenizers):
            same = side == 1 and target is source
            found = [encoded[0][i] for i in chosen] if same else tokenizer.encode([pieces[i] for i in chosen])
            encoded[side].update(zip(chosen, found, strict=True))
            counts[side] += sum(len(each.ids) for each in found)
    if min(counts) == 0:
        raise InputRefused(
            f"{source.name if counts[0] == 0 else target.name}: its tokenizer finds no token in the text"
        )
    order = sorted(encoded[0])
    ids = [np.concatenate([side[i].ids for i in order]) for side in encoded]
    agree = np.array_equal(ids[0], ids[1]) and (source.prefix, source.suffix) == (target.prefix, target.suffix)
    bodies = [length - len(each.prefix) - len(each.suffix) for each in tokenizers]
    if min(bodies) < 1:
        raise InputRefused(f"sequence length {length} leaves no room beside the special tokens; give a larger one")
    if agree:
        starts = list(range(0, max(1, len(ids[0]) - bodies[0] + 1), bodies[0]))  # an incomplete last row only if alone
        shared = _side(source, ids[0], None, [(start, start + bodies[0]) for start in starts])
        return shared, shared
    if inexact := [each.name for each in tokenizers if not each.exact]:
        raise InputRefused(
            f"{source.name} and {target.name} tokenize differently, and the tokenizer of {inexact[0]} gives no "
            "offsets; add its tokenizer.json, or give --calibration a .safetensors of source.… and target.… ids"
        )
    bases = np.cumsum([0, *(len(pieces[i]) for i in order[:-1])])
    spans = [np.concatenate([side[i].offsets + base for i, base in zip(order, bases, strict=True)]) for side in encoded]
    cuts = _common_cuts(spans[0][:, 1], spans[1][:, 1], bodies)
    if not cuts:
        raise InputRefused(
            f"{source.name} and {target.name} share no token boundary within {length} tokens of this text"
        )
    sides = [
        _side(tokenizer, ids[side], spans[side], [cut[side] for cut in cuts])
        for side, tokenizer in enumerate(tokenizers)
    ]
    return sides[0], sides[1]


def _draw(sizes: Sequence[int], seed: int) -> list[int]:
    """All indices of consecutive groups in random order, alternating between the groups."""
    chance, start, shuffled = random.Random(seed), 0, []
    for size in sizes:
        shuffled.append(chance.sample(range(start, start + size), size))
        start += size
    return [i for row in itertools.zip_longest(*shuffled) for i in row if i is not None]


def _common_cuts(
    source_ends: np.ndarray, target_ends: np.ndarray, bodies: Sequence[int]
) -> list[list[tuple[int, int]]]:
    """Greedy rows of at most `bodies` tokens, cut only where a token ends on both sides: (start, stop) per side.

    Ends, not starts, since tokenizers differ in which token owns the space between words.
    """
    ends = [np.maximum.accumulate(each) for each in (source_ends, target_ends)]
    common = np.intersect1d(ends[0], ends[1])
    places = [np.concatenate([[0], np.searchsorted(each, common, side="right")]) for each in ends]
    cuts, at = [], 0
    while at < len(common):
        reach = (np.searchsorted(p, p[at] + body, side="right") for p, body in zip(places, bodies, strict=True))
        stop = int(min(reach)) - 1
        if stop > at:
            cuts.append([(int(p[at]), int(p[stop])) for p in places])
        at = max(stop, at + 1)  # a stretch without a common cut is left out
    return cuts


def _side(
    tokenizer: Tokenizer, ids: np.ndarray, spans: np.ndarray | None, cuts: Sequence[tuple[int, int]]
) -> dict[str, torch.Tensor]:
    """Rows of special tokens around ids[start:stop], padded to the longest; offsets count from the row's start."""
    rows = [[*tokenizer.prefix, *ids[start:stop].tolist(), *tokenizer.suffix] for start, stop in cuts]
    width, skip = max(map(len, rows)), len(tokenizer.prefix)
    side = {
        "input_ids": torch.tensor([row + [tokenizer.pad] * (width - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
    }
    if spans is not None:
        offsets = np.zeros((len(rows), width, 2), dtype=np.int64)
        for row, (start, stop) in enumerate(cuts):
            origin = spans[start - 1, 1] if start else 0  # where the row before ended: the same character on both sides
            offsets[row, skip : skip + stop - start] = np.maximum(spans[start:stop] - origin, 0)
        side["offsets"] = torch.from_numpy(offsets)
    return side
