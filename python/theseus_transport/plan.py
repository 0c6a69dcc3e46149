"""What a run will hold in memory, stage by stage, and the choices that make it fit a budget."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import prod
from typing import Any, Literal

import torch

from .alignment import by_position
from .checkpoint import Checkpoint
from .errors import ResourceError
from .links import moment_links
from .models import TILE
from .moves import move_bytes
from .polar import polar_bytes
from .recipes import Recipe
from .spaces import Layout, by_block

RUNTIME = 560 << 20  # bytes: the interpreter with torch, transformers and this package once everything is in use
Bytes = dict[str, int]  # by stage
Limits = tuple[int | None, int | None]  # bytes of host and device


@dataclass(frozen=True)
class Choice:
    """How a run is carried out; batch size, method, the place of maps and tiles change its rounding, no more.

    Attributes:
        batch_size: samples per forward pass.
        ahead: blocks are read while the ones before them run.
        resident: hidden states stay in memory, rather than in files.
        method: of decompositions (see :func:`procrustes`): ``auto`` is fast, ``iterate`` needs less memory.
        polar: where maps are decomposed, ``device`` or ``cpu``.
        tiles: of columns in which moments are added up on a device, each by a pass of its own through the blocks.
    """

    batch_size: int
    ahead: bool = True
    resident: bool = True
    method: Literal["auto", "iterate"] = "auto"
    polar: Literal["device", "cpu"] = "device"
    tiles: int = 1

    @property
    def rounding(self) -> dict[str, Any]:
        """What of it decides the rounding of a result; a run goes on as it was begun."""
        return {"batch size": self.batch_size, "maps by": self.method, "maps on": self.polar, "tiles": self.tiles}

    @property
    def words(self) -> str:
        reads = "the next blocks read ahead" if self.ahead else "one pair of blocks at a time"
        where = "in memory" if self.resident else "in files"
        how = ", maps by iteration" if self.method == "iterate" else ""
        cpu = ", maps made on the CPU" if self.polar == "cpu" else ""
        passes = f", moments in {self.tiles} passes" if self.tiles > 1 else ""
        return f"{self.batch_size} samples a pass, {reads}, hidden states {where}{how}{cpu}{passes}"


@dataclass(frozen=True)
class Plan:
    """A choice with the peak of every stage, on the host and on the device, in bytes."""

    choice: Choice
    host: Bytes
    device: Bytes

    @property
    def peak(self) -> int:
        """Of the host's memory, all of the process."""
        return max(self.host.values())

    @property
    def device_peak(self) -> int:
        return max(self.device.values(), default=0)

    def as_dict(self, seconds: dict[str, float]) -> dict[str, Any]:
        """As JSON, with predicted seconds by stage."""
        peaks = {"peak": self.peak, "device_peak": self.device_peak}
        return {**asdict(self.choice), "host": self.host, "device": self.device, **peaks, "seconds": seconds}


@dataclass(frozen=True)
class Sizes:
    """What memory depends on: the two models, the tune, the calibration and the recipe.

    Attributes:
        tuned: a full tune of the source, or None.
        length: tokens of a sample; tokens: of all samples.
        aligned: the maps are there already.
    """

    checkpoints: tuple[Checkpoint, Checkpoint]
    layouts: tuple[Layout, Layout]
    recipe: Recipe
    tuned: Checkpoint | None
    length: int
    tokens: int
    device: torch.device
    aligned: bool = False

    @property
    def elementwise(self) -> list[int]:
        """Bytes of a number in each model's forward pass."""
        return [c.compute_dtype.itemsize for c in self.checkpoints]

    def block(self, checkpoint: Checkpoint, layout: Layout, *, size: int | None = None) -> int:
        """Bytes of the largest block as stored, or with numbers of ``size`` bytes where stored otherwise."""

        def bytes_of(name: str) -> int:
            stored = checkpoint.dtypes[name].itemsize
            return prod(checkpoint.shapes[name]) * (stored if size is None else 0 if size == stored else size)

        return max((sum(map(bytes_of, names)) for names in by_block(layout, checkpoint).values()), default=0)

    def tables(self) -> int:
        """Bytes of the largest matrix in float64: what moves row tile by row tile is no larger."""
        shapes = [shape for checkpoint in self.checkpoints for shape in checkpoint.shapes.values()]
        return 8 * max(prod(shape) for shape in shapes)

    def links(self) -> list[tuple[int, int]]:
        """Widths of the spaces of one pair of blocks: attention, context, MLP, middle and what follows."""
        links = moment_links(*self.layouts, by_position(*self.layouts))
        b = next(name.split(".")[0] for name in links if name.endswith(".middle"))
        inner = [links[f"{b}.{part}"] for part in ("attention", "context", "mlp", "middle") if f"{b}.{part}" in links]
        return [(link.source.width, link.target.width) for link in (*inner, links["final"])]


def stages(sizes: Sizes, choice: Choice) -> Plan:
    """The peak of every stage of a run."""
    (source, target), gpu = sizes.layouts, sizes.device.type == "cuda"
    numbers, links = sizes.elementwise, sizes.links()
    stored = [sizes.block(c, la) for c, la in zip(sizes.checkpoints, sizes.layouts, strict=True)]
    cast = [sizes.block(c, la, size=n) for c, la, n in zip(sizes.checkpoints, sizes.layouts, numbers, strict=True)]
    filled = [s if gpu else 0 for s in stored]
    tuned = sizes.block(sizes.tuned, source) if sizes.tuned else 0
    count = sizes.tokens + choice.batch_size * sizes.length  # one batch is held out
    hidden = count * sum(la.width * n for la, n in zip(sizes.layouts, numbers, strict=True))
    held = (2 if choice.ahead else 1) * sum(stored) + tuned
    rows = choice.batch_size * sizes.length
    kept = rows * sum(s * numbers[0] + t * numbers[1] for s, t in links)
    pending = rows * sum(s for s, _ in links) * numbers[0]
    passing = rows * max((3 * la.middle + 2 * la.width) * n for la, n in zip(sizes.layouts, numbers, strict=True))
    crosses = [8 * s * t for s, t in links]
    grams = sum(8 * (s * s + t * t) for s, t in links) if sizes.recipe.whiten_power else 0
    square = 8 * source.width * target.width
    maps = sum(crosses) + 2 * square  # of a block, the embeddings' and the sum of z's crosses
    widest = max(links, key=prod)
    polar = polar_bytes(*widest, method="iterate" if gpu and choice.polar == "device" else choice.method)
    move = max(move_bytes(*pair) for pair in _matrices(source, target))
    base = RUNTIME + (hidden if choice.resident else hidden // max(1, count // rows))
    run = sum(filled) + sum(cast) + pending + passing + max(crosses) // 2 + kept
    on_device = gpu and choice.polar == "device"
    host = {
        "forward": base + held + (0 if gpu else run + sum(crosses) + grams + 2 * square),
        "maps": base + held + kept + (0 if on_device else sum(crosses) + grams + polar + 2 * square),
        "moves": base + held + maps + move + kept // 2,
        "tables": RUNTIME + 4 * min(TILE, sizes.tables()) + 2 * square,
    }
    if sizes.aligned:
        moves = RUNTIME + sum(stored) + tuned + maps + move
        return Plan(choice, {"moves": moves, "tables": host["tables"]}, {})
    device = {
        "forward": run + sum(crosses) // choice.tiles + grams,
        "maps": sum(crosses) + grams + polar_bytes(*widest, method="iterate") + kept,
    }
    return Plan(choice, host, {k: v for k, v in device.items() if on_device or k != "maps"} if gpu else {})


def fitted(
    sizes: Sizes,
    batch_size: int,
    *,
    offload: bool,
    budget: Limits,
    free: Limits,
    like: Mapping[str, Any] | None = None,
) -> Plan:
    """The first choice that fits host and device.

    Args:
        budget: bytes the run may take of each, or None: then what is ``free`` there; None is no limit.
        like: what :attr:`Choice.rounding` was when the run was begun that is to go on.

    Raises:
        ResourceError: none does; the message names the smallest budget that would.
    """
    (max_ram, ram), (max_memory, memory) = (
        (free[i], f"{_rounded(free[i] or 0)} of {what} are available")
        if budget[i] is None
        else (budget[i], f"{option} is {_rounded(budget[i] or 0)}")
        for i, (option, what) in enumerate((("--max-ram", "memory"), ("--max-memory", "device memory")))
    )
    limits, plans = ((ram, max_ram), (memory, max_memory)), []
    gpu, tiled = sizes.device.type == "cuda", not sizes.recipe.whiten_power
    choices = list(_choices(Choice(batch_size, resident=not offload), gpu=gpu, tiled=tiled))
    for choice in [c for c in choices if c.rounding == like] or choices:
        plan = stages(sizes, choice)
        peaks = zip(limits, (plan.peak, plan.device_peak), strict=True)
        over = [(said, peak) for (said, limit), peak in peaks if limit is not None and limit < peak]
        if not over:
            return plan
        plans.append((over, choice))
    # of one choice, so that both do together
    over, choice = min(plans, key=lambda plan: (len(plan[0]), sum(peak for _, peak in plan[0])))
    lacking = [f"{said}, and {_rounded(peak)} is the least that would do" for said, peak in over]
    files = "" if offload else "; --offload-folder keeps hidden states in files"
    raise ResourceError(f"{'; '.join(lacking)} ({choice.words}){files}")


def _choices(start: Choice, *, gpu: bool, tiled: bool) -> Iterator[Choice]:
    """The cheap ones first: maps by iteration, smaller batches, no reading ahead, maps on the CPU, moments by tiles."""
    sizes = [start.batch_size]
    while sizes[-1] > 1:
        sizes.append(sizes[-1] // 2)
    yield start
    least = replace(start, method="iterate")
    yield from (replace(least, batch_size=n, ahead=ahead) for ahead in (True, False) for n in sizes)
    if gpu:
        cpu = replace(least, ahead=False, polar="cpu")
        yield from (replace(cpu, batch_size=n) for n in sizes)
        yield from (replace(cpu, batch_size=1, tiles=1 << k) for k in range(1, 6 if tiled else 1))


def _matrices(source: Layout, target: Layout) -> Sequence[tuple[Any, Any]]:
    return [(source.weights()[role], target.weights()[role]) for role in source.weights()]


def _rounded(nbytes: int) -> str:
    """Upwards, as it would be given."""
    return f"{-(-nbytes // (1 << 20))}MiB"
