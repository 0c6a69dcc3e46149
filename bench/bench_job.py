"""Ours end to end beside the official recipe, each in its own process: wall time and peak memory of alignment and move.

    python bench/bench_job.py               # ViT-B/16 to ViT-B/16+ at 240 pixels: about 20 minutes on two cores
    python bench/bench_job.py --geometry small          # or two-blocks: the same widths, two of the twelve blocks
    python bench/bench_job.py --batch 8                 # as many images a forward pass for every way
    python bench/bench_job.py --device cuda --geometry l14 --batches 20        # on a GPU; not run yet

Random weights, 32 random images a batch, a random update of every tensor. The peak is the kernel's own (ru_maxrss). On
a GPU every way first runs the small geometry once in its process, untimed: libraries load and kernels are chosen there.
The official recipe keeps products and the update on the CPU, as described; ``official-svd-cuda`` decomposes on the GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import machine
import official_recipe
import pytest
import theseus_transport as tt
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from timing import DEVICE
from transformers import ViTConfig, ViTModel

IMAGES = 32  # of a batch
B16, B16_PLUS, L14 = (768, 12, 3072, 224, 16), (896, 14, 3584, 240, 16), (1024, 16, 4096, 224, 14)
GEOMETRY = {  # (width, heads, MLP width, pixels, patch) of source and target, and the number of blocks
    "small": ((96, 4, 384, 64, 16), (128, 4, 512, 80, 16), 2),
    "two-blocks": (B16, B16_PLUS, 2),
    "full": (B16, B16_PLUS, 12),
    "l14-two-blocks": (B16, L14, 2),
    "l14": (B16, L14, 12),
}
RECIPES = {
    "coherent": tt.Recipe("coherent"),
    "paper": tt.Recipe("paper"),
    "effect": tt.Recipe("effect", prior="coherent"),
    "effect-alone": tt.Recipe("effect", prior="none"),
}
OURS = tuple(RECIPES)
WAYS = "official", "official-svd-cuda", *OURS
BATCH = {"official": 32, **dict.fromkeys(OURS, 8)}  # images a forward pass: theirs is one batch, ours the command's
ON_CPU = [(geometry, 1, ("official", *OURS)) for geometry in ("small", "two-blocks", "full")]
ON_CUDA = [("l14-two-blocks", 1, WAYS), ("l14", 1, OURS), ("l14", 20, OURS)]  # theirs takes minutes: with --full
COMPARED = "mlp.fc2"  # the data determines its input and output fully: ours and theirs must agree there
ROUNDING = 2**-23  # of our float32 products; a polar factor amplifies it by 1 / gap


def vit(width: int, heads: int, middle: int, pixels: int, patch: int, blocks: int) -> ViTModel:
    sizes = dict(hidden_size=width, num_attention_heads=heads, intermediate_size=middle, num_hidden_layers=blocks)
    return ViTModel(ViTConfig(**sizes, image_size=pixels, patch_size=patch), add_pooling_layer=False).eval()


Inputs = tuple[ViTModel, ViTModel, ViTModel, list[tuple[torch.Tensor, torch.Tensor]]]


def inputs(geometry: str, batch: int, batches: int, device: str) -> Inputs:
    """Source, tuned source, target, and pairs of batches of the same images at both sizes."""
    torch.manual_seed(0)
    source_size, target_size, blocks = GEOMETRY[geometry]
    source, target, tuned = (vit(*size, blocks).to(device) for size in (source_size, target_size, source_size))
    images = torch.randn(batches * IMAGES, 3, source_size[3], source_size[3]).to(device)
    larger = F.interpolate(images, (target_size[3],) * 2, mode="bilinear")
    with torch.no_grad():
        for own, base in zip(tuned.parameters(), source.parameters(), strict=True):
            own.copy_(base + 1e-3 * torch.randn_like(base))
    return source, tuned, target, list(zip(images.split(batch), larger.split(batch), strict=True))


def work(way: str, geometry: str, batch: int, batches: int, device: str, out: Path) -> dict:
    """One way from models to the moved update; writes the compared tensors, returns seconds by phase."""
    torch.backends.cudnn.allow_tf32 = False  # patches: all ways see the same activations to float32
    if device == "cpu":
        return timed(way, inputs(geometry, batch, batches, device), out)
    timed(way, inputs("small", batch, 1, device), out)
    given = inputs(geometry, batch, batches, device)
    torch.cuda.reset_peak_memory_stats()
    return timed(way, given, out) | dict(device_peak_gib=torch.cuda.max_memory_allocated() / 2**30)


def now() -> float:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(way: str, given: Inputs, out: Path) -> dict:
    source, tuned, target, batches = given
    times = [now()]
    if way.startswith("official"):
        products = official_recipe.capture(source, target, batches)
        times.append(now())
        maps = official_recipe.decompose(products, "cuda" if way.endswith("cuda") else "cpu")
        times.append(now())
        base = dict(source.named_parameters())
        delta = {name: (value - base[name]).detach() for name, value in tuned.named_parameters()}
        moved = official_recipe.apply(maps, delta)
        phases, gap = ("capture", "decompositions", "apply"), None
    else:
        pairs = [({"pixel_values": x}, {"pixel_values": y}) for x, y in batches]
        alignment = tt.align(source, target, pairs, recipe=RECIPES[way])
        times.append(now())
        update = tt.transport(alignment, tt.Delta.between(source, tuned), target)
        moved = {}
        for name, value in update.items():  # computed one by one; a writer would not keep them either
            assert bool(value.isfinite().all()), name
            moved[name] = value if name.endswith(f"{COMPARED}.weight") else value[:0]
        phases, gap = (
            ("align", "transport"),
            min((r.gap for r in alignment.reports if r.space.endswith((".middle", COMPARED))), default=None),
        )
        assert all(r.rank > 0 for r in alignment.reports)
    times.append(now())
    assert moved and all(bool(value.isfinite().all()) for value in moved.values())
    save_file({n: v.contiguous() for n, v in moved.items() if n.endswith(f"{COMPARED}.weight")}, out)
    seconds = {name: b - a for name, (a, b) in zip(phases, pairwise(times), strict=True)}
    return dict(seconds=seconds, total=times[-1] - times[0], tensors=len(moved), smallest_gap=gap)


def measure(way: str, out: Path, **options: str | int) -> dict:
    """Run one way in a child process: what it reports, with the kernel's peak of its memory in GiB."""
    given = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, __file__, "--way", way, "--out", str(out), *given]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    text = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    assert child.returncode == 0, f"{way} ended with {child.returncode}"
    record = json.loads(text.splitlines()[-1])
    return record | dict(peak_gib=usage.ru_maxrss / 2**20, cpu_seconds=usage.ru_utime + usage.ru_stime)


def compare(geometry: str, batch: int | None, batches: int, device: str, ways: Sequence[str]) -> dict:
    """All ways one after the other, and how they relate: how far `paper` is from what the official recipe moves."""
    sizes = {way: batch or (IMAGES if device == "cuda" else BATCH[way]) for way in ways}
    options = dict(geometry=geometry, batches=batches, device=device)
    difference = None
    with tempfile.TemporaryDirectory() as folder:
        found = {way: measure(way, Path(folder) / way, batch=sizes[way], **options) for way in ways}
        if {"paper", "official"} <= {*ways}:
            ours, theirs = (load_file(Path(folder) / way) for way in ("paper", "official"))
            assert ours.keys() == theirs.keys() and ours
            difference = max(float((ours[n].cpu() - theirs[n]).norm() / theirs[n].norm()) for n in ours)
    ratios = {
        way: dict(
            faster=found["official"]["total"] / found[way]["total"],
            share_of_peak=found[way]["peak_gib"] / found["official"]["peak_gib"],
        )
        for way in ways
        if way != "official" and "official" in ways
    }
    images = f"{batches} {'batch' if batches == 1 else 'batches'} of {IMAGES}"
    rows = [
        {"case": f"{way}, {geometry}, {images}{f', beside {by}' if by else ''}", "ours ms": 1e3 * found[way]["total"]}
        | ({"torch ms": 1e3 * found[by]["total"], "over torch": found[by]["total"] / found[way]["total"]} if by else {})
        for way in ways
        if way in OURS
        for by in [w for w in ways if w.startswith("official")] or [None]
    ]
    return dict(
        machine=machine.facts(),
        geometry=GEOMETRY[geometry],
        device=device,
        batches=batches,
        images_per_batch=sizes,
        results=found,
        ratios=ratios,
        rows=rows,
        paper_differs_from_official=difference,
    )


def report(record: dict) -> str:
    lines = [f"{'':<17} {'seconds':>8} {'peak GiB':>9} {'faster':>7} {'of peak':>8}"]
    for way, row in record["results"].items():
        ratio = record["ratios"].get(way)
        beside = f"{ratio['faster']:>6.2f}x {ratio['share_of_peak']:>8.0%}" if ratio else f"{'-':>7} {'-':>8}"
        phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in row["seconds"].items())
        lines.append(f"{way:<17} {row['total']:>8.1f} {row['peak_gib']:>9.2f} {beside}   {phases}")
    return "\n".join(lines)


@pytest.mark.parametrize("geometry, batches, ways", ON_CUDA if DEVICE == "cuda" else ON_CPU, ids=str)
def test_job(geometry: str, batches: int, ways: tuple[str, ...], request: pytest.FixtureRequest) -> None:
    full = request.config.getoption("--full")
    if DEVICE == "cpu" and geometry != "small" and not full:
        pytest.skip("minutes (full: about 20 on two cores): make bench FULL=1")
    run(geometry, batches=batches, device=DEVICE, ways=WAYS if DEVICE == "cuda" and full else ways)


def run(geometry: str, batch: int | None = None, *, batches: int, device: str, ways: Sequence[str]) -> None:
    record = compare(geometry, batch, batches, device, ways)
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    name = f"job-{geometry}{f'-batch{batch}' if batch else ''}{f'-{batches}batches' if batches > 1 else ''}"
    (folder / f"{name}-{device}.json").write_text(json.dumps(record, indent=4) + "\n")
    print(f"\nViT {GEOMETRY[geometry]}, {batches} x {IMAGES} images, {device}\n{report(record)}")
    if record["paper_differs_from_official"] is None:
        return
    gap = record["results"]["paper"]["smallest_gap"]
    assert record["paper_differs_from_official"] <= ROUNDING / gap, record["paper_differs_from_official"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--geometry", choices=GEOMETRY, default="full")
    parser.add_argument("--way", choices=WAYS, help="run one way in this process (what the comparison starts)")
    parser.add_argument("--batch", type=int, help="images a forward pass, for every way")
    parser.add_argument("--batches", type=int, default=1, help=f"of {IMAGES} images")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--ways", nargs="+", choices=WAYS, help="what to compare; all by default")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.way:
        batch = options.batch or BATCH.get(options.way, IMAGES)
        given = options.way, options.geometry, batch, options.batches, options.device, options.out
        print(json.dumps(work(*given)))
    else:
        chosen = options.ways or [way for way in WAYS if options.device == "cuda" or not way.endswith("cuda")]
        run(options.geometry, options.batch, batches=options.batches, device=options.device, ways=chosen)
