"""Images of the demo: scikit-learn's digits, and the shifts they are seen under.

Images are [n, 1, 8, 8] in [0, 1]; a shift takes them and a generator and returns as many.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Generator, Tensor
from torch.nn import functional as F


def warp(images: Tensor, *, angle: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """Rotate by angle [n] degrees, magnify by scale [n], move by offset [n, 2] half widths; bilinear, black outside."""
    radians = torch.deg2rad(angle)
    cos, sin = torch.cos(radians) / scale, torch.sin(radians) / scale
    rows = (torch.stack([cos, sin, offset[:, 0]], 1), torch.stack([-sin, cos, offset[:, 1]], 1))
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def jitter(images: Tensor, generator: Generator, *, strength: float = 1.0) -> Tensor:
    """Small random warps and noise: up to 10 degrees, 10 %, half a pixel and noise of 0.15, times the strength."""

    def uniform(*shape: int) -> Tensor:
        return torch.rand(len(images), *shape, generator=generator) * 2 - 1

    warped = warp(
        images,
        angle=10 * strength * uniform(),
        scale=1 + 0.1 * strength * uniform(),
        offset=0.12 * strength * uniform(2),
    )
    level = 0.15 * strength * torch.rand(len(images), 1, 1, 1, generator=generator)
    return warped + level * torch.randn(images.shape, generator=generator)


def _fixed(images: Tensor, *, angle: float = 0.0, scale: float = 1.0) -> Tensor:
    n = len(images)
    return warp(images, angle=torch.full((n,), angle), scale=torch.full((n,), scale), offset=torch.zeros(n, 2))


def occlude(images: Tensor, generator: Generator, *, size: int = 4) -> Tensor:
    """A white square of size x size pixels at a random place."""
    corner = torch.randint(0, images.shape[-1] - size + 1, (2, len(images), 1), generator=generator)
    inside = (torch.arange(images.shape[-1]) - corner).clamp(-1, size)
    rows, columns = (inside >= 0) & (inside < size)
    return torch.where((rows[:, :, None] & columns[:, None, :])[:, None], torch.ones(()), images)


SHIFTS: dict[str, Callable[[Tensor, Generator], Tensor]] = {
    "rotation": lambda images, _: _fixed(images, angle=40.0),
    "shrink": lambda images, _: _fixed(images, scale=0.6),
    "occlusion": occlude,
    "low contrast": lambda images, _: 0.35 + 0.3 * images,
}


@dataclass(frozen=True)
class Split:
    """Images [n, 1, 8, 8] and labels [n]."""

    images: Tensor
    labels: Tensor


def load_splits(seed: int, *, train: int) -> dict[str, Split]:
    """scikit-learn's digits (ships with it, no download), shuffled by seed into train and test."""
    images, labels = _digits()
    order = torch.randperm(len(images), generator=generator_of("split", seed))
    parts = {"train": order[:train], "test": order[train:]}
    return {name: Split(images[i], labels[i]) for name, i in parts.items()}


@cache
def _digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    return torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target)


def shifted(splits: Mapping[str, Split], part: str, seed: int, shift: str) -> Split:
    """The images of one part under a shift, the same for every model and update."""
    split = splits[part]
    return Split(SHIFTS[shift](split.images, generator_of(part, seed, shift)), split.labels)


def generator_of(*key: object) -> Generator:
    return Generator().manual_seed(zlib.crc32(repr(key).encode()))


def pixels(images: Tensor) -> Tensor:
    return 2 * images - 1
