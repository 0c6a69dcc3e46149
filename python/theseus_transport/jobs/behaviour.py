"""What of a tune no tensor holds: chat templates, stop tokens, generation settings.

They go along where the target's tokenizer has the tokens they name at the same ids; what stays is said.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import InputRefused
from ..files.checkpoint import Checkpoint
from ..files.companions import (
    GENERATION,
    SETTINGS,
    SPECIAL,
    TEMPLATE,
    TEMPLATES,
    VOCABULARIES,
    companions,
    tokenizer_files,
)
from ..files.headers import file_blake2b, if_inside, read_file, read_json
from .vocabularies import tokens_of

STOPS = ("bos_token", "eos_token", "pad_token")  # as tokenizers name them
SILENT = ("transformers_version", "_from_model_config", "use_cache", "return_dict_in_generate", "output_*")  # no text
LISTS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "forced_decoder_ids")  # of ids, beside *_token_id
TEXT = 1 << 20  # bytes of a template
SHOWN = 60  # characters of a value


@dataclass
class Behaviour:
    """What goes beside the moved tensors.

    Attributes:
        files: name -> text that replaces, or adds to, the target's files; None: the target's stays out.
        config: keys that replace the target's in its config.json.
        carried, left: what goes along, and what stays, in words; why: the reason of the first that stays.
    """

    files: dict[str, str | None] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    carried: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    why: str = ""

    def beside(self, target: Path, *, whole: bool = True) -> dict[str, Path | str]:
        """Name -> path or text of what lies beside the tensors.

        Args:
            whole: all that belongs to a model; else its tokenizer, and what the tune changed.
        """
        there = companions(target) if whole else tokenizer_files(target)
        return {name: content for name, content in {**there, **self.files}.items() if content is not None}

    @property
    def warnings(self) -> list[str]:
        if not self.left:
            return []
        return [f"{', '.join(self.left)} of TUNED stay behind, TARGET keeps its own: {self.why}"]


def behaviour_of(source: Checkpoint, tuned: Checkpoint, target: Checkpoint) -> Behaviour:
    """What TUNED's files say otherwise than TARGET's, as far as TARGET can take it.

    What it cannot take is told where TUNED has it otherwise than SOURCE, and of chat templates always.

    Raises:
        InputRefused: a file of one of them leads out of its folder, or holds something else than its name says.
    """
    found, agreed = Behaviour(), _Agreement(source, tuned, target)
    folders = source.folder, tuned.folder, target.folder
    _templates(found, agreed, *(_templates_of(folder) for folder in folders))
    _stops(found, agreed, target.folder, *(_stops_of(folder) for folder in folders))
    _generation(found, agreed, *(_read(folder, GENERATION) for folder in folders))
    ids = ({k: v for k, v in c.config.items() if k.endswith("_token_id")} for c in (source, tuned, target))
    for name, value, new in _others(*ids):
        if agreed.on(f"{name} {_shown(value)}", agreed.ids(value), found, told=new):
            found.config[name] = value
    return found


class _Agreement:
    """Whether TARGET's tokenizer has the tokens of the tune, and at the same ids."""

    def __init__(self, source: Checkpoint, tuned: Checkpoint, target: Checkpoint) -> None:
        self._sides, self._rows = (source, tuned, target), target.config.get("vocab_size")

    @cached_property
    def _tokens(self) -> tuple[dict[int, str], dict[int, str]]:
        """Token by id of the tune and of TARGET; read only where something changed."""
        source, tuned, target = self._sides
        return tokens_of(tuned) or tokens_of(source), tokens_of(target)

    @cached_property
    def _lacking(self) -> dict[str, int]:
        """The tune's tokens that TARGET has not at their ids."""
        trained, theirs = self._tokens
        return {token: i for i, token in trained.items() if theirs.get(i) != token}

    @cached_property
    def why(self) -> str:
        """Why nothing that names tokens can go along; "" where it can."""
        trained, theirs = self._tokens
        for i in (i for i, token in trained.items() if theirs.get(i, token) != token):
            return f"the tokenizers differ, {trained[i]!r} is {i} in TUNED, where TARGET has {theirs[i]!r}"
        if (trained and theirs) or _same_files(*(side.folder for side in self._sides)):
            return ""
        return "no file tells the tokens of TUNED and TARGET by id, so they cannot be compared"

    def template(self, text: str) -> str:
        """Why a template cannot be followed; "" where it can."""
        return self.why or self._lacks(token for token in self._lacking if token in text)

    def token(self, token: str) -> str:
        """Why a special token is none of TARGET's, or ""."""
        known = not self._tokens[0] or token in self._tokens[0].values()
        return self.why or self._lacks([token] if token in self._lacking or not known else [])

    def ids(self, value: Any) -> str:
        """Why ids, in lists or not, do not mean the same in TARGET, or ""."""
        for i in _flat(value):
            if i is not None and (type(i) is not int or not 0 <= i < (self._rows or i + 1)):
                return f"{_shown(i)} is no id of TARGET's vocabulary of {self._rows}"
        return self.why or self._lacks(token for token, i in self._lacking.items() if i in set(_flat(value)))

    def on(self, what: str, why: str, found: Behaviour, *, told: bool = True) -> bool:
        """Note that something is carried, or (if that is to be told) stays for a reason; whether it is carried."""
        noted = found.left if why else found.carried
        if what not in noted and (told or not why):  # an id stands in two files
            noted.append(what)
            found.why = found.why or why
        return not why

    def _lacks(self, tokens: Any) -> str:
        first = sorted(tokens, key=lambda token: (self._lacking.get(token, 0), token))[:1]
        at = f" at {self._lacking[first[0]]}" if first and first[0] in self._lacking else ""
        return f"TARGET's tokenizer has no {first[0]!r}{at}" if first else ""


def _templates(found: Behaviour, agreed: _Agreement, *templates: dict[str, str]) -> None:
    """Chat templates go along all or none: TARGET's would mix with them."""
    others = {name: text for name, text, _ in _others(*templates)}
    why = next(filter(None, map(agreed.template, others.values())), "")
    carried = [agreed.on(f"chat template {name}".strip(), why, found) for name in sorted(others)]
    if any(carried):
        place = {name: f"{TEMPLATES}/{name}.jinja" if name else TEMPLATE for name in {*templates[1], *templates[2]}}
        found.files |= {place[name]: templates[1].get(name) for name in place}
        found.files["chat_template.json"] = None  # the older place, which would contradict


def _stops(found: Behaviour, agreed: _Agreement, target: Path, *stops: dict[str, str]) -> None:
    """Special tokens by name in the tokenizer's settings; TARGET's own template leaves those if another is carried."""
    new = {
        key: token
        for key, token, is_new in _others(*stops)
        if agreed.on(f"{key} {_shown(token)!r}", agreed.token(token), found, told=is_new)
    }
    if not new and TEMPLATE not in found.files:
        return
    for name in (SETTINGS, SPECIAL):
        if settings := _read(target, name):
            if TEMPLATE in found.files:
                settings.pop("chat_template", None)
            found.files[name] = json.dumps({**settings, **new}, indent=2, ensure_ascii=False)


def _generation(found: Behaviour, agreed: _Agreement, *settings: dict[str, Any]) -> None:
    new = {}
    for name, value, is_new in _others(*settings):
        bound = name.endswith(("_token_id", "_token_ids")) or name in LISTS
        if any(fnmatchcase(name, pattern) for pattern in SILENT):
            continue
        if agreed.on(f"{name} {_shown(value)}", agreed.ids(value) if bound else "", found, told=is_new):
            new[name] = value
    if new:
        found.files[GENERATION] = json.dumps({**settings[2], **new}, indent=2)


def _others(ours: Mapping[str, Any], trained: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[Any]:
    """(name, value, whether its base has it otherwise) of what the tune says otherwise than the target."""
    for name, value in trained.items():
        if value is not None and theirs.get(name) != value:
            yield name, value, ours.get(name) != value


def _templates_of(folder: Path) -> dict[str, str]:
    """Chat templates by name, "" for the one that is used unasked; files go before settings, as in transformers."""
    found: dict[str, str] = {}
    for name in ("chat_template.json", SETTINGS):
        held = _read(folder, name).get("chat_template")
        if isinstance(held, list):
            held = {e.get("name"): e.get("template") for e in held if isinstance(e, dict)}
        found |= held if isinstance(held, dict) else {} if held is None else {"": held}
    files = {name: path for name, path in tokenizer_files(folder).items() if name.endswith(".jinja")}
    for name, path in files.items():
        key = "" if name == TEMPLATE else name.removeprefix(f"{TEMPLATES}/").removesuffix(".jinja")
        found[key] = read_file(path, most=TEXT).decode(errors="replace")
    if "default" in found:
        found.setdefault("", found.pop("default"))
    for name, text in found.items():
        if not isinstance(text, str) or not isinstance(name, str) or not re.fullmatch(r"(\w[\w.-]{0,99})?", name):
            told = f"chat template {_shown(name)!r} is {_shown(text)!r}, expected a name and a text"
            raise InputRefused(f"{folder}: {told}; was it edited?")
    return found


def _stops_of(folder: Path) -> dict[str, str]:
    """Special tokens by name; settings say a token, or describe it."""
    found = {}
    for name in (SPECIAL, SETTINGS):
        for key, value in _read(folder, name).items():
            text = value.get("content") if isinstance(value, dict) else value
            if key in STOPS and text is not None:
                if not isinstance(text, str):
                    raise InputRefused(f"{folder / name}: {key} is {_shown(text)!r}, expected a token")
                found[key] = text
    return found


def _same_files(source: Path, tuned: Path, target: Path) -> bool:
    """Whether a vocabulary's file is the same, byte by byte: the tune's own, or the source's where it has none."""
    for name in VOCABULARIES:
        own, theirs = if_inside(tuned, name) or if_inside(source, name), if_inside(target, name)
        if own and theirs:
            return file_blake2b(own) == file_blake2b(theirs)
    return False


def _read(folder: Path, name: str) -> dict[str, Any]:
    path = if_inside(folder, name)
    return read_json(path) if path else {}


def _flat(value: Any) -> list[Any]:
    return [i for part in value for i in _flat(part)] if isinstance(value, list) else [value]


def _shown(value: Any) -> str:
    return str(value)[:SHOWN]
