"""Memory of the command over depth, as the kernel counts it, and what it reads."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.command import invoke
from helpers.forked import apart
from helpers.large_pairs import written
from random_checkpoint import ModelSizes, write_adapter
from theseus_transport.alignment.prior import BLOCKS

PAIR = ModelSizes("llama", 128, 384, 4, 4, 2, 300), ModelSizes("llama", 192, 512, 4, 6, 3, 300)
SAMPLES, LENGTH = 5, 128  # more tokens than the widest space has features
MIB = 1 << 20
FLAT = 1.05  # of the peak with fewer blocks
OBJECTS = MIB // 2  # and so much a pair of blocks, for modules without weights and plans: 0.2 MiB were seen
OVER, REREAD = 1.1, 1.02  # of what was predicted; of the bytes of weights


def kib(name: str, process: object = "self") -> int:
    return int(re.search(rf"{name}:\s*(\d+) kB", Path(f"/proc/{process}/status").read_text())[1])


def with_peak(*call: object) -> tuple[str, int]:
    """What the command prints, and the peak in bytes of the process it is called in, as if that had imported it."""
    mapped = kib("RssFile", os.getppid()) - kib("RssFile")  # a fork has the pages of libraries only once it reads them
    told = invoke(*call).stdout
    return told, (kib("VmHWM") + mapped) * 1024


def measured(root: Path, tuned: str) -> tuple[dict, int]:
    """One run of the command in a process of its own: its outcome, and its peak in bytes."""
    folders = [root / name for name in ("source", tuned, "target", f"out-{tuned}")]
    call = ["transport", *folders, "--calibration", root / "ids.safetensors", "--tokens", SAMPLES * LENGTH]
    told, peak = apart(with_peak, *call, "--json", "--no-held-out")
    return json.loads(told), peak


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Of 4 and of 20 blocks: the outcome, the peak, and the bytes of all weights."""
    found = {}
    for depth in (4, 20):
        root = tmp_path_factory.mktemp(f"blocks-{depth}")
        pair = tuple(replace(geometry, num_hidden_layers=depth) for geometry in PAIR)
        written(root, pair, samples=SAMPLES, length=LENGTH, dtype=torch.bfloat16)
        write_adapter(root / "lora", pair[0], 8, only=("q_proj", "v_proj"))
        shards = [path for side in ("source", "tuned", "target") for path in (root / side).glob("*.safetensors")]
        weights = sum(path.stat().st_size for path in shards)
        found[depth] = *measured(root, "tuned"), weights, *measured(root, "lora")
    return found


def test_the_peak_does_not_grow_with_depth(runs):
    """For a full tune and for an adapter."""
    for few, many in zip(*((runs[depth][1], runs[depth][4]) for depth in (4, 20)), strict=True):
        assert many <= FLAT * few + 16 * OBJECTS, f"{few / MIB:.0f} MiB of 4 blocks, {many / MIB:.0f} MiB of 20"


@pytest.mark.parametrize("depth", [4, 20])
def test_the_peak_is_what_was_predicted_at_most(runs, depth):
    for outcome, peak in (runs[depth][:2], runs[depth][3:]):
        assert peak <= OVER * outcome["predicted_bytes"], f"{peak / MIB:.0f} MiB"


def test_every_weight_is_read_once(runs):
    """Beside many blocks tables are little, and what is read before to see that TUNED is a tune of SOURCE.

    The first blocks of both bases are read once more, to choose the prior.
    """
    outcome, _, weights, *_ = runs[20]
    assert outcome["bytes_read"] <= (REREAD + BLOCKS / 20) * weights
