"""Budgets from tiny to large: each is met, or refused with the least that would be; none changes a byte by itself."""

import re
from collections.abc import Iterator

import pytest
import theseus_transport as tt
import torch
from helpers.command import identical
from helpers.large_pairs import MIDDLE, TINY, job_of, written
from random_checkpoint import GEOMETRIES, ModelSizes, parameters
from theseus_transport.budget import plan as plan_module
from theseus_transport.budget import terms
from theseus_transport.budget.plan import Plan, fitted
from theseus_transport.budget.sizes import Sizes
from theseus_transport.calibration.extent import Extent
from theseus_transport.jobs.transport_job import Session
from theseus_transport.models.geometry import Geometry
from theseus_transport.models.pair import Pair

MIB = 1 << 20
SMALL = ModelSizes("llama", 128, 384, 2, 4, 2, 300), ModelSizes("llama", 192, 512, 2, 6, 3, 300)
LARGE = GEOMETRIES["llama-3.2-3b"], GEOMETRIES["llama-3.1-8b"]
PAIRS = {"tiny": TINY, "middle": MIDDLE, "qwen": (GEOMETRIES["qwen2.5-0.5b"], GEOMETRIES["qwen2.5-1.5b"])}


class Shapes(dict):
    """A checkpoint of which only the header is known."""

    compute_dtype = torch.float32

    def __init__(self, geometry: ModelSizes) -> None:
        super().__init__(parameters(geometry))
        self.config, self.shapes, self.dtypes = geometry.config(), dict(self), dict.fromkeys(self, torch.bfloat16)


def sizes_of(pair: tuple[ModelSizes, ModelSizes], *, device: str = "cpu") -> Sizes:
    """Of a job with the default number of tokens, in samples of 512, and eight held out."""
    opened = Pair(*map(Shapes, pair))
    geometries = opened.map(lambda checkpoint: Geometry.of(checkpoint.config))
    tokens = 4 * max(max(la.width, la.middle) for la in geometries)
    rows = -(-tokens // 512) + 8
    extent = Extent(rows, Pair(512, 512), rows * 512 * 16)
    return Sizes(opened, geometries, tt.Recipe("coherent"), opened[0], extent, torch.device(device))


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Plan]]:
    """Every plan that was tried."""
    found, stages = [], plan_module.stages
    monkeypatch.setattr(plan_module, "stages", lambda *given: found.append(stages(*given)) or found[-1])
    return found


def least_of(sizes: Sizes, budget: tuple[int | None, int | None], *, offload: bool) -> dict[str, int]:
    """Of a budget that is refused, the least that the message names, by option."""
    with pytest.raises(tt.ResourceError) as refusal:
        fitted(sizes, 8, offload=offload, budget=budget, free=(None, None))
    found = re.findall(r"(--max-\w+) is \d+MiB, and (\d+)MiB is the least", str(refusal.value))
    return {option: int(mib) * MIB for option, mib in found}


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("pair", PAIRS)
def test_every_budget_is_met_or_refused_with_one_that_is(pair, offload, tried):
    """Around the peak of every choice, and at powers of two from 1 MiB to 1 TiB."""
    sizes = sizes_of(PAIRS[pair])
    least_of(sizes, (MIB, None), offload=offload)
    peaks = {plan.peak for plan in tried}
    for budget in sorted({p + d for p in peaks for d in (-1, 0, 1)} | {MIB << k for k in range(21)}):
        if budget < min(peaks):
            least = least_of(sizes, (budget, None), offload=offload)["--max-ram"]
            assert min(peaks) <= least < min(peaks) + MIB  # rounded up to whole MiB
            budget = least
        plan = fitted(sizes, 8, offload=offload, budget=(budget, None), free=(None, None))
        assert plan.peak <= budget and plan.choice.resident is not offload


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("pair", [*PAIRS.values(), LARGE], ids=[*PAIRS, "large"])
def test_the_least_of_both_memories_does(pair, offload, tried):
    """Whatever host and device may take: what the message names, given exactly, is accepted."""
    sizes = sizes_of(pair, device="cuda")
    least_of(sizes, (MIB, MIB), offload=offload)
    hosts, devices = {plan.peak for plan in tried}, {plan.device_peak for plan in tried}
    for host in (MIB, min(hosts), max(hosts), None):
        for device in (MIB, min(devices), max(devices), None):
            budget = {"--max-ram": host, "--max-memory": device}
            try:
                plan = fitted(sizes, 8, offload=offload, budget=(host, device), free=(None, None))
            except tt.ResourceError:
                least = least_of(sizes, (host, device), offload=offload)
                budget |= least
                for option, peaks, free in (("--max-ram", hosts, device), ("--max-memory", devices, host)):
                    if free is None:  # where the other is not limited, no choice does with less
                        assert least[option] - min(peaks) in range(MIB)
                plan = fitted(sizes, 8, offload=offload, budget=tuple(budget.values()), free=(None, None))
            for peak, limit in zip((plan.peak, plan.device_peak), budget.values(), strict=True):
                assert limit is None or peak <= limit


@pytest.mark.parametrize("offload", [False, True])
def test_8b_fits_a_small_gpu(offload):
    """Llama-3.2-3B to Llama-3.1-8B within 8 GiB of device memory and 16 GiB of the host's, without a slower way."""
    plan = fitted(sizes_of(LARGE, device="cuda"), 8, offload=offload, budget=(16 << 30, 8 << 30), free=(None, None))
    assert plan.device_peak <= 8 << 30 and plan.peak <= 16 << 30
    assert plan.choice.polar == "device" and plan.choice.ahead


@pytest.mark.parametrize(("pair", "batch_size"), [(TINY, 2), (SMALL, 1)], ids=["tiny", "small"])
def test_budgets_change_no_byte_at_one_batch_size(pair, batch_size, tmp_path, monkeypatch, tried):
    """A run under every budget that another choice answers, beside one of the same batch size without a budget."""
    monkeypatch.setattr(terms, "TILE", MIB)  # else what tables may take hides what these models do
    root = written(tmp_path, pair, samples=9, length=16)
    options = {"tokens": 8 * 16, "batch_size": batch_size, "held_out": False}
    with pytest.raises(tt.ResourceError):
        Session(job_of(root, max_ram=MIB, **options))
    chosen = {}
    for peak in sorted({plan.peak for plan in tried}):
        with_budget = job_of(root, f"out-{peak}", max_ram=peak, **options)
        plan = Session(with_budget).plan
        chosen.setdefault(plan.choice, (plan, with_budget))
    assert len(chosen) >= 2
    once = {}
    for choice, (_, job) in chosen.items():
        Session(job).run()
        reference = once.setdefault(choice.batch_size, root / f"once-{choice.batch_size}")
        if not reference.exists():
            Session(job_of(root, reference.name, **{**options, "batch_size": choice.batch_size})).run()
        assert identical(job.out, reference), choice.words
