"""Text as calibration data: sampled in pieces, tokenized by both models, packed so that row i is the same text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ..errors import InputRefused
from ..files.companions import has_tokenizer
from ..models.loading import refused, tokenizer_of
from ..models.pair import Pair
from .chat import ChatTemplate

LENGTH = 512  # tokens of a row of text
ENCODED_AT_ONCE = 8  # pieces


class Tokenizer:
    """A model's own tokenizer, from its folder only; `prefix` and `suffix` are the special tokens around a text.

    `plain` is the tokenizer as transformers has it.
    """

    def __init__(self, folder: Path, name: str, vocab_size: int | None) -> None:
        """Load it; InputRefused with the cure if the folder has none."""
        self.name = name
        if not has_tokenizer(folder):
            raise InputRefused(
                f"{name}: {folder} has no tokenizer; copy the model's tokenizer files there, or give --calibration "
                "with a .safetensors of input_ids [n, tokens]"
            )
        self.plain: Any = tokenizer_of(folder)
        self._says = f"the tokenizer in {folder} does not work"
        with refused(self._says):
            plain, whole = self.plain("a", add_special_tokens=False)["input_ids"], self.plain("a")["input_ids"]
            place = next((i for i in range(len(whole)) if plain and whole[i : i + len(plain)] == plain), 0)
            added = len(whole) > len(plain)
            self.prefix: list[int] = whole[:place] if added else []
            self.suffix: list[int] = whole[place + len(plain) :] if added else []
            pad = self.plain.pad_token_id
            self.pad = pad if pad is not None and pad < (vocab_size or pad + 1) else 0
            self.exact = bool(self.plain.is_fast)  # only those know offsets
            self.chat: ChatTemplate | None = None  # where there is a chat template
            template = getattr(self.plain, "chat_template", None)
            if isinstance(template, dict):  # by name; other names are asked for
                template = template.get("default")
            if template:
                tokens = {key: value for key, value in self.plain.special_tokens_map.items() if isinstance(value, str)}
                self.chat = ChatTemplate(template, tokens, name)

    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        """Token ids [tokens] and character offsets [tokens, 2] (zeros if not `exact`) of each text, nothing added."""
        options = {"return_offsets_mapping": True} if self.exact else {}
        options |= {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        with refused(self._says):
            found = self.plain(list(texts), **options)
        offsets = found.get("offset_mapping") or [[(0, 0)] * len(ids) for ids in found["input_ids"]]
        return [
            Encoded(np.asarray(ids, dtype=np.int64), np.asarray(spans, dtype=np.int64).reshape(-1, 2))
            for ids, spans in zip(found["input_ids"], offsets, strict=True)
        ]


class Encoded(NamedTuple):
    """A tokenized text: ids [tokens], offsets [tokens, 2] in characters."""

    ids: np.ndarray
    offsets: np.ndarray


def enough_texts(batches: Iterable[Sequence[str]], tokenizers: Pair[Tokenizer], tokens: int) -> list[str]:
    """As many texts as hold so many tokens of both tokenizers, each a line or more of its own."""
    texts, counts = list[str](), [0, 0]
    for batch in batches:
        lines = [f"{text.rstrip()}\n" for text in batch]
        texts += lines
        counts = [
            count + sum(len(each.ids) for each in tokenizer.encode(lines)) if lines else count
            for count, tokenizer in zip(counts, tokenizers, strict=True)
        ]
        if min(counts) >= tokens:
            break
    return texts


Place = tuple[int, int]  # of a piece: its group, and which of it


def rows_of_text(
    groups: Sequence[Sequence[str]], tokenizers: Pair[Tokenizer], *, tokens: int, length: int, seed: int
) -> Pair[dict[str, torch.Tensor]]:
    """Tensors of both sides, with at least `tokens` tokens each if the text has them, in rows of `length`.

    input_ids and attention_mask [n, length]; one dict for both where the tokenizers agree, else with offsets
    [n, length, 2]. Pieces are drawn with `seed`, alternating between groups, and stay in their order.
    """
    drawn = _draw([len(group) for group in groups], seed)
    source, target = tokenizers
    encoded: list[dict[Place, Encoded]] = [{}, {}]
    counts, lengths = [0, 0], dict[Place, int]()
    while min(counts) < tokens + length and (chosen := list(islice(drawn, ENCODED_AT_ONCE))):
        pieces = [groups[group][i] for group, i in chosen]
        lengths.update(zip(chosen, map(len, pieces), strict=True))
        for side, tokenizer in enumerate(tokenizers):
            same = side == 1 and target is source
            found = [encoded[0][i] for i in chosen] if same else tokenizer.encode(pieces)
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
        shared = _side(source, ids[0], None, [(start, min(start + bodies[0], len(ids[0]))) for start in starts])
        return Pair(shared, shared)
    if inexact := [each.name for each in tokenizers if not each.exact]:
        raise InputRefused(
            f"{source.name} and {target.name} tokenize differently, and the tokenizer of {inexact[0]} gives no "
            "offsets; add its tokenizer.json, or give --calibration a .safetensors of source.… and target.… ids"
        )
    bases = np.cumsum([0, *(lengths[i] for i in order[:-1])])
    spans = [np.concatenate([side[i].offsets + base for i, base in zip(order, bases, strict=True)]) for side in encoded]
    cuts = _common_cuts(spans[0][:, 1], spans[1][:, 1], bodies)
    if not cuts:
        raise InputRefused(
            f"{source.name} and {target.name} share no token boundary within {length} tokens of this text"
        )
    both = enumerate(tokenizers)
    return Pair(*(_side(tokenizer, ids[side], spans[side], [cut[side] for cut in cuts]) for side, tokenizer in both))


def _draw(sizes: Sequence[int], seed: int) -> Iterator[Place]:
    """All places of groups in random order, alternating between the groups."""
    chance = np.random.default_rng(seed)
    shuffled = [chance.permutation(size) for size in sizes]
    for k in range(max(sizes, default=0)):
        yield from ((group, int(order[k])) for group, order in enumerate(shuffled) if k < len(order))


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
    skip, behind = len(tokenizer.prefix), len(tokenizer.suffix)
    width = skip + max(stop - start for start, stop in cuts) + behind
    side = {
        "input_ids": np.full((len(cuts), width), tokenizer.pad, dtype=np.int64),
        "attention_mask": np.zeros((len(cuts), width), dtype=np.int64),
    }
    if spans is not None:
        side["offsets"] = np.zeros((len(cuts), width, 2), dtype=np.int64)
    for row, (start, stop) in enumerate(cuts):
        last = skip + stop - start
        side["input_ids"][row, : last + behind] = [*tokenizer.prefix, *ids[start:stop], *tokenizer.suffix]
        side["attention_mask"][row, : last + behind] = 1
        if spans is not None:
            origin = spans[start - 1, 1] if start else 0  # where the row before ended: the same character on both sides
            side["offsets"][row, skip:last] = np.maximum(spans[start:stop] - origin, 0)
    return {name: torch.from_numpy(rows) for name, rows in side.items()}
