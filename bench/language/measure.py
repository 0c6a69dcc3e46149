"""Bits per byte of ways on test text, and the table of what share of training they bring."""

from __future__ import annotations

import math
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator

import torch
from scipy.stats import t as student
from torch import Tensor
from train import ROW, Shelf
from ways import HELD_OUT, Forward, Task, way

ALPHAS = 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0
TEST, VALIDATION = 160, 32  # rows that decide bits, and that choose an alpha


@torch.no_grad()
def bits(forward: Forward, rows: Tensor, lengths: Tensor) -> float:
    """Bits per byte of next tokens; ``rows`` [n, tokens] are ids, ``lengths`` [vocabulary] are bytes of a token."""
    lost = 0.0
    for ids in rows.split(32):
        logits = forward(ids)[:, :-1].flatten(0, 1)
        lost += float(torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum"))
    return lost / math.log(2) / int(lengths[rows[:, 1:]].sum())


class Texts:
    """Rows of token ids of a domain and of general text, for calibration, validation and test."""

    def __init__(self, shelf: Shelf, calibration: str, count: int) -> None:
        self.shelf, self.calibration, self.count = shelf, calibration, count
        tokenizer = shelf.tokenizer
        self.lengths = torch.tensor([len(token) for token in tokenizer.convert_ids_to_tokens(range(len(tokenizer)))])

    def rows(self, domain: str, part: str) -> Tensor:
        corpus = self.shelf.corpus
        tokens = self.shelf.tokens((corpus.general if domain == "general" else corpus.domains[domain])[part])
        return tokens[: len(tokens) // ROW * ROW].view(-1, ROW)

    def test(self, domain: str) -> Tensor:
        """Every so many of all rows, so that all files are in it."""
        rows = self.rows(domain, "test")
        return rows[:: max(1, len(rows) // TEST)][:TEST]

    def unseen(self, domain: str) -> tuple[Tensor, Tensor]:
        """Rows that no training saw, of all files alike: those to calibrate on, and those that choose an alpha."""
        rows = self.rows(domain, "calibration")
        chosen = torch.arange(len(rows)) % max(2, len(rows) // VALIDATION) == 0
        return rows[~chosen], rows[chosen]

    def drawn(self, domain: str) -> Tensor:
        """The calibration: domain, general or mix (half and half), with rows beside it that the command holds out."""
        sides = {"domain": [domain], "general": ["general"], "mix": [domain, "general"]}[self.calibration]
        draw = torch.Generator().manual_seed(0)
        parts = []
        for i, side in enumerate(sides):
            rows = self.unseen(side)[0]
            count = (self.count + HELD_OUT + i) // len(sides)
            parts.append(rows[torch.randperm(len(rows), generator=draw)[:count]])
        return torch.cat(parts)


def measured(task: Task, texts: Texts, names: list[str]) -> Iterator[dict]:
    """One row of numbers for every way: at alpha 1, and at the alpha that is best for held-out rows of the domain."""
    cell = task.cell
    tests = {"domain": texts.test(cell.domain), "general": texts.test("general")}
    held = texts.unseen(cell.domain)[1]

    def score(forward: Forward, rows: Tensor = tests["domain"]) -> float:
        return bits(forward, rows, texts.lengths)

    same: dict = {"pair": cell.pair, "kind": cell.kind, "domain": cell.domain, "seed": cell.seed}
    same |= {
        "rows": texts.count,
        "text": texts.calibration,
        "general zero": score(task.logits("target"), tests["general"]),
    }
    same |= {name: score(task.logits(name)) for name in ("source", "tuned", "target", "ceiling")}
    for name in names:
        began = time.perf_counter()
        at = way(name)(task)
        seconds = time.perf_counter() - began
        best = min(ALPHAS, key=lambda alpha: score(at(alpha), held))
        found = {"moved": score(at(1)), "best": score(at(best))}
        shares = {f"share {key}": (same["target"] - x) / (same["target"] - same["ceiling"]) for key, x in found.items()}
        general = score(at(1), tests["general"])
        yield same | {"way": name, "alpha": best, "general": general, "seconds": seconds} | found | shares


def interval(values: list[float]) -> str:
    """Mean and 95 % interval of Student's t, in percent."""
    mean = statistics.fmean(values)
    if len(values) == 1:
        return f"{100 * mean:.0f}"
    half = student.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return f"{100 * mean:.0f} ± {100 * half:.0f}"


def table(rows: list[dict]) -> str:
    """Shares of the ceiling's gain over domains and seeds, in percent, by pair, kind of tune and way."""
    groups = defaultdict(list)
    for row in rows:
        groups[row["pair"], row["kind"], row["way"]].append(row)
    head = ["pair", "tune", "way", "alpha 1", "best alpha", "general text, bits", "cells"]
    lines = [head, ["---"] * len(head)]
    for key, found in groups.items():
        shares = [interval([row[name] for row in found]) for name in ("share moved", "share best")]
        general = statistics.fmean(row["general"] - row["general zero"] for row in found)
        lines.append([*key, *shares, f"{general:+.3f}", str(len(found))])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
