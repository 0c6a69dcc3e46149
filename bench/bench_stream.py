"""The command under a memory budget, on random checkpoints of public geometries: peak memory, bytes read, time.

    python bench/bench_stream.py                        # Qwen2.5-0.5B to 1.5B, 4 and 8 blocks a side, 48 x 192 tokens
    python bench/bench_stream.py --blocks 4 --lora      # the move of an adapter
    python bench/bench_stream.py --blocks 2 --whole     # without a budget, beside whole models from Python

Each job is a process of its own, and its peak the kernel's (ru_maxrss). It must stay within 1.1 times what was
predicted, read every weight once (1.02 times at most), not grow with the number of blocks, and where whole models fit
take at most 1.15 times as long as they do.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import machine
import theseus_transport as tt
import torch
from random_checkpoint import GEOMETRIES, write_adapter, write_random
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

RESULTS = Path(__file__).parent / "results"
PAIR = "qwen2.5-0.5b", "qwen2.5-1.5b"
SAMPLES, LENGTH = 48, 192
BUDGET = "3GiB"
OVER, REREAD, FLAT = 1.1, 1.02, 1.05  # of predicted peak, of bytes of weights, of the peak with fewer blocks
SLOWER = 1.15  # of the time whole models take
COMMAND = "from theseus_transport.cli.main import main; main()"
WHOLE = "import bench_stream, sys; bench_stream.whole(*sys.argv[1:])"


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


def whole(source: str, tuned: str, target: str, out: str, calibration: str, batch: str) -> None:
    """The same move from Python, with three whole models in memory."""
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (source, tuned, target)]
    batches = [{"input_ids": ids} for ids in load_file(calibration)["input_ids"].split(int(batch))]
    alignment = tt.align(models[0], models[2], batches)
    tt.transport(alignment, tt.Delta.between(models[0], models[1]), models[2]).add_to(models[2])
    models[2].to(torch.bfloat16).save_pretrained(out)


def measured(code: str, *arguments: object) -> dict[str, Any]:
    """One run of code in a process of its own: what it printed, wall time, and peak memory in bytes."""
    before, began = os.times(), time.perf_counter()
    call = [sys.executable, "-c", code, *map(str, arguments)]
    process = subprocess.Popen(call, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent)
    assert process.stdout is not None
    text = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds, used = time.perf_counter() - began, os.times()
    if process.returncode:
        raise SystemExit(f"it ended with {process.returncode}: {text}")
    cpu = used.children_user + used.children_system - before.children_user - before.children_system
    return {"text": text, "seconds": seconds, "peak": usage.ru_maxrss * 1024, "cores": cpu / seconds}


def row_of(blocks: int, found: dict[str, Any], folders: list[Path]) -> dict[str, Any]:
    outcome = json.loads(found["text"])
    weights = sum(path.stat().st_size for folder in folders for path in folder.glob("*.safetensors"))
    stages = outcome["seconds"]
    waiting = stages.pop("of these waiting for reads", 0.0)
    return {
        "blocks": blocks,
        "peak_gib": found["peak"] / 2**30,
        "predicted_gib": outcome["predicted_bytes"] / 2**30,
        "peak_over_predicted": found["peak"] / outcome["predicted_bytes"],
        "device_peak_gib": (outcome["used_device_bytes"] or 0) / 2**30,
        "predicted_device_gib": outcome["predicted_device_bytes"] / 2**30,
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
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--max-ram", help=f"default: {BUDGET}; with --whole what is there")
    parser.add_argument("--whole", action="store_true", help="beside the same with whole models, from Python")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--folder", type=Path, help="keep checkpoints here, for the next time")
    given = parser.parse_args()
    kind = "lora" if given.lora else "whole" if given.whole else "full"
    budget = given.max_ram or (None if given.whole else BUDGET)
    about = {"pair": list(given.pair), "kind": kind, "tokens": SAMPLES * LENGTH, "max_ram": budget}
    options = ["--batch-size", given.batch_size, "--tokens", SAMPLES * LENGTH, "--no-held-out", "--json"]
    options += ["--device", given.device]
    options += ["--max-ram", budget] if budget else []
    RESULTS.mkdir(exist_ok=True)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        folder = given.folder or Path(place)
        calibration = Path(place) / "ids.safetensors"
        save_file({"input_ids": text_like()}, calibration)
        for blocks in given.blocks:
            folders, out = prepared(folder, tuple(given.pair), blocks, lora=given.lora), Path(place) / f"out-{blocks}"
            found = measured(COMMAND, "transport", *folders, out, "--calibration", calibration, *options)
            rows.append(row_of(blocks, found, folders))
            if given.whole:
                other = measured(WHOLE, *folders, f"{out}-whole", calibration, given.batch_size)
                rows[-1] |= {f"whole_{name}": other[name] for name in ("seconds", "cores")}
                work = [run["seconds"] * run["cores"] for run in (found, other)]  # says more where others work too
                rows[-1] |= {"slower": found["seconds"] / other["seconds"], "more_cpu_time": work[0] / work[1]}
                rows[-1]["whole_peak_gib"] = other["peak"] / 2**30
            print(json.dumps(rows[-1], indent=1), flush=True)
            told = {"machine": machine.facts(), **about, "results": rows}
            place = "cpu" if given.device == "cpu" else "gpu"
            name = f"stream-{given.pair[0]}-to-{given.pair[1]}-{kind}-{place}.json"
            (RESULTS / name).write_text(json.dumps(told, indent=4) + "\n")
    for row in rows:
        assert row["peak_over_predicted"] <= OVER, row
        assert row["read_over_weights"] <= REREAD, row
        assert row["peak_gib"] <= FLAT * rows[0]["peak_gib"], row
        assert row.get("slower", 0) <= SLOWER, row


if __name__ == "__main__":
    main()
