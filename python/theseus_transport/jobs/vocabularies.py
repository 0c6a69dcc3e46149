"""What the rows of vocabularies and of classes stand for, in SOURCE, TUNED and TARGET, and whether they agree."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import InputRefused
from ..files.checkpoint import Checkpoint
from ..files.headers import if_inside, read_json
from ..models.geometry import Geometry
from ..updates.fates import TensorFate

log = logging.getLogger(__name__)
FOREIGN = 0.5  # share of token ids that mean another token, above which a vocabulary is another one
NAMED = 8  # tokens a message names


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


def one_tokenizer(source: Checkpoint, target: Checkpoint) -> bool:
    """Whether vocabularies of different sizes are of one tokenizer, by all ids both have, at least half of either's."""
    if source.config.get("vocab_size") == target.config.get("vocab_size"):
        return False
    ours, theirs = tokens_of(source), tokens_of(target)
    common = ours.keys() & theirs.keys()
    most = len(common) > FOREIGN * max(len(ours), len(theirs), 1)
    return most and all(ours[i] == theirs[i] for i in common)


def check_rows(
    coverage: Sequence[TensorFate], source: Checkpoint, target: Checkpoint, tuned: Checkpoint | None = None
) -> None:
    """Refuse, or warn of, rows of a vocabulary or classes that move by index and do not mean the same on both sides.

    Raises:
        InputRefused: the vocabularies are two.
    """
    family = Geometry.of(source.config).family
    token, heads = family.embedding("token"), family.heads
    moved = {_layer(told.tensor) for told in coverage if told.fate == "transported"}
    tables = sorted(moved & {token and _layer(token.name), heads.get("vocabulary")})
    if tables:
        own, trained, theirs = tokens_of(source), tokens_of(tuned) if tuned else {}, tokens_of(target)
        _compare("tokenizers", tables, own | trained, theirs, tuned="TUNED" if trained else "SOURCE")
        _tell_added({i: t for i, t in trained.items() if own and t not in set(own.values())}, theirs)
    new = {_layer(told.tensor) for told in coverage if told.note.startswith("new ")}
    if classes := sorted((moved - new) & {heads.get("classes")}):
        ours, theirs = (_classes(checkpoint) for checkpoint in (source, target))
        _compare("classes (id2label)", classes, ours, theirs)


def _compare(
    what: str, names: Sequence[str], ours: Mapping[Any, str], theirs: Mapping[Any, str], *, tuned: str = "SOURCE"
) -> None:
    common = ours.keys() & theirs.keys()
    if wrong := [i for i in common if ours[i] != theirs[i]]:
        example = f"{ours[wrong[0]]!r} is {wrong[0]} in {tuned}, where TARGET has {theirs[wrong[0]]!r}"
        text = f"the {what} differ in {len(wrong)} of {len(common)} ids ({example}), but {' and '.join(names)}"
        if what == "tokenizers" and len(wrong) > FOREIGN * len(common):
            leave = " ".join(f"--leave '{name}*'" for name in names)
            raise InputRefused(f"{text} move row by row; {leave} leaves them behind")
        log.warning("%s moved row by row", text)


def _tell_added(added: Mapping[int, str], theirs: Mapping[int, str]) -> None:
    """Warn of tokens that TUNED has and SOURCE has not: what TARGET's tokenizer makes of them."""
    if not added:
        return
    ids = {token: i for i, token in theirs.items()}
    lacking = {i: token for i, token in added.items() if token not in ids}
    moved = {i: token for i, token in added.items() if ids.get(token, i) != i}
    told = []
    if lacking:
        told.append(f"TARGET's tokenizer lacks {_named(lacking)}: add them to it at these ids")
    if moved:
        told.append(f"TARGET has {_named({ids[token]: token for token in moved.values()})}: its own rows stay")
    known = "TARGET has them at the same ids"
    log.warning("TUNED adds %d tokens, %s; %s", len(added), _named(added), "; ".join(told) or known)


def _named(tokens: Mapping[int, str]) -> str:
    first = ", ".join(f"{token!r} ({i})" for i, token in sorted(tokens.items())[:NAMED])
    return first + (f" and {len(tokens) - NAMED} more" if len(tokens) > NAMED else "")


def _layer(tensor: str) -> str:
    return tensor.removesuffix(".weight").removesuffix(".bias")


def _read(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    path = if_inside(checkpoint.folder, name)
    return read_json(path) if path else {}


def _classes(checkpoint: Checkpoint) -> dict[Any, str]:
    labels = checkpoint.config.get("id2label")
    return labels if isinstance(labels, dict) else {}
