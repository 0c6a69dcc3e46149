"""Moments of what any module reads and writes, in two models of no particular family: the drop-in's calibration."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from math import isqrt
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..activations import row_mixing as tokens
from ..activations.moments import CrossMoment, Grams
from ..activations.row_mixing import RowMixing
from ..errors import InputRefused


class Refused(InputRefused, ValueError):
    """Refused, as a ValueError for those who call through another library."""


@dataclass(frozen=True)
class Tap:
    """Where a hook looks: a module's first argument or its output, or one of equal parts of that along its features."""

    module: str
    side: Literal["in", "out"]
    part: int = 0
    parts: int = 1

    def __str__(self) -> str:
        return f"{self.module}.{self.side}" + (f"[{self.part}]" if self.parts > 1 else "")


class Taps:
    """Moments between two models' activations, which have their samples first.

    A module that runs several times in one forward pass is seen the last time.

    Attributes:
        moments: tap -> CrossMoment of the paired rows, products in float64.
        grams: tap -> the same of source with source, and of target with target; empty without ``whiten``.
    """

    def __init__(self, wanted: Iterable[Tap], *, seq_align: str, whiten: bool, device: torch.device) -> None:
        self._align, self._whiten, self._device = seq_align, whiten, device
        self._wanted: dict[str, list[Tap]] = {}
        for tap in dict.fromkeys(wanted):
            self._wanted.setdefault(tap.module, []).append(tap)
        self._side = 0  # whose forward pass is running; source and target may be one module
        self._held: dict[Tap, Tensor] = {}
        self._runs: tuple[Counter[Tap], Counter[Tap]] = (Counter(), Counter())
        self.moments: dict[Tap, CrossMoment] = {}
        self.grams: dict[Tap, Grams] = {}

    def run(self, source: Callable[[], object], target: Callable[[], object]) -> None:
        """Run the two forward passes, on the same samples, and add what was seen in both.

        Raises:
            Refused: a module ran more often in one model than in the other, or activations cannot be paired.
        """
        self._held.clear()
        for self._side, forward in enumerate((source, target)):
            self._runs[self._side].clear()
            with torch.no_grad():
                forward()
        both = self._runs[0].keys() & self._runs[1].keys()
        for tap in both:
            if self._runs[0][tap] != self._runs[1][tap]:
                raise Refused(
                    f"{tap} ran {self._runs[0][tap]} times in the source, {self._runs[1][tap]} times in the target"
                )

    @contextmanager
    def watching(self, source: nn.Module, target: nn.Module) -> Iterator[None]:
        """Open hooks on the modules of the wanted taps that both models have, by their path in the model."""
        modules = [dict(model.named_modules()) for model in (source, target)]
        handles = [
            modules[side][name].register_forward_hook(self._hook(side, self._wanted[name]))
            for name in self._wanted
            if name in modules[0] and name in modules[1]
            for side in (0, 1)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, side: int, taps: list[Tap]) -> Callable[..., None]:
        def observe(module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
            result = result[0] if isinstance(result, (tuple, list)) and result else result
            for tap in taps:
                seen = result if tap.side == "out" else args[0] if args else None
                if side == self._side and isinstance(seen, Tensor) and seen.is_floating_point():
                    self._observe(tap, seen.detach().chunk(tap.parts, -1)[tap.part])

        return observe

    def _observe(self, tap: Tap, seen: Tensor) -> None:
        self._runs[self._side][tap] += 1
        if self._side == 0:
            self._held[tap] = seen.clone()  # a later module may write into it
        elif self._runs[0][tap] == self._runs[1][tap]:
            self._add(tap, *paired(self._held.pop(tap).to(self._device), seen.to(self._device), self._align))

    def _add(self, tap: Tap, source: Tensor, target: Tensor, mixing: RowMixing | None) -> None:
        s, t = source.double(), target.double()  # the reference multiplies in float64
        d_s, d_t = s.shape[1], t.shape[1]
        if tap not in self.moments:
            self.moments[tap] = CrossMoment.zeros(d_s, d_t, self._device)
        self.moments[tap].update(s, t, mixing)
        if self._whiten:
            if tap not in self.grams:
                self.grams[tap] = {side: CrossMoment.zeros(d, d, self._device) for side, d in enumerate((d_s, d_t))}
            self.grams[tap][0].update(s, s, mixing, mixing)
            self.grams[tap][1].update(t, t)


def paired(source: Tensor, target: Tensor, mode: str) -> tuple[Tensor, Tensor, RowMixing | None]:
    """Rows [tokens_S, dS] and [tokens_T, dT] that stand for each other, the source's through a row mixing if any.

    Args:
        source, target: [samples, tokens, width], [samples, width] (one token) or [samples, channels, height, width].
        mode: ``mean`` over tokens, ``cls`` (the first token), ``interpolate`` (linear), ``interpolate2d`` (bilinear on
            square grids, a class token apart; linear where a side is no square); anything else pairs tokens in order.

    Raises:
        Refused: numbers of samples or, not aligned, of tokens differ.
    """
    s, t = _by_token(source), _by_token(target)
    if len(s) != len(t):
        raise Refused(f"an activation is {list(source.shape)} in the source, {list(target.shape)} in the target")
    mixing = None
    if mode == "cls":
        s, t = s[:, :1], t[:, :1]
    elif mode == "mean":
        s, t = s.double().mean(1, keepdim=True), t.double().mean(1, keepdim=True)
    elif mode in ("interpolate", "interpolate2d", "interpolate_2d") and s.shape[1] != t.shape[1]:
        mixing = _interpolation(s.shape[1], t.shape[1], len(s), mode != "interpolate").to(s.device)
    if mixing is None and s.shape[1] != t.shape[1]:
        raise Refused(
            f"the source has {s.shape[1]} tokens where the target has {t.shape[1]}, and seq_align is {mode!r}; "
            "choose interpolate2d, interpolate, mean or cls"
        )
    return s.flatten(0, 1), t.flatten(0, 1), mixing


def _by_token(x: Tensor) -> Tensor:
    """[samples, tokens, width]."""
    if x.ndim < 2:
        return x.reshape(1, 1, -1)
    if x.ndim == 2:
        return x[:, None]
    return x.flatten(2).mT if x.ndim == 4 else x.reshape(len(x), -1, x.shape[-1])


@lru_cache(maxsize=8)
def _interpolation(own: int, other: int, samples: int, grid: bool) -> RowMixing:
    """Of ``own`` tokens to ``other``, per sample; on grids where both counts are squares, a class token apart."""
    for prefix in (1, 0) if grid else ():
        sides = isqrt(own - prefix), isqrt(other - prefix)
        if all(sides) and [side**2 + prefix for side in sides] == [own, other]:
            return tokens.bilinear((sides[0],) * 2, (sides[1],) * 2, prefix=prefix).batched(samples)
    return tokens.linear(own, other).batched(samples)
