"""Text that a machine with Python and this project's environment has: general text, and domains apart from it.

General text is Python sources and prose in English. A domain is what a fine-tune is for: French message catalogues, C
headers, JSON, text in capitals. Every file belongs to one part only (training, calibration or test), by its name.
"""

from __future__ import annotations

import gettext
import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCABULARY = 1500
LONGEST = 40_000  # characters taken of one file
SKIPPED = {"test", "tests", "testing", "encodings", "idlelib", "site-packages", "__pycache__"}
GENERAL, TRAIN, HELD = 3_000_000, 800_000, 150_000  # characters of a half of general text, of a domain's parts
LEAST = 300_000  # a domain with less text than this is left out


@dataclass(frozen=True)
class Corpus:
    general: dict[str, str]  # first and second (halves to train bases on), calibration, test
    domains: dict[str, dict[str, str]]  # name -> train, calibration, test


def files(folders: list[Path], endings: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """(name below its folder, text) of every file that is UTF-8, in an order that no directory decides."""
    found = {
        str(path.relative_to(folder)): path
        for folder in folders
        if folder.is_dir()
        for path in folder.rglob("*")
        if path.suffix in endings and not SKIPPED & set(path.relative_to(folder).parts[:-1])
    }
    for name in sorted(found, key=lambda name: hashlib.sha256(name.encode()).digest()):
        try:
            yield name, found[name].read_text(encoding="utf-8")[:LONGEST]
        except (OSError, UnicodeDecodeError):
            continue


def catalogues(language: str) -> Iterator[tuple[str, str]]:
    """(name, all messages) of the compiled catalogues of one language."""
    for path in sorted(Path("/usr/share/locale", language, "LC_MESSAGES").glob("*.mo")):
        try:
            with path.open("rb") as file:
                held = gettext.GNUTranslations(file)._catalog  # type: ignore[attr-defined]
        except (OSError, UnicodeDecodeError):
            continue
        texts = [text for key, text in held.items() if key and isinstance(text, str)]
        joined = "\n".join(texts)
        yield from ((f"{path.name} {at}", joined[at : at + LONGEST]) for at in range(0, len(joined), LONGEST))


def shared_out(found: Iterator[tuple[str, str]], sizes: dict[str, int]) -> dict[str, str]:
    """Whole files, each to the part that is furthest from its size, until all are full."""
    parts: dict[str, list[str]] = {part: [] for part in sizes}
    length = dict.fromkeys(sizes, 0)
    for _, text in found:
        part = min(sizes, key=lambda part: length[part] / sizes[part])
        if length[part] >= sizes[part]:
            break
        parts[part].append(text)
        length[part] += len(text)
    return {part: "\n".join(texts) for part, texts in parts.items()}


@lru_cache
def corpus() -> Corpus:
    """The same on every call; another machine has other files, so numbers are compared on one machine only."""
    paths = {name: Path(path) for name, path in sysconfig.get_paths().items()}
    library, packages = paths["stdlib"], paths["purelib"]
    # Every tenth file of sources is kept for capitals, so that their words are of no base's text.
    sources = list(files([library, packages / "sklearn", packages / "networkx", packages / "transformers"], (".py",)))
    prose = list(files([packages, Path("/usr/share/doc")], (".rst", ".md", ".txt")))
    whole = sorted([*sources, *prose], key=lambda file: hashlib.sha256(file[1].encode()).digest())
    kept = [file for i, file in enumerate(whole) if i % 10 == 0]
    sizes = {"first": GENERAL, "second": GENERAL, "calibration": HELD, "test": HELD}
    general = shared_out((file for i, file in enumerate(whole) if i % 10), sizes)
    found = {
        "french": catalogues("fr"),
        "headers": files([paths["include"], packages / "torch/include"], (".h", ".hpp")),
        "json": files([packages, Path("/usr/share")], (".json",)),
        "capitals": ((name, text.upper()) for name, text in kept),
    }
    sizes = {"train": TRAIN, "calibration": HELD, "test": HELD}
    domains = {name: shared_out(texts, sizes) for name, texts in found.items()}
    enough = {name: parts for name, parts in domains.items() if sum(map(len, parts.values())) >= LEAST}
    return Corpus(general, enough)


def tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `VOCABULARY` entries."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe)
