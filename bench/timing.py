"""Times of several ways to do one thing, taken in turns: what else the machine does then falls on all of them."""

import os
import statistics
import time
from collections.abc import Callable

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDS = int(os.environ.get("ROUNDS", 7))


def in_turns(ways: dict[str, Callable[[], object]], *, rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Seconds of every round of every way; one round of each comes first and does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, run in ways.items():
            start = time.perf_counter()
            run()
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(ours: list[float], other: list[float]) -> dict[str, float]:
    """How much faster ours is: by the fastest rounds, by the median of turns, and the quartiles of turns around it."""
    turns = [b / a for a, b in zip(ours, other, strict=True)]
    low, median, high = statistics.quantiles(turns, n=4)
    return dict(fastest=min(other) / min(ours), median=median, low=low, high=high)
