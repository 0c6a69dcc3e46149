"""Text sampled from a language model itself: calibration for a tune of which no data are at hand."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList

from ..errors import InputRefused, NumericalError
from ..models.forward import in_evaluation
from .prompts import Prompt
from .text import LENGTH

log = logging.getLogger(__name__)
TEXTS = 16  # sampled at once
BLANK = 4  # batches without a word, after which none is expected
MANY = 4096  # prompts that are used at most
CURE = "give --calibration a text"


class Start(NamedTuple):
    """Token ids that a text begins with, of which the first `hidden` are no part of it; `told` as of a prompt."""

    ids: list[int]
    hidden: int = 0
    told: bool = False


def sample_texts(
    model: nn.Module,
    tokenizer: Any,
    *,
    tokens: int,
    seed: int = 0,
    prompts: Sequence[str | Prompt] = (),
    length: int = LENGTH,
    batch_size: int = TEXTS,
) -> list[str]:
    """Texts that a language model writes, at temperature 1 and from its whole distribution.

    The same seed gives the same texts on the same machine; torch's own random numbers are left as they were.

    Args:
        model: a model of transformers that generates, on any device; it is left in the mode it was in.
        tokenizer: its tokenizer, of transformers.
        tokens: how many to sample at least, prompts included.
        prompts: what texts begin with, each in its turn, in random order; without any, texts begin at the
            beginning-of-text token.
        length: tokens of one text at most, its prompt included.
        batch_size: texts at once; keys and values of that many are held.

    Returns:
        Texts that are not blank, each with its prompt, without special tokens; where a chat template told the prompt,
        with them, for they make the chat.

    Raises:
        InputRefused: there is nothing to begin with, no prompt leaves room for an answer, or the model says nothing.
        NumericalError: its logits are not finite.
    """
    found, count = list[str](), 0
    for texts, sampled in sampled_batches(
        model, tokenizer, seed=seed, prompts=prompts, length=length, batch_size=batch_size
    ):
        found, count = found + texts, count + sampled
        if count >= tokens:
            break
    return found


def sampled_batches(
    model: nn.Module,
    tokenizer: Any,
    *,
    seed: int,
    prompts: Sequence[str | Prompt] = (),
    length: int = LENGTH,
    batch_size: int = TEXTS,
) -> Iterator[tuple[list[str], int]]:
    """The texts of :func:`sample_texts` and how many tokens they have, batch by batch, without an end."""
    if length < 2 or batch_size < 1:
        raise InputRefused(f"length is {length} and batch size {batch_size}, expected at least 2 and 1")
    chance, ends = torch.Generator().manual_seed(seed), _ends(model, tokenizer)
    given = [each if isinstance(each, Prompt) else Prompt(each) for each in prompts]
    given = [given[i] for i in torch.randperm(len(given), generator=chance)[:MANY].tolist()]
    starts = _starts(given, tokenizer, ends, length) if given else [Start([_begin(model, tokenizer)], hidden=1)]
    order, blank = _forever(len(starts), chance), 0
    while True:
        chosen = [starts[i] for i in islice(order, batch_size)]
        rows = _continued(
            model, [start.ids for start in chosen], ends, length, int(torch.randint(2**31, (), generator=chance))
        )
        texts = [_text(tokenizer, start, ids, ends) for start, ids in zip(chosen, rows, strict=True)]
        pairs = [(text, len(ids)) for text, ids in zip(texts, rows, strict=True) if text.strip()]
        blank = 0 if pairs else blank + 1
        if blank == BLANK:
            raise InputRefused(
                f"the model ends {BLANK * batch_size} texts before their first word; {CURE}, or --prompts"
            )
        yield [text for text, _ in pairs], sum(count for _, count in pairs)


@torch.no_grad()
def _continued(model: Any, starts: Sequence[list[int]], ends: Sequence[int], length: int, seed: int) -> list[list[int]]:
    """Token ids of every start with what the model says then, up to where it ends, end included."""
    width, device = max(map(len, starts)), model.device
    pad = ends[0] if ends else 0
    ids = torch.tensor([[pad] * (width - len(start)) + start for start in starts])
    mask = torch.tensor([[0] * (width - len(start)) + [1] * len(start) for start in starts])
    plain = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_length=None, max_new_tokens=length - width,
        eos_token_id=list(ends) or None, pad_token_id=pad, use_cache=True,
    )  # fmt: skip
    own, model.generation_config = model.generation_config, plain  # its own settings would fill what is not said here
    try:
        with in_evaluation(model), torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            said = model.generate(
                ids.to(device), attention_mask=mask.to(device), generation_config=plain,
                logits_processor=LogitsProcessorList([_finite]),
            )  # fmt: skip
    finally:
        model.generation_config = own
    return [start + _ended(row, ends) for start, row in zip(starts, said[:, width:].tolist(), strict=True)]


def _finite(ids: Tensor, scores: Tensor) -> Tensor:
    if not scores.isfinite().all():
        raise NumericalError(f"the model's logits are not finite, so that no text can be sampled; {CURE}")
    return scores


def _ended(ids: list[int], ends: Sequence[int]) -> list[int]:
    """Up to the first end, which is kept."""
    return ids[: next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids))]


def _text(tokenizer: Any, start: Start, ids: list[int], ends: Sequence[int]) -> str:
    if not start.told and ids[-1] in ends:
        ids = ids[:-1]
    ids = ids[start.hidden :]
    text: str = tokenizer.decode(ids, skip_special_tokens=not start.told, clean_up_tokenization_spaces=False)
    return text.rstrip("\N{REPLACEMENT CHARACTER}")  # the last character may lack some bytes


def _starts(prompts: Sequence[Prompt], tokenizer: Any, ends: Sequence[int], length: int) -> list[Start]:
    """Of prompts that leave room for an answer."""
    found = []
    for text, told in prompts:
        ids = list(tokenizer(text, add_special_tokens=not told)["input_ids"])
        while not told and len(ids) > 1 and ids[-1] in ends:  # some tokenizers end every text
            ids.pop()
        if 0 < len(ids) < length:
            found.append(Start(ids, told=told))
    if not found:
        raise InputRefused(f"each of {len(prompts)} prompts has {length} tokens or more, or none; give shorter ones")
    if lost := len(prompts) - len(found):
        log.warning("%d of %d prompts have %d tokens or more, or none, and were left out", lost, len(prompts), length)
    return found


def _begin(model: Any, tokenizer: Any) -> int:
    """The token that texts begin with; where a family has none, the one that parts them."""
    known = [tokenizer.bos_token_id, model.config.bos_token_id, tokenizer.eos_token_id]
    size = model.get_input_embeddings().weight.shape[0]
    for token in known:
        if isinstance(token, int) and 0 <= token < size:
            return token
    raise InputRefused(f"neither tokenizer nor config names a beginning-of-text token; {CURE}, or --prompts")


def _ends(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end a text."""
    found = list[int]()
    for given in (model.generation_config.eos_token_id, model.config.eos_token_id, tokenizer.eos_token_id):
        found += given if isinstance(given, list) else [given]
    size = model.get_input_embeddings().weight.shape[0]
    return [token for token in dict.fromkeys(found) if isinstance(token, int) and 0 <= token < size]


def _forever(count: int, chance: torch.Generator) -> Iterator[int]:
    """All of so many in random order, again and again."""
    while True:
        yield from torch.randperm(count, generator=chance).tolist()
