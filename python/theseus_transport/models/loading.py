"""The one door to transformers' loaders: they see a private copy of a folder's settings, and run nothing of it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import transformers

from ..errors import InputRefused, TheseusError
from ..files.companions import tokenizer_files
from ..files.headers import if_inside, read_json
from ..machine import out_of_memory

CONFIG = "config.json"
NEVER_READ = ("attn_implementation", "experts_implementation")  # may name kernels on a hub: what runs is ours to say
SAFE: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}  # and so nothing is asked on stdin
OWN_CODE = "without the tokenizer, --calibration reads a .safetensors of input_ids"
Made = TypeVar("Made")


def config_of(folder: Path) -> Any:
    """The configuration in a folder, by transformers.

    Raises:
        InputRefused: transformers does not like it, or it needs code of its own.
    """
    return loaded(folder, (CONFIG,), lambda place: transformers.AutoConfig.from_pretrained(place, **SAFE))


def model_of(folder: Path, tower: Any = None, **options: Any) -> Any:
    """A model of the configuration in a folder, its weights as they are initialised.

    Args:
        tower: the model's class, where the configuration is that of more than this part.
        options: of the model.

    Raises:
        InputRefused: transformers does not like the configuration, or it needs code of its own.
    """

    def load(place: Path) -> Any:
        if tower:
            return tower._from_config(tower.config_class.from_pretrained(place, **SAFE), **options)
        config = transformers.AutoConfig.from_pretrained(place, **SAFE)
        return transformers.AutoModel.from_config(config, trust_remote_code=False, **options)

    return loaded(folder, (CONFIG,), load)


def language_model_of(folder: Path, *, tied: bool, **options: Any) -> Any:
    """A language model of the configuration in a folder, with its head, its weights as they are initialised.

    Args:
        tied: whether the head is the token embedding, whatever the configuration says.
        options: of the model.

    Raises:
        InputRefused: transformers has no such language model, or it needs code of its own.
    """

    def load(place: Path) -> Any:
        config = transformers.AutoConfig.from_pretrained(place, **SAFE)
        config.tie_word_embeddings = tied
        return transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False, **options)

    return loaded(folder, (CONFIG,), load)


def tokenizer_of(folder: Path) -> Any:
    """The tokenizer in a folder, by transformers.

    Raises:
        InputRefused: transformers does not like it, or it needs code of its own.
    """
    return loaded(
        folder,
        [CONFIG, *tokenizer_files(folder)],
        lambda place: transformers.AutoTokenizer.from_pretrained(place, **SAFE),
        says=f"the tokenizer in {folder} does not load",
    )


def loaded(folder: Path, names: Sequence[str], load: Callable[[Path], Made], *, says: str = "") -> Made:
    """What ``load`` makes of a private folder that holds these files of ``folder``, where it has them.

    Args:
        says: how a refusal begins, if not that transformers cannot load the folder.

    Raises:
        InputRefused: a file leads out of the folder, or the loader failed; it names the folder.
    """
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        with (
            _private_copy(folder, names) as place,
            refused(says or f"transformers cannot load {folder}", (place, folder)),
        ):
            return load(place)
    finally:
        transformers.logging.set_verbosity(level)


@contextmanager
def refused(says: str, places: tuple[Path, Path] | None = None) -> Iterator[None]:
    """Whatever a library raises over a model's files becomes InputRefused, which begins with ``says``.

    Args:
        places: a folder, and what it is called in messages.
    """
    try:
        yield
    except BaseException as error:  # errors of many kinds; a panic in Rust is no Exception
        panic = type(error).__name__ == "PanicException"
        if out_of_memory(error) or isinstance(error, TheseusError) or not (isinstance(error, Exception) or panic):
            raise
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"
        if places:
            said = said.replace(str(places[0]), str(places[1]))
        cure = "was a file of it edited?"
        if "trust_remote_code" in said:
            said, cure = "it needs code that came with it", f"Theseus never runs any; {OWN_CODE}"
        raise InputRefused(f"{says}: {said[:1000]}; {cure}") from error


@contextmanager
def _private_copy(folder: Path, names: Sequence[str]) -> Iterator[Path]:
    """A folder of this process alone with links to checked files; its config names no kernels."""
    with tempfile.TemporaryDirectory(prefix="theseus-") as made:
        place = Path(made)
        for name in names:
            path = if_inside(folder, name)
            if path is None or path.name.endswith(".index.json"):
                continue
            copy = place / name
            copy.parent.mkdir(exist_ok=True)
            if name == CONFIG:
                copy.write_text(json.dumps(_cleaned(read_json(path))))
            else:
                copy.symlink_to(path.resolve())
        yield place


def _cleaned(config: Any) -> Any:
    if isinstance(config, dict):
        return {key: _cleaned(value) for key, value in config.items() if not key.strip("_").startswith(NEVER_READ)}
    return config
