"""What the rows of vocabularies stand for, in SOURCE, TUNED and TARGET."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .checkpoint import Checkpoint
from .errors import InputRefused
from .headers import if_inside, read_json


def tokens_of(checkpoint: Checkpoint) -> dict[int, str]:
    """Token by id, those added to the tokenizer included; empty where no file of the folder tells.

    Raises:
        InputRefused: a file holds something else than tokens and ids.
    """
    whole = _read(checkpoint, "tokenizer.json")
    model = whole.get("model")
    listed = model.get("vocab") if isinstance(model, Mapping) else _read(checkpoint, "vocab.json")
    found = _entries(listed) + _entries(_read(checkpoint, "added_tokens.json"))
    for entry in added if isinstance(added := whole.get("added_tokens"), list) else ():
        found.append((entry, entry.get("id") if isinstance(entry, Mapping) else None))
    plain = [(entry.get("content") if isinstance(entry, Mapping) else entry, i) for entry, i in found]
    if wrong := [(token, i) for token, i in plain if not isinstance(token, str) or type(i) is not int]:
        raise InputRefused(
            f"the tokenizer in {checkpoint.folder} holds {wrong[0]!r} in its vocab, expected tokens and their ids; "
            "was it edited?"
        )
    return {i: str(token) for token, i in plain}


def _entries(vocabulary: Any) -> list[tuple[Any, Any]]:
    """(token, id) of a vocabulary; a unigram's is a list of (token, score), by id."""
    if isinstance(vocabulary, list):
        return [(entry[0] if isinstance(entry, list) and entry else entry, i) for i, entry in enumerate(vocabulary)]
    return list(vocabulary.items()) if isinstance(vocabulary, dict) else []


def _read(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    path = if_inside(checkpoint.folder, name)
    return read_json(path) if path else {}
