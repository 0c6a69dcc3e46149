"""The command under a memory budget, on random checkpoints of public geometries: peak memory, bytes read, time.

    python bench/bench_stream.py                        # Qwen2.5-0.5B to 1.5B, 4 and 8 blocks a side, 48 x 192 tokens
    python bench/bench_stream.py --blocks 4 --lora      # the move of an adapter

Each job is a process of its own, and its peak the kernel's (ru_maxrss). It must stay within 1.1 times what was
predicted, read every weight once (1.02 times at most), and not grow with the number of blocks.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import machine
import torch
from random_checkpoint import GEOMETRIES, write_adapter, write_random
from safetensors.torch import save_file

RESULTS = Path(__file__).parent / "results"
PAIR = "qwen2.5-0.5b", "qwen2.5-1.5b"
SAMPLES, LENGTH = 48, 192
BUDGET = "3GiB"
OVER, REREAD, FLAT = 1.1, 1.02, 1.05  # of predicted peak, of bytes of weights, of the peak with fewer blocks


def prepared(folder: Path, pair: tuple[str, str], blocks: int, *, lora: bool) -> list[Path]:
    """SOURCE, TUNED and TARGET, of so many blocks; those that are there already are taken as they are."""
    source, tuned, target = (folder / f"{name}-{blocks}" for name in (pair[0], f"{pair[0]}-tuned", pair[1]))
    geometries = [replace(GEOMETRIES[name], num_hidden_layers=blocks) for name in pair]
    if not source.exists():
        write_random(source, geometries[0])
    if not target.exists():
        write_random(target, geometries[1], seed=1)
    if lora:
        tuned = folder / f"{pair[0]}-lora-{blocks}"
    if not tuned.exists():
        write_adapter(tuned, geometries[0], 8) if lora else write_random(tuned, geometries[0], tune=0.01)
    return [source, tuned, target]


def text_like() -> torch.Tensor:
    """Token ids [samples, length] as frequent as words are: the n-th of them at 1 / n (Zipf's law)."""
    weights = 1 / torch.arange(1, 30_001)
    drawn = weights.multinomial(SAMPLES * LENGTH, replacement=True, generator=torch.Generator().manual_seed(0))
    return drawn.reshape(SAMPLES, LENGTH)


def measured(folders: list[Path], out: Path, calibration: Path, budget: str, batch: int) -> dict[str, Any]:
    """One run of the command: its outcome, wall time, and peak memory in bytes."""
    options = ["--calibration", calibration, "--max-ram", budget, "--batch-size", batch, "--no-held-out", "--json"]
    tokens = SAMPLES * LENGTH
    command = "from theseus_transport.cli import main; main()"
    call = [sys.executable, "-c", command, "transport", *folders, out, *options, "--tokens", tokens]
    before, began = os.times(), time.perf_counter()
    reader = subprocess.Popen([str(part) for part in call], stdout=subprocess.PIPE, text=True)
    text, _ = reader.communicate()
    seconds, peak = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    if reader.returncode:
        raise SystemExit(f"the command ended with {reader.returncode}: {text}")
    used = os.times()
    cpu = used.children_user + used.children_system - before.children_user - before.children_system
    return {"outcome": json.loads(text), "seconds": seconds, "peak": peak, "cores": cpu / seconds}


def row_of(blocks: int, found: dict[str, Any], folders: list[Path]) -> dict[str, Any]:
    outcome = found["outcome"]
    weights = sum(path.stat().st_size for folder in folders for path in folder.glob("*.safetensors"))
    stages = outcome["seconds"]
    waiting = stages.pop("of these waiting for reads", 0.0)
    return {
        "blocks": blocks,
        "peak_gib": found["peak"] / 2**30,
        "predicted_gib": outcome["predicted_bytes"] / 2**30,
        "peak_over_predicted": found["peak"] / outcome["predicted_bytes"],
        "read_over_weights": outcome["bytes_read"] / weights,
        "seconds": found["seconds"],
        "tokens_per_second": outcome["tokens"] / found["seconds"],
        "share_waiting": waiting / found["seconds"],
        "cores": found["cores"],
        "plan": outcome["plan"],
        "stages": stages,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--lora", action="store_true", help="move an adapter of rank 8")
    parser.add_argument("--pair", nargs=2, default=PAIR, choices=GEOMETRIES, metavar=("SOURCE", "TARGET"))
    parser.add_argument("--max-ram", default=BUDGET)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--folder", type=Path, help="keep checkpoints here, for the next time")
    given = parser.parse_args()
    kind = "lora" if given.lora else "full"
    about = {"pair": list(given.pair), "kind": kind, "tokens": SAMPLES * LENGTH, "max_ram": given.max_ram}
    RESULTS.mkdir(exist_ok=True)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        folder = given.folder or Path(place)
        calibration = Path(place) / "ids.safetensors"
        save_file({"input_ids": text_like()}, calibration)
        for blocks in given.blocks:  # the peak of all children is that of the largest: fewest blocks first
            folders = prepared(folder, tuple(given.pair), blocks, lora=given.lora)
            found = measured(folders, Path(place) / f"out-{blocks}", calibration, given.max_ram, given.batch_size)
            rows.append(row_of(blocks, found, folders))
            print(json.dumps(rows[-1], indent=1), flush=True)
            told = {"machine": machine.facts(), **about, "results": rows}
            name = f"stream-{given.pair[0]}-to-{given.pair[1]}-{kind}-cpu.json"
            (RESULTS / name).write_text(json.dumps(told, indent=4) + "\n")
    for row in rows:
        assert row["peak_over_predicted"] <= OVER, row
        assert row["read_over_weights"] <= REREAD, row
        assert row["peak_gib"] <= FLAT * rows[0]["peak_gib"], row


if __name__ == "__main__":
    main()
