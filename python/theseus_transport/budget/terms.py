"""What a run holds at one time or another, in bytes, part by part: the terms that `budget/plan.py` adds up by stage."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

from ..linalg.polar import polar_bytes
from ..linalg.whitening import whiten_bytes
from ..models.geometry import Geometry
from ..models.pair import Pair
from ..models.tensors import TILE
from ..updates.layer_moves import move_bytes
from .choice import Choice
from .sizes import Sizes

ROWS_AHEAD = 4096  # kChunk of csrc/dispatch.h: so many rows of a space are mixed at a time


@dataclass(frozen=True)
class Terms:
    """What a job holds that is carried out as ``choice`` says: every property that is a number is in bytes."""

    sizes: Sizes
    choice: Choice

    @property
    def gpu(self) -> bool:
        return self.sizes.device.type == "cuda"

    @property
    def maps_on_device(self) -> bool:
        return self.gpu and self.choice.polar == "device"

    @property
    def hidden(self) -> int:
        """Hidden states of both models; where fits are made of both as changed too, and between attention and MLP."""
        return self.states(3, 3) if self.sizes.fits else self.states(1, 1)

    def states(self, source: int, target: int) -> int:
        """So many hidden states [samples, tokens, width] of each side: of all samples, or of the batch that is read."""
        one = sum(k * la.width * length * n for k, (la, length, n) in zip((source, target), self._sides, strict=True))
        return one * (self.sizes.extent.samples if self.choice.resident else self.choice.batch_size)

    @property
    def files(self) -> int:
        """Files of hidden states: of each model what is read, what is written, and what the last commit needs; one of
        each base and of the tuned source between attention and MLP."""
        kept = replace(self, choice=replace(self.choice, resident=True))
        return kept.states(8, 7) if self.sizes.fits else kept.states(3, 3)

    @property
    def masks(self) -> int:
        """A byte for every pair of tokens of a sample of text; rotary tables are far less."""
        if self.sizes.geometries.source.family.modality != "text":
            return 0
        return self.sizes.extent.samples * sum(length**2 for length in self.sizes.extent.lengths)

    @property
    def stored(self) -> int:
        """Blocks of both models as stored: the pair that runs, and the next one where it is read ahead."""
        return (2 if self.choice.ahead else 1) * sum(self.sizes.stored)

    @property
    def inside(self) -> int:
        """What the wider of both blocks makes of a batch; on a GPU also its outputs, which wait for a launch."""
        made = max((3 * la.middle + 2 * la.width) * length * n for la, length, n in self._sides)
        return self.choice.batch_size * made * (2 if self.gpu else 1)

    @property
    def waiting(self) -> int:
        """Source rows that wait for the target's, of the spaces of a pair of blocks."""
        (own, _), (n, _) = self._features, self.sizes.elementwise
        return self.choice.batch_size * self.sizes.extent.lengths.source * own * n

    @property
    def kept(self) -> int:
        """Rows that are held out, of the spaces of a pair of blocks."""
        (own, other), (n, m) = self._features, self.sizes.elementwise
        return self.choice.batch_size * self.sizes.extent.lengths.target * (own * n + other * m)

    @cached_property
    def crosses(self) -> list[int]:
        """The float64 cross-moment [dS, dT] of every space of a pair of blocks, one number for each."""
        return [8 * prod(widths) for widths in self.sizes.spaces]

    @cached_property
    def grams(self) -> list[int]:
        """The float64 moments of spaces with themselves, [d, d], that the recipe asks for, one number for each."""
        return [8 * width**2 for width in self.sizes.grams]

    @property
    def product(self) -> int:
        """The product of a chunk of rows in float32, of the largest cross; on a GPU also the rows mixed ahead of it."""
        ahead = min(ROWS_AHEAD, self.choice.batch_size * self.sizes.extent.lengths.target) * 4 * sum(self._features)
        largest = 0 if self.sizes.aligned else max(*self.crosses, *self.grams)
        return largest // 2 + (ahead if self.gpu else 0)

    @property
    def converted(self) -> int:
        """Copies of the weights of the pair of blocks that runs which are stored in another dtype than they run in."""
        return self.sizes.cast_half if self.choice.halves else self.sizes.cast

    @property
    def z(self) -> int:
        """The map of what the next block reads and the sum of the crosses behind norms over depth, each [dS, dT]."""
        return 2 * self._square

    @property
    def polar(self) -> int:
        """Making the widest map; on a GPU its cross twice more where directions lack, or three maps behind norms."""
        recipe, widest = self.sizes.recipe, max(self.sizes.spaces, key=prod)
        method, there = "iterate" if self.maps_on_device else self.choice.method, self.maps_on_device
        most = polar_bytes(*widest, method=method, device=there)
        if recipe.whiten_power:
            most = max(most + max(self.crosses), whiten_bytes(*widest, center=recipe.center))
        elif recipe.center:
            most += max(self.crosses)
        if len(self.sizes.spaces) > len(self.sizes.whole):  # the map of all rows, and the cross that leans on it
            most += 2 * max(self.crosses)
        if not there:
            return most
        widths = (geometry.width for geometry in self.sizes.geometries)
        return max(most + 2 * max(self.crosses), 3 * (polar_bytes(*widths, method=method, device=True) + self._square))

    @property
    def made(self) -> int:
        """A block's moments and making its maps of them; maps of heads come first, what they alone need goes then."""
        beside = sum(self.grams) if self.sizes.recipe.whiten_power else 0
        return sum(self.crosses) + max(sum(self.grams), beside + self.polar) + self.kept + self.z

    @property
    def maps(self) -> int:
        """The maps of a block, those outside all blocks, and what :attr:`z` counts."""
        return self.sizes.maps + self.z

    @property
    def largest_map(self) -> int:
        """The largest map as a matrix [dS, dT] in float64, as large as the largest cross."""
        return max(self.crosses)

    @property
    def largest_weight(self) -> int:
        """The largest weight of a source block in float64."""
        return 8 * max(prod(own) for own, _ in self.sizes.matrices)

    @property
    def move(self) -> int:
        """The peak of moving the largest weight of a block, the result included; see :func:`move_bytes`."""
        return max(move_bytes(*pair) for pair in self.sizes.matrices)

    @property
    def tables(self) -> int:
        """Moving a tile of rows of an embedding or a head, through the maps that :attr:`z` counts."""
        return 4 * min(TILE, self.sizes.table) + self.z

    @cached_property
    def _sides(self) -> list[tuple[Geometry, int, int]]:
        """(geometry, tokens of a sample, bytes of a number) of source and target."""
        sizes = self.sizes
        return list(zip(sizes.geometries, sizes.extent.lengths, sizes.elementwise, strict=True))

    @cached_property
    def _features(self) -> Pair[int]:
        """Features of all spaces that are compared of a pair of blocks, of which all tokens are taken."""
        if self.sizes.aligned:
            return Pair(0, 0)
        return Pair(*(sum(widths[side] for widths in self.sizes.whole) for side in (0, 1)))

    @property
    def _square(self) -> int:
        """A map behind a norm, [width_S, width_T] in float64."""
        source, target = self.sizes.geometries
        return 8 * source.width * target.width
