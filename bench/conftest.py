"""What a bench stores and prints: one line per case, ours beside the baseline and beside the ceiling."""

import datetime
import os
import platform
import re
import subprocess
from collections import defaultdict
from pathlib import Path

import torch

import theseus_ext


def pytest_benchmark_update_machine_info(config, machine_info: dict) -> None:
    """The machine as far as a reader of the numbers needs it; no host name."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], capture_output=True, text=True).stdout.strip()

    info = Path("/proc/cpuinfo")
    models = re.findall("model name\\s*: (.*)", info.read_text()) if info.exists() else []
    machine_info.clear()
    machine_info |= dict(
        cpu=models[0] if models else platform.processor(),
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        threads=torch.get_num_threads(),
        load_average=os.getloadavg()[0],  # above `threads`, other work shared the machine and the numbers are noisy
        torch=torch.__version__,
        commit=git("rev-parse", "--short", "HEAD") or "none",
        dirty=bool(git("status", "--porcelain", "--untracked-files=no")),
        date=datetime.date.today().isoformat(),
        build=theseus_ext.build_info(),
    )


def rows_of(benchmarks: list[dict]) -> list[dict]:
    """One row per case from one measurement per case and way; fastest of the rounds."""
    cases: dict[str, dict[str, dict]] = defaultdict(dict)
    for each in benchmarks:
        cases[each["group"]][each["extra_info"]["how"]] = each
    rows = []
    for case, by in cases.items():
        if {"ours", "baseline", "product"} <= by.keys():
            ours, plain, product = (by[how]["stats"]["min"] for how in ("ours", "baseline", "product"))
            gflop = by["ours"]["extra_info"]["gflop"]
            rows.append(
                dict(
                    case=case,
                    ours_ms=ours * 1e3,
                    baseline_ms=plain * 1e3,
                    ratio=plain / ours,
                    gflop_per_s=gflop / ours,
                    share_of_product=product / ours,
                )
            )
    return rows


def pytest_benchmark_update_json(config, benchmarks, output_json: dict) -> None:
    rows = rows_of(output_json["benchmarks"])
    machine = output_json["machine_info"]
    output_json.clear()
    output_json |= dict(machine=machine, results=rows)


def pytest_terminal_summary(terminalreporter, config) -> None:
    session = getattr(config, "_benchmarksession", None)
    rows = rows_of([b.as_dict(include_data=False) for b in session.benchmarks]) if session else []
    if rows:
        terminalreporter.write_line(f"\n{'case':<52} {'ours':>9} {'torch':>9} {'ratio':>6} {'GFLOP/s':>8} {'of mm':>6}")
    for row in rows:
        terminalreporter.write_line(
            f"{row['case']:<52} {row['ours_ms']:>6.1f} ms {row['baseline_ms']:>6.1f} ms {row['ratio']:>6.2f} "
            f"{row['gflop_per_s']:>8.1f} {row['share_of_product']:>6.0%}"
        )
