"""Small Llamas and their tunes, trained here and kept in a folder by everything that decides them."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from corpus import VOCABULARY, Corpus, tokenizer
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROW = 128  # tokens of one row
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Size:
    width: int
    heads: int
    blocks: int = 4

    def model(self) -> LlamaForCausalLM:
        """Random weights, as transformers draws them; heads of 16, the head of the vocabulary its own."""
        config = LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=self.width, num_attention_heads=self.heads, max_position_embeddings=ROW,
            num_hidden_layers=self.blocks, intermediate_size=self.width * 8 // 3 // 8 * 8, pad_token_id=None,
            bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        return LlamaForCausalLM(config)


@dataclass(frozen=True)
class Steps:
    """How something is trained: AdamW, the rate warmed up over a tenth of the steps, then down a cosine to a tenth."""

    steps: int
    rate: float
    rows: int = 16  # of a step, each of `ROW` tokens
    seed: int = 0
    rank: int = 0  # of a LoRA on all linear layers of blocks; 0: all parameters


def descend(model: nn.Module, tokens: Tensor, how: Steps) -> float:
    """Train on next tokens of random rows of ``tokens`` [count]; the mean loss of the last steps, in nats a token."""
    draw = torch.Generator().manual_seed(how.seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, how.rate, betas=(0.9, 0.95), weight_decay=0.01)
    warm = max(1, how.steps // 10)
    losses = []
    for step in range(how.steps):
        away = (step - warm) / max(1, how.steps - warm)
        factor = (step + 1) / warm if step < warm else 0.1 + 0.45 * (1 + math.cos(math.pi * away))
        optimizer.param_groups[0]["lr"] = how.rate * factor
        start = torch.randint(len(tokens) - ROW, (how.rows, 1), generator=draw)
        ids = tokens[start + torch.arange(ROW)]
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    return sum(losses[-20:]) / len(losses[-20:])


class Shelf:
    """A folder of trained models, each by a name and the hash of all that decides it."""

    def __init__(self, folder: Path, corpus: Corpus) -> None:
        self.folder, self.corpus = folder, corpus
        text = json.dumps([corpus.general, corpus.domains], sort_keys=True)
        self.mark = hashlib.sha256(text.encode()).hexdigest()
        parts = [corpus.general["first"], *(parts["train"] for parts in corpus.domains.values())]
        place = self.kept(
            "tokenizer", VOCABULARY, lambda to: tokenizer([p[:500_000] for p in parts]).save_pretrained(to)
        )
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(place)
        self._tokens: dict[str, Tensor] = {}

    def kept(self, name: str, settings: object, make: Callable[[Path], object]) -> Path:
        """The folder of that name and settings; ``make`` fills it where it is not there."""
        key = hashlib.sha256(json.dumps([settings, self.mark], sort_keys=True).encode()).hexdigest()
        place = self.folder / f"{name}-{key[:10]}"
        if not place.exists():
            began, fresh = time.perf_counter(), place.with_suffix(".unfinished")
            shutil.rmtree(fresh, ignore_errors=True)
            fresh.mkdir(parents=True)
            made = make(fresh)
            fresh.rename(place)
            print(f"{place.name}  {time.perf_counter() - began:.0f} s  {made or ''}", flush=True)
        return place

    def tokens(self, text: str) -> Tensor:
        """[count], int64."""
        if text not in self._tokens:
            self._tokens[text] = torch.tensor(self.tokenizer(text, verbose=False)["input_ids"])
        return self._tokens[text]

    def base(self, name: str, size: Size, half: str, how: Steps) -> Path:
        """A model trained from random weights on a half of general text."""

        def make(to: Path) -> str:
            torch.manual_seed(how.seed)
            return self._trained(size.model(), self.corpus.general[half], how, to)

        return self.kept(name, ["base", asdict(size), half, asdict(how)], make)

    def on(self, base: Path, name: str, text: str, how: Steps) -> Path:
        """``base`` trained on: a model's folder, or a LoRA adapter's (``how.rank``)."""

        def make(to: Path) -> str:
            torch.manual_seed(how.seed)
            model = LlamaForCausalLM.from_pretrained(base)
            if how.rank:
                config = LoraConfig(r=how.rank, lora_alpha=2 * how.rank, target_modules=LINEARS, task_type="CAUSAL_LM")
                model = get_peft_model(model, config)
            return self._trained(model, text, how, to)

        hashed = hashlib.sha256(text.encode()).hexdigest()
        return self.kept(name, ["on", base.name, hashed, asdict(how)], make)

    def _trained(self, model: nn.Module, text: str, how: Steps, to: Path) -> str:
        loss = descend(model.train(), self.tokens(text), how) if how.steps else 0.0
        model.save_pretrained(to)
        self.tokenizer.save_pretrained(to)
        return f"loss {loss:.3f}"


def load(folder: Path, base: Path | None = None) -> LlamaForCausalLM:
    """A model, or ``base`` with the adapter in ``folder`` merged; float32, not training."""
    if (folder / "adapter_config.json").exists():
        merged = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), folder).merge_and_unload()
        return merged.eval()
    return LlamaForCausalLM.from_pretrained(folder).eval()
