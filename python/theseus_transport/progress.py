"""What is told of progress."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int], Callable[[], object]]  # stage and its number of steps -> call after every step


def quiet(stage: str, steps: int) -> Callable[[], object]:
    """Progress that nobody watches."""
    return lambda: None
