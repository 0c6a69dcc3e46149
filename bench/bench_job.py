"""Ours end to end beside the official recipe, each in its own process: wall time and peak memory of alignment and move.

    python bench/bench_job.py               # ViT-B/16 to ViT-B/16+ at 240 pixels: about 20 minutes on two cores
    python bench/bench_job.py --geometry small          # or two-blocks: the same widths, two of the twelve blocks
    python bench/bench_job.py --batch 8                 # as many images a forward pass for every way

Random weights, 32 random images, a random update of every tensor. The peak is the kernel's own (ru_maxrss).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import machine
import official_recipe
import pytest
import theseus_transport as tt
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import ViTConfig, ViTModel

IMAGES, PATCH = 32, 16
GEOMETRY = {  # (width, heads, MLP width, pixels) of source and target, and the number of blocks
    "small": ((96, 4, 384, 64), (128, 4, 512, 80), 2),
    "two-blocks": ((768, 12, 3072, 224), (896, 14, 3584, 240), 2),
    "full": ((768, 12, 3072, 224), (896, 14, 3584, 240), 12),
}
WAYS = "official", "coherent", "paper"
BATCH = {"official": 32, "coherent": 8, "paper": 8}  # images a forward pass: theirs is one batch, ours the command's
COMPARED = "mlp.fc2"  # the data determines its input and output fully: ours and theirs must agree there
ROUNDING = 2**-23  # of our float32 products; a polar factor amplifies it by 1 / gap


def vit(width: int, heads: int, middle: int, pixels: int, blocks: int) -> ViTModel:
    sizes = dict(hidden_size=width, num_attention_heads=heads, intermediate_size=middle, num_hidden_layers=blocks)
    return ViTModel(ViTConfig(**sizes, image_size=pixels, patch_size=PATCH), add_pooling_layer=False).eval()


def inputs(geometry: str, batch: int) -> tuple[ViTModel, ViTModel, ViTModel, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Source, tuned source, target, and pairs of batches of the same images at both sizes."""
    torch.manual_seed(0)
    source_size, target_size, blocks = GEOMETRY[geometry]
    source, target, tuned = (vit(*size, blocks) for size in (source_size, target_size, source_size))
    images = torch.randn(IMAGES, 3, source_size[3], source_size[3])
    larger = F.interpolate(images, (target_size[3],) * 2, mode="bilinear")
    with torch.no_grad():
        for own, base in zip(tuned.parameters(), source.parameters(), strict=True):
            own.copy_(base + 1e-3 * torch.randn_like(base))
    return source, tuned, target, list(zip(images.split(batch), larger.split(batch), strict=True))


def work(way: str, geometry: str, batch: int, out: Path) -> dict:
    """One way from models to the moved update; writes the compared tensors, returns seconds by phase."""
    source, tuned, target, batches = inputs(geometry, batch)
    times = [time.perf_counter()]
    if way == "official":
        products = official_recipe.capture(source, target, batches)
        times.append(time.perf_counter())
        maps = official_recipe.decompose(products)
        times.append(time.perf_counter())
        base = dict(source.named_parameters())
        delta = {name: (value - base[name]).detach() for name, value in tuned.named_parameters()}
        moved = official_recipe.apply(maps, delta)
        phases, gap = ("capture", "decompositions", "apply"), None
    else:
        pairs = [({"pixel_values": x}, {"pixel_values": y}) for x, y in batches]
        alignment = tt.align(source, target, pairs, recipe=way)
        times.append(time.perf_counter())
        update = tt.transport(alignment, tt.Delta.between(source, tuned), target)
        moved = {}
        for name, value in update.items():  # computed one by one; a writer would not keep them either
            assert bool(value.isfinite().all()), name
            moved[name] = value if name.endswith(f"{COMPARED}.weight") else value[:0]
        phases, gap = (
            ("align", "transport"),
            min(r.gap for r in alignment.reports if r.space.endswith((".middle", COMPARED))),
        )
        assert all(r.rank > 0 for r in alignment.reports)
    times.append(time.perf_counter())
    assert moved and all(bool(value.isfinite().all()) for value in moved.values())
    save_file({n: v.contiguous() for n, v in moved.items() if n.endswith(f"{COMPARED}.weight")}, out)
    seconds = {name: b - a for name, (a, b) in zip(phases, pairwise(times), strict=True)}
    return dict(seconds=seconds, total=times[-1] - times[0], tensors=len(moved), smallest_gap=gap)


def measure(way: str, geometry: str, batch: int, out: Path) -> dict:
    """Run one way in a child process: what it reports, with the kernel's peak of its memory in GiB."""
    command = [sys.executable, __file__, "--geometry", geometry, "--way", way, "--batch", str(batch), "--out", str(out)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    text = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    assert child.returncode == 0, f"{way} ended with {child.returncode}"
    record = json.loads(text.splitlines()[-1])
    return record | dict(peak_gib=usage.ru_maxrss / 2**20, cpu_seconds=usage.ru_utime + usage.ru_stime)


def compare(geometry: str, batch: int | None) -> dict:
    """All ways one after the other, and how they relate: how far `paper` is from what the official recipe moves."""
    batches = {way: batch or BATCH[way] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        found = {way: measure(way, geometry, batches[way], Path(folder) / way) for way in WAYS}
        ours, theirs = (load_file(Path(folder) / way) for way in ("paper", "official"))
    assert ours.keys() == theirs.keys() and ours
    difference = max(float((ours[n] - theirs[n]).norm() / theirs[n].norm()) for n in ours)
    ratios = {
        way: dict(
            faster=found["official"]["total"] / found[way]["total"],
            share_of_peak=found[way]["peak_gib"] / found["official"]["peak_gib"],
        )
        for way in WAYS
        if way != "official"
    }
    return dict(
        machine=machine.facts(),
        geometry=GEOMETRY[geometry],
        images_per_batch=batches,
        results=found,
        ratios=ratios,
        paper_differs_from_official=difference,
    )


def report(record: dict) -> str:
    lines = [f"{'':<10} {'seconds':>8} {'peak GiB':>9} {'faster':>7} {'of peak':>8}"]
    for way, row in record["results"].items():
        ratio = record["ratios"].get(way, dict(faster=1.0, share_of_peak=1.0))
        phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in row["seconds"].items())
        lines.append(
            f"{way:<10} {row['total']:>8.1f} {row['peak_gib']:>9.2f} {ratio['faster']:>6.2f}x "
            f"{ratio['share_of_peak']:>8.0%}   {phases}"
        )
    return "\n".join(lines)


@pytest.mark.parametrize("geometry", GEOMETRY)
def test_job(geometry: str, request: pytest.FixtureRequest) -> None:
    if geometry != "small" and not request.config.getoption("--full"):
        pytest.skip("minutes (full: about 20 on two cores): make bench FULL=1")
    run(geometry)


def run(geometry: str, batch: int | None = None) -> None:
    record = compare(geometry, batch)
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    name = f"job-{geometry}{f'-batch{batch}' if batch else ''}-cpu.json"
    (folder / name).write_text(json.dumps(record, indent=4) + "\n")
    print(f"\nViT {GEOMETRY[geometry]}, {IMAGES} images\n{report(record)}")
    gap = record["results"]["paper"]["smallest_gap"]
    assert record["paper_differs_from_official"] <= ROUNDING / gap, record["paper_differs_from_official"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--geometry", choices=GEOMETRY, default="full")
    parser.add_argument("--way", choices=WAYS, help="run one way in this process (what the comparison starts)")
    parser.add_argument("--batch", type=int, help="images a forward pass, for every way")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(work(options.way, options.geometry, options.batch or BATCH[options.way], options.out)))
    else:
        run(options.geometry, options.batch)
