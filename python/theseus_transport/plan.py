"""What a run will hold in memory, stage by stage, and the choices that make it fit a budget."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from math import prod
from typing import Any, Literal

from .errors import ResourceError
from .models import TILE
from .moves import move_bytes
from .polar import polar_bytes
from .sizes import Sizes
from .upload import BUFFER, RING
from .whitening import whiten_bytes

ROWS_AHEAD = 4096  # of every space, mixed by a kernel of their own before moments are taken
RUNTIME = 560 << 20  # bytes: the interpreter with torch, transformers and this package once everything is in use
Bytes = dict[str, int]  # by stage
Limits = tuple[int | None, int | None]  # bytes of host and device


@dataclass(frozen=True)
class Choice:
    """How a run is carried out; batch size, method, the place of maps and tiles change its rounding, the rest nothing.

    Attributes:
        batch_size: samples per forward pass.
        ahead: blocks are read while the ones before them run.
        resident: hidden states stay in memory, rather than in files.
        method: of decompositions (see :func:`procrustes`): ``auto`` is fast, ``iterate`` needs less memory.
        polar: where maps are decomposed, ``device`` or ``cpu``.
        tiles: of columns in which moments are added up on a device, each by a pass of its own through the blocks.
        halves: attention and MLP of a block run one after the other, each with its own weights alone.
    """

    batch_size: int
    ahead: bool = True
    resident: bool = True
    method: Literal["auto", "iterate"] = "auto"
    polar: Literal["device", "cpu"] = "device"
    tiles: int = 1
    halves: bool = False

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
        halves = ", attention and MLP one after the other" if self.halves else ""
        return f"{self.batch_size} samples a pass, {reads}, hidden states {where}{how}{cpu}{passes}{halves}"


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


def stages(sizes: Sizes, choice: Choice) -> Plan:
    """The peak of every stage of a run."""
    gpu, extent = sizes.device.type == "cuda", sizes.extent
    on_device, batch = gpu and choice.polar == "device", choice.batch_size
    spaces, stored, slots = sizes.spaces, sum(sizes.stored), 2 if choice.ahead else 1
    source, target = sizes.layouts
    paired = source.depth != target.depth  # by a pass before
    sides = list(zip(sizes.layouts, extent.lengths, sizes.elementwise, strict=True))
    # the forward pass: hidden states, masks of a byte a pair of tokens, what a block makes, rows that wait or are kept
    hidden = sum(la.width * length * n for la, length, n in sides)  # of a sample
    hidden *= extent.samples if choice.resident else batch
    masks = extent.samples * sum(length**2 for _, length, _ in sides) if source.family.modality == "text" else 0
    inside = batch * max((3 * la.middle + 2 * la.width) * length * n for la, length, n in sides)
    features = [sum(side) for side in zip(*spaces, strict=True)]
    waiting = batch * extent.lengths[0] * features[0] * sizes.elementwise[0]
    kept = batch * extent.lengths[1] * sum(map(prod, zip(features, sizes.elementwise, strict=True)))
    # moments and maps
    crosses = [8 * prod(widths) for widths in spaces]
    grams = [8 * (own**2 + other**2) for own, other in spaces] if sizes.recipe.whiten_power else [0]
    product = max(*crosses, *grams) // 2  # of a chunk, in float32
    z = 2 * 8 * source.width * target.width  # the next block's map, and the sum of z's crosses
    widest = max(spaces, key=prod)
    polar = polar_bytes(*widest, method="iterate" if on_device else choice.method)
    if sizes.recipe.whiten_power:
        polar = max(polar + max(crosses), whiten_bytes(*widest, center=sizes.recipe.center))
    elif sizes.recipe.center:
        polar += max(crosses)
    if gpu:  # outputs that wait for a launch, and rows that are mixed ahead of it
        inside, product = 2 * inside, product + ROWS_AHEAD * 4 * sum(features)
    if on_device:  # C twice more where it lacks directions; up to three spaces behind norms at once
        together = 3 * (polar_bytes(source.width, target.width, method="iterate") + z // 2)
        polar = max(polar + 2 * max(crosses), together)
    made = sum(crosses) + sum(grams) + polar + kept + z
    move, maps = max(move_bytes(*pair) for pair in sizes.matrices), sizes.maps + z
    largest = 8 * max(prod(own) for own, _ in sizes.matrices)
    tables = 4 * min(TILE, sizes.table) + z
    run = (sizes.cast_half if choice.halves else sizes.cast) + inside + waiting + kept + product
    base = RUNTIME + hidden + extent.nbytes + slots * stored + sizes.tune + (2 * RING * BUFFER if gpu else masks)
    host = {
        "calibration": RUNTIME + extent.loading,
        "pairing": base + (0 if gpu else sizes.cast + inside) if paired else 0,
        "forward": base + (0 if gpu else run + sum(crosses) + sum(grams) + z),
        "maps": base + (kept if on_device else made),
        "moves": base + kept + (0 if on_device else maps) + (move // 2 if gpu else move),
        "tables": RUNTIME + hidden + tables,
    }
    upload = masks + slots * stored
    device = {
        "pairing": upload + sizes.cast + inside if paired else 0,
        "forward": upload + run + sum(crosses) // choice.tiles + sum(grams) + (z if on_device else 0),
        "maps": upload + made if on_device else 0,
        "moves": upload + (maps if on_device else 8 * prod(widest)) + largest + move,
        "tables": tables,
    }
    if sizes.aligned:
        host = {"moves": RUNTIME + stored + sizes.tune + maps + move, "tables": RUNTIME + tables}
        device = {"moves": 8 * prod(widest) + largest + move, "tables": tables}
    return Plan(
        choice, *({stage: peak for stage, peak in peaks.items() if peak} for peaks in (host, device if gpu else {}))
    )


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
    """The cheap ones first: maps by iteration, smaller batches, no reading ahead; maps on the CPU, moments by tiles,
    attention and MLP one after the other. On the CPU the last two save nothing: making the maps takes more."""
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
        yield replace(cpu, batch_size=1, tiles=32 if tiled else 1, halves=True)


def _rounded(nbytes: int) -> str:
    """Upwards, as it would be given."""
    return f"{-(-nbytes // (1 << 20))}MiB"
