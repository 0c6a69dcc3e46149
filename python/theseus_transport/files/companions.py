"""What lies beside a model's tensors: the files of its tokenizer, its processor and of generation. The one list."""

from __future__ import annotations

import os
from pathlib import Path

from .headers import if_inside

VOCABULARIES = (  # any of them makes a folder a tokenizer's
    *("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json"),
    *("spiece.model", "sentencepiece.bpe.model", "sentencepiece.model", "spm.model"),
)
SETTINGS, SPECIAL, TEMPLATE = "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"
TEMPLATES = "additional_chat_templates"  # a folder of more of them, as transformers names it
TOKENIZER = (
    *VOCABULARIES,
    *("merges.txt", "bpe.codes", "added_tokens.json", "normalizer.json", SETTINGS, SPECIAL),
    *(TEMPLATE, "chat_template.json"),
)
GENERATION = "generation_config.json"
PROCESSOR = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
COMPANIONS = (*TOKENIZER, *PROCESSOR, GENERATION)
PATTERNS = (*COMPANIONS, f"{TEMPLATES}/*.jinja")  # to download


def has_tokenizer(folder: Path) -> bool:
    """Whether there is a vocabulary to make a tokenizer of."""
    return any(if_inside(folder, name) for name in VOCABULARIES)


def tokenizer_files(folder: Path) -> dict[str, Path]:
    """Name -> path of what makes the tokenizer in a folder, chat templates included.

    Raises:
        InputRefused: a file leads out of the folder.
    """
    return {name: path for name in (*TOKENIZER, *_templates(folder)) if (path := if_inside(folder, name))}


def companions(folder: Path) -> dict[str, Path]:
    """Name -> path of all that lies beside the tensors in a folder and belongs to the model.

    Raises:
        InputRefused: a file leads out of the folder.
    """
    rest = {name: path for name in (*PROCESSOR, GENERATION) if (path := if_inside(folder, name))}
    return {**tokenizer_files(folder), **rest}


def _templates(folder: Path) -> list[str]:
    place = folder / TEMPLATES
    names = sorted(os.listdir(place)) if place.is_dir() else []
    return [f"{TEMPLATES}/{name}" for name in names if name.endswith(".jinja")]
