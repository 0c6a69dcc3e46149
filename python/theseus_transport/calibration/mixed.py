"""Calibration mixed with general text, which keeps what a tune is not for as it was."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..activations.inputs import SideInfo
from .calibration import Calibration, load_calibration

GENERAL = "builtin"


def load_mixed(
    reference: str | Path, source: SideInfo, target: SideInfo, *, mix: float, tokens_wanted: int, **options: Any
) -> Calibration:
    """:func:`load_calibration`, with general text (that Python ships) as a share `mix` of all tokens.

    Where `reference` has fewer tokens than wanted there is less general text too. What is held out is of `reference`
    alone. Batches of both kinds alternate.

    Args:
        mix: from 0 to below 1.
        options: of :func:`load_calibration`.

    Raises:
        InputRefused: as :func:`load_calibration`.
    """
    first = load_calibration(reference, source, target, tokens_wanted=own_tokens(tokens_wanted, mix), **options)
    if not mix:
        return first
    wanted = max(1, round(min(tokens_wanted * mix, first.tokens * mix / (1 - mix))))
    plain = {name: value for name, value in options.items() if name in ("batch_size", "seed")}
    general = load_calibration(GENERAL, source, target, tokens_wanted=wanted, **plain)
    parts = (first.batches, general.batches)
    placed = [((i + 0.5) / len(part), k, batch) for k, part in enumerate(parts) for i, batch in enumerate(part)]
    return replace(
        first,
        batches=[batch for *_, batch in sorted(placed, key=lambda place: place[:2])],
        tokens=first.tokens + general.tokens,
        description=f"{first.description}; mixed with {general.description}",
        fingerprint=hashlib.blake2b(f"{first.fingerprint} {general.fingerprint}".encode(), digest_size=32).hexdigest(),
    )


def own_tokens(wanted: int, mix: float) -> int:
    """Of so many tokens, those that are no general text."""
    return max(1, round(wanted * (1 - mix)))
