"""What a run will hold in memory, stage by stage, and the choices that make it fit a budget."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..errors import ResourceError
from ..streaming.upload import BUFFER, RING
from .choice import Choice
from .fit_terms import FitTerms
from .sizes import Sizes
from .terms import Terms

RUNTIME = 560 << 20  # bytes: the interpreter with torch, transformers and this package once everything is in use
Bytes = dict[str, int]  # by stage
Limits = tuple[int | None, int | None]  # bytes of host and device


@dataclass(frozen=True)
class Plan:
    """A choice with the peak of every stage, on the host and on the device, in bytes."""

    choice: Choice
    host: Bytes
    device: Bytes

    @property
    def peak(self) -> int:
        """The largest stage in bytes of the host's memory, all of the process."""
        return max(self.host.values())

    @property
    def device_peak(self) -> int:
        return max(self.device.values(), default=0)

    def as_dict(self, seconds: dict[str, float]) -> dict[str, Any]:
        """The plan as JSON, sizes in bytes, with predicted ``seconds`` by stage."""
        peaks = {"peak": self.peak, "device_peak": self.device_peak}
        return {**asdict(self.choice), "host": self.host, "device": self.device, **peaks, "seconds": seconds}


def stages(sizes: Sizes, choice: Choice) -> Plan:
    """The peak of every stage of a run."""
    a, gpu = Terms(sizes, choice), sizes.device.type == "cuda"
    fits, effect = FitTerms(a), "fits" if sizes.fits else "effect"
    if not sizes.streams:
        host = {"moves": RUNTIME + sum(sizes.stored) + sizes.tune + a.maps + a.move, "tables": RUNTIME + a.tables}
        device = {"moves": a.largest_map + a.largest_weight + a.move, "tables": a.tables}
        return Plan(choice, host, device if gpu else {})
    moments = 0 if sizes.aligned else sum(a.crosses) + sum(a.grams)
    run = a.converted + a.inside + a.waiting + a.kept + a.product
    pair = sizes.cast + a.inside  # of whole blocks: a pass before, where depths differ
    rest = RUNTIME + sizes.extent.nbytes + a.stored + sizes.tune + (2 * RING * BUFFER if gpu else a.masks)
    base = rest + a.hidden
    if gpu:
        host = {"pairing": base, "forward": base}
        host |= {"maps": base + a.kept + (0 if a.maps_on_device else a.made - a.kept)}
        held = 0 if a.maps_on_device else a.maps
        host |= {effect: rest + held + fits.host, "moves": base + a.kept + held + a.move // 2}
    else:
        host = {"pairing": base + pair, "forward": base + run + moments + a.z}
        host |= {"maps": base + a.made, effect: rest + a.maps + fits.host}
        host |= {"moves": base + a.kept + a.maps + a.move + fits.made}
    there = a.masks + a.stored
    device = {
        "pairing": there + pair,
        "forward": there + run + moments // choice.tiles + (a.z if a.maps_on_device else 0),
        "maps": there + a.made if a.maps_on_device else 0,
        effect: there + (a.maps if a.maps_on_device else a.largest_map) + a.largest_weight + fits.device,
        "moves": there + (a.maps if a.maps_on_device else a.largest_map) + a.largest_weight + a.move + fits.made,
        "tables": a.tables,
    }
    tables = RUNTIME + a.hidden + sizes.extent.nbytes + a.tables
    host = {"calibration": RUNTIME + sizes.extent.loading, **host, "tables": tables}
    there_are = {"pairing": sizes.compares, "maps": not sizes.aligned, effect: bool(sizes.fits) or sizes.told}
    both = ({n: peak for n, peak in peaks.items() if peak and there_are.get(n, True)} for peaks in (host, device))
    host, device = both
    return Plan(choice, host, device if gpu else {})


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
    choices = list(_choices(Choice(batch_size, resident=not offload), gpu=sizes.device.type == "cuda"))
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


def _choices(start: Choice, *, gpu: bool) -> Iterator[Choice]:
    """Choices to try, the cheap ones first: as asked, maps by iteration, smaller batches, no reading ahead; on a GPU
    then maps on the CPU, moments by tiles, attention and MLP one after the other.

    Without a GPU the last two would save nothing: making the maps takes more.
    """
    sizes = [start.batch_size]
    while sizes[-1] > 1:
        sizes.append(sizes[-1] // 2)
    yield start
    least = replace(start, method="iterate")
    yield from (replace(least, batch_size=n, ahead=ahead) for ahead in (True, False) for n in sizes)
    if gpu:
        cpu = replace(least, ahead=False, polar="cpu")
        yield from (replace(cpu, batch_size=n) for n in sizes)
        yield from (replace(cpu, batch_size=1, tiles=1 << k) for k in range(1, 6))
        yield replace(cpu, batch_size=1, tiles=32, halves=True)


def _rounded(nbytes: int) -> str:
    """Bytes rounded upwards, written as ``--max-memory`` takes them."""
    return f"{-(-nbytes // (1 << 20))}MiB"
