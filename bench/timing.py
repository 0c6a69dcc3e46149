"""Times of several ways to do one thing, taken in turns: what else the machine does then falls on all of them."""

import os
import statistics
import time
from collections.abc import Callable

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDS = int(os.environ.get("ROUNDS", 7))


SLOW = 1.0  # seconds: on a GPU a way that takes longer is timed once, and that stands for every round
FILLED = 5e-3  # seconds that a round on a GPU takes at least: the host then is ahead of it, as it is in a job


def in_turns(ways: dict[str, Callable[[], object]], *, rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Seconds a call, of every round of every way; one round of each comes first and does not count.

    On a GPU a round is as many calls as fill ``FILLED``, between two events in its stream; see ``SLOW``.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    calls = dict.fromkeys(ways, 1)
    for turn in range(rounds + 1):
        for name, run in ways.items():
            if turn and not calls[name]:
                continue
            spent = _seconds(run, calls[name])
            if turn:
                seconds[name].append(spent)
            elif DEVICE == "cuda":
                if spent < 10 * SLOW:  # the very first call loads code; the second is like the others
                    spent = _seconds(run, 1)
                if spent > SLOW:
                    seconds[name], calls[name] = [spent] * rounds, 0
                else:
                    calls[name] = min(100, 1 + int(FILLED / spent))
    return seconds


def _seconds(run: Callable[[], object], calls: int) -> float:
    if DEVICE == "cpu":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / calls


def ratio(ours: list[float], other: list[float]) -> dict[str, float]:
    """How much faster ours is: by the fastest rounds, by the median of turns, and the quartiles of turns around it."""
    turns = [b / a for a, b in zip(ours, other, strict=True)]
    low, median, high = statistics.quantiles(turns, n=4)
    return dict(fastest=min(other) / min(ours), median=median, low=low, high=high)
