"""Calibration data: batches for both models, from tensors, text, images, or the text Python itself ships."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from ..activations.inputs import SideInfo, check_ids
from ..activations.pairing_tokens import Tensors
from ..errors import InputRefused
from ..files.companions import has_tokenizer
from ..models.pair import SIDES, Pair
from .documents import LINES, PROGRAMS, Records, TextFile, builtin_pieces, refuse_other_files
from .images import Preprocessor, find_images, read_images
from .ready import ready_tensors
from .text import LENGTH, Tokenizer, enough_texts, rows_of_text

log = logging.getLogger(__name__)
TEXTS = (".txt", ".md", *LINES, *PROGRAMS)  # to be found in a folder


@dataclass(frozen=True)
class Calibration:
    """Batches, the tokens (vision: patches) that pair, and where they came from; `held` is a batch kept aside, if any.

    A batch is the keyword arguments of each model, the same object where both read the same. Rows pair: row i of
    both sides is the same text or image, and token i pairs with token i, unless both sides hold `offsets`
    [n, tokens, 2]: the first and last character of each token (end exclusive) from the row's first; (0, 0) marks
    special tokens and padding.
    """

    batches: list[Pair[Tensors]]
    tokens: int
    description: str
    fingerprint: str  # BLAKE2b of every tensor
    held: Pair[Tensors] | None = None


def load_calibration(
    reference: str | Path,
    source: SideInfo,
    target: SideInfo,
    *,
    tokens_wanted: int,
    batch_size: int,
    seed: int = 0,
    hold_out: bool = False,
    skip_bad: bool = False,
    chats: Path | None = None,
    sampled: Iterable[Sequence[str]] | None = None,
) -> Calibration:
    """Batches for both models from a `.safetensors` of ready tensors, text, a folder of images, "builtin" or "self".

    A tensor file holds `input_ids` [n, tokens] with optional `attention_mask` [n, tokens], or `pixel_values`
    [n, c, h, w]; names may carry `source.` and `target.` where the sides differ, then `offsets` [n, tokens, 2] may join
    (see Calibration). Text (utf-8, or `.jsonl` of records, as ``formats.py`` says) is tokenized by each model's own
    tokenizer and packed into rows of `LENGTH` tokens, or as many as both can read; images are preprocessed as each
    preprocessor_config.json says. Of more data than `tokens_wanted` a sample drawn with `seed` is used, in its order,
    of less all, with a warning. With `hold_out` some more rows are drawn and held out, as :func:`drawn_rows` says.
    `skip_bad` leaves out images and lines that cannot be read, and counts them, rather than refusing them. Chats are
    told by the chat template of the tokenizer in the folder `chats`, else by the source's, else by the target's. "self"
    is text that the tune says: as many batches of texts as it takes are drawn from `sampled`.

    Raises InputRefused, with values and the cure, for data that do not fit the models.
    """
    if source.kind != target.kind:
        raise InputRefused(
            f"{source.name} is a {source.kind} model, {target.name} a {target.kind} model: no common data"
        )
    path, builtin = Path(os.path.expanduser(reference)), str(reference) == "builtin" or sampled is not None
    if not builtin and not (path.is_file() or path.is_dir()):  # nor is a pipe or a device
        raise InputRefused(
            f"calibration {str(reference)!r} is no file; give a .safetensors, a text file, a folder of images, "
            "'builtin' or 'self'"
        )
    most = batch_size if hold_out else 0  # rows held out
    infos, form = Pair(source, target), ""  # form: in which the data were read
    if path.suffix == ".safetensors" and not builtin:
        sides = ready_tensors(path, infos)
    elif path.is_dir() and not builtin:
        sides, form = _pictures(path, infos, tokens_wanted, most, seed, skip_bad)
    elif source.kind == "vision":
        raise InputRefused(
            f"{source.name} reads images, which {str(reference)!r} does not hold; "
            "give --calibration a folder of images, or a .safetensors with pixel_values [n, c, h, w]"
        )
    else:
        length = min([LENGTH, *(side.max_positions for side in infos if side.max_positions)])
        own = Tokenizer(source.folder, source.name, source.vocab_size)
        same = Path(source.folder).resolve() == Path(target.folder).resolve()
        tokenizers = Pair(own, own if same else Tokenizer(target.folder, target.name, target.vocab_size))
        groups: Sequence[Sequence[str]]
        tokens = max(tokens_wanted, length * with_held(-(-tokens_wanted // length), most))
        if sampled is not None:
            groups = [enough_texts(sampled, tokenizers, tokens + length)]
        elif builtin:
            groups = builtin_pieces()
        else:
            file = _text_file(path, tokenizers, chats, skip_bad)
            groups = [file]
        sides = rows_of_text(groups, tokenizers, tokens=tokens, length=length, seed=seed)
        form = "" if builtin else f" ({file.words})"
        for side, info in sides.zip(infos):
            check_ids(f"the tokenizer of {info.name}", side["input_ids"], info)
    if not path.is_dir() or builtin:  # images were drawn before they were read
        sides = _rows(sides, drawn_rows(_counts(sides, infos), tokens_wanted, most, seed))
    origin = path.name
    if builtin:
        origin = f"text of Python {platform.python_version()}" if sampled is None else "text sampled from TUNED"
    counts = _counts(sides, infos)
    held = held_of(len(counts), most)
    rows = len(counts) - held
    tokens = int(counts[:rows].sum())
    if tokens < tokens_wanted:
        log.warning("calibration %s has %d tokens, %d were wanted: maps of wide layers may be poor", origin, tokens,
                    tokens_wanted)  # fmt: skip
    aside = f", {held} rows held out" if held else ""
    return Calibration(
        batches=batches_of(*_rows(sides, slice(rows)), batch_size=batch_size),
        tokens=tokens,
        description=f"{origin}{form}: {rows} rows, {tokens} tokens, seed {seed}{aside}",
        fingerprint=_fingerprint(sides),
        held=_rows(sides, slice(rows, None)) if aside else None,
    )


def held_of(rows: int, most: int) -> int:
    """Rows held out of so many: a third at most, and no more than ``most``."""
    return min(most, rows // 3)


def with_held(rows: int, most: int) -> int:
    """How many rows to draw for ``rows`` to calibrate on and, beside them, those that :func:`held_of` holds out."""
    return rows + min(most, rows // 2)


def drawn_rows(counts: torch.Tensor, wanted: int, most: int, seed: int) -> torch.Tensor:
    """Rows at random: as many as hold `wanted` tokens, in their order; then, in theirs, those to be held out.

    Args:
        counts: tokens per row [n]. most: rows that may be held out.
    """
    drawn = torch.randperm(len(counts), generator=torch.Generator().manual_seed(seed))
    drawn = drawn[: with_held(int((counts[drawn].cumsum(0) < wanted).sum()) + 1, most)]
    fit = len(drawn) - held_of(len(drawn), most)
    return torch.cat([drawn[:fit].sort().values, drawn[fit:].sort().values])


def _text_file(path: Path, tokenizers: Sequence[Tokenizer], chats: Path | None, skip_bad: bool) -> TextFile | Records:
    refuse_other_files(path)
    if path.suffix.lower() not in LINES:
        return TextFile(path)
    tune = [Tokenizer(chats, f"TUNED {chats.name}", None)] if chats and has_tokenizer(chats) else []
    template = next((each.chat for each in (*tune, *tokenizers) if each.chat), None)
    return Records(path, template, skip_bad=skip_bad)


def images_wanted(infos: Sequence[SideInfo], tokens: int, most: int) -> int:
    """How many images hold ``tokens`` tokens (patches) of the model with fewer a picture, and are held out beside."""
    return with_held(-(-tokens // min(info.tokens_per_image for info in infos)), most)


def in_random_order(paths: Sequence[Path], seed: int) -> list[Path]:
    return [paths[i] for i in torch.randperm(len(paths), generator=torch.Generator().manual_seed(seed)).tolist()]


def _pictures(
    folder: Path, infos: Pair[SideInfo], tokens: int, most: int, seed: int, skip_bad: bool
) -> tuple[Pair[Tensors], str]:
    """Pixels of both sides for as many images, drawn with `seed`, as hold `tokens`, and those to be held out.

    And in words how many of the images these are.
    """
    if (kind := infos.source.kind) != "vision":
        files = (path for path in sorted(folder.rglob("*")) if path.suffix.lower() in TEXTS)
        inside = "".join(f", as {path}" for path in islice(files, 1))
        raise InputRefused(
            f"calibration {folder} is a folder, {infos.source.name} is a {kind} model; give a file{inside}"
        )
    paths = find_images(folder)
    wanted = images_wanted(infos, tokens, most)
    preprocessors = []
    for info in infos:
        size = info.image_size if isinstance(info.image_size, tuple) else (info.image_size or 0,) * 2
        preprocessors.append(Preprocessor.of(info.folder, info.name, size, info.channels or 3))
    same = preprocessors[0] == preprocessors[1]
    kinds = preprocessors[: 1 if same else 2]
    found, bad = read_images(in_random_order(paths, seed), kinds, wanted=wanted, skip_bad=skip_bad)
    shown = [{"pixel_values": pixels} for pixels in found]
    skipped = f", {bad} skipped" if bad else ""
    return Pair(shown[0], shown[-1]), f" ({len(found[0])} of {len(paths)} images{skipped})"


def _counts(sides: Pair[Tensors], infos: Pair[SideInfo]) -> torch.Tensor:
    """Tokens per row [n]: on the side that has fewer."""
    per_side = [
        torch.full((len(side["pixel_values"]),), info.tokens_per_image)
        if info.kind == "vision"
        else side["attention_mask"].sum(dim=1)
        for side, info in sides.zip(infos)
    ]
    return torch.minimum(*per_side)


def _rows(sides: Pair[Tensors], kept: slice | torch.Tensor) -> Pair[Tensors]:
    """Some rows of both sides, one dict where both read the same."""
    cut = {key: value[kept] for key, value in sides.source.items()}
    same = sides.target is sides.source
    return Pair(cut, cut if same else {key: value[kept] for key, value in sides.target.items()})


def _fingerprint(sides: Pair[Tensors]) -> str:
    running = hashlib.blake2b(digest_size=32)
    for label, side in SIDES.zip(sides):
        for key in sorted(side):
            running.update(f"{label}.{key} {side[key].dtype} {list(side[key].shape)}".encode())
            running.update(side[key].contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return running.hexdigest()


def batches_of(source: Tensors, target: Tensors | None = None, *, batch_size: int) -> list[Pair[Tensors]]:
    """Cut tensors of equal leading dimension into pairs of at most `batch_size` rows.

    Without a target (or with the same object) both sides of each pair are one dict.
    """
    if batch_size < 1:
        raise InputRefused(f"batch size is {batch_size}, expected at least 1")

    def cut(side: Tensors, start: int) -> Tensors:
        return {k: v[start : start + batch_size] for k, v in side.items()}

    pairs = []
    for start in range(0, len(next(iter(source.values()))), batch_size):
        own = cut(source, start)
        pairs.append(Pair(own, own if target is None or target is source else cut(target, start)))
    return pairs
