"""Moves of the MLP's neurons: permuted, copied, joined by silent ones, rescaled."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from .models import Draw, Move, Spec


def neurons(arrange: Callable[[Draw, int], list[int]], silent: Sequence[str] = (), rescale: float = 1.0) -> Move:
    """Neuron j becomes a copy of neuron `arrange(..)[j]`; copies share the weights of the down projection unevenly.

    -1 is a new silent neuron, with zero rows in the layers named in `silent` and random weights elsewhere. `rescale`
    multiplies the last expanding layer (up) and divides down.
    """

    def step(spec: Spec, seed: int) -> Spec:
        draw, parts = Draw(seed), dict(spec.parts)
        for i in range(spec.layers):
            order = arrange(draw, spec.config["intermediate_size"])
            new, down = torch.tensor(order) < 0, f"blocks.{i}.down.weight"
            for part in ("gate", "up"):
                factor = rescale if part == "up" else 1.0
                for key in (f"blocks.{i}.{part}.{kind}" for kind in ("weight", "bias")):
                    if key in parts:
                        rows = parts[key][order] * factor
                        random = draw.normal(*rows.shape) / rows.shape[-1] ** 0.5
                        rows[new] = 0.0 if part in silent else random[new]
                        parts[key] = rows
            columns = parts[down][:, order] * draw.shares(order) / rescale
            random = draw.normal(*columns.shape) / columns.shape[1] ** 0.5
            columns[:, new] = random[:, new]
            parts[down] = columns
        return replace(spec, parts=parts, config=spec.config | {"intermediate_size": len(order)})

    return step


def permuted_neurons(draw: Draw, count: int) -> list[int]:
    return draw.order(count)


def doubled_neurons(draw: Draw, count: int) -> list[int]:
    return [*range(count), *range(count)]


def with_extra(extra: int, kept: int = -1) -> Callable:
    """`extra` more neurons at random places: silent ones (-1), or copies of neuron `kept`, `kept + 1`, ..."""

    def arrange(draw: Draw, count: int) -> list[int]:
        order = [*range(count), *((kept + j if kept >= 0 else -1) for j in range(extra))]
        return [order[j] for j in draw.order(len(order))]

    return arrange
