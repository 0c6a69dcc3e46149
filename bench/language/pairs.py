"""Which models a cell of the table is made of, and a wider writing of one model to make a related pair from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from train import Shelf, Size, Steps, load

SOURCE = Size(64, 4)
TARGETS = {"apart": Size(96, 6), "deeper": Size(96, 6, blocks=6)}
AFTER = {"copy": 0, "near": 100, "related": 400}  # a widened copy of the source, trained on for so many steps
BASE = Steps(1500, 3e-3, rows=8)
TUNES = {"full": Steps(250, 1e-3, rows=8), "lora": Steps(250, 2e-3, rows=8, rank=8)}
PAIRS = *TARGETS, *AFTER


@dataclass(frozen=True)
class Cell:
    """One tune of one pair: folders of models; a tune is a model or an adapter."""

    pair: str
    domain: str
    kind: str  # full or lora
    seed: int
    source: Path
    target: Path
    tune: Path  # of the source
    ceiling: Path  # the target, tuned the same way


def cells(shelf: Shelf, pair: str, kinds: list[str], domains: list[str], seed: int) -> Iterator[Cell]:
    """Trains what is not there yet. The halves of general text change sides with the seed."""
    halves = ("first", "second") if seed % 2 == 0 else ("second", "first")
    source = shelf.base(f"source-{seed}", SOURCE, halves[0], Steps(**asdict(BASE) | {"seed": seed}))
    other = 100 + seed
    if pair in TARGETS:
        target = shelf.base(f"{pair}-{seed}", TARGETS[pair], halves[1], Steps(**asdict(BASE) | {"seed": other}))
    else:
        wide = shelf.kept(f"wide-{seed}", [source.name], lambda to: save_widened(shelf, source, to, other))
        more = Steps(AFTER[pair], BASE.rate / 3, BASE.rows, other)
        target = shelf.on(wide, f"{pair}-{seed}", shelf.corpus.general[halves[1]], more)
    for kind in kinds:
        for domain in domains:
            text, how = shelf.corpus.domains[domain]["train"], TUNES[kind]
            tune = shelf.on(source, f"source-{seed}-{kind}-{domain}", text, Steps(**asdict(how) | {"seed": seed}))
            ceiling = shelf.on(target, f"{pair}-{seed}-{kind}-{domain}", text, Steps(**asdict(how) | {"seed": other}))
            yield Cell(pair, domain, kind, seed, source, target, tune, ceiling)


def save_widened(shelf: Shelf, source: Path, to: Path, seed: int) -> None:
    """The source as a model of `TARGETS["apart"]`: the residual x becomes x P with P [dS, dT] of orthonormal rows.

    Then RMSNorm shows sqrt(dT / dS) z P. Gains are 1, their readers hold them; added heads and neurons write nothing.
    """
    torch.manual_seed(seed)
    small, wide = load(source), TARGETS["apart"].model()
    state, made = small.state_dict(), wide.state_dict()
    d, width = SOURCE.width, TARGETS["apart"].width
    p = torch.linalg.qr(torch.randn(width, d, dtype=torch.float64)).Q.T
    wide.config.rms_norm_eps = small.config.rms_norm_eps * d / width
    gains = {"input_layernorm": ("q_proj", "k_proj", "v_proj"), "post_attention_layernorm": ("gate_proj", "up_proj")}
    norm_of = {reader: norm for norm, readers in gains.items() for reader in readers}

    def moved(name: str, value: Tensor, at: Tensor) -> Tensor:
        layer = name.split(".")[-2]
        if value.dim() == 1:
            return torch.ones(width)
        if layer == "embed_tokens":
            return value.double() @ p
        if layer in norm_of or layer == "lm_head":
            norm = "model.norm" if layer == "lm_head" else f"{'.'.join(name.split('.')[:3])}.{norm_of[layer]}"
            rows = value.double() * state[f"{norm}.weight"].double() @ p * (d / width) ** 0.5
            return torch.cat([rows, at[len(rows) :].double()])  # rows of heads and neurons the source does not have
        columns = p.T @ value.double()
        return torch.cat([columns, torch.zeros(width, at.shape[1] - columns.shape[1])], dim=1)

    wide.load_state_dict({name: moved(name, value, made[name]).float() for name, value in state.items()})
    wide.save_pretrained(to)
    shelf.tokenizer.save_pretrained(to)
