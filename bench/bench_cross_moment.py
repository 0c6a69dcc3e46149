"""cross_moment_ beside plain torch and beside torch's own product alone; checks the results, prints and stores them.

    python bench/bench_cross_moment.py [--device cuda] [--threads 2] [--out bench/results]
"""

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import time
from pathlib import Path

import baseline
import torch

import theseus_ext

ROWS = 6304  # 32 images of 197 tokens
WIDTHS = ((768, 896), (1024, 1024), (3072, 3584))
NAMES = ("cross", "source_sum", "target_sum", "source_energy", "target_energy")


def masters(d_source: int, d_target: int, device: str) -> dict[str, torch.Tensor]:
    shapes = ((d_source, d_target), (d_source,), (d_target,), (d_source,), (d_target,))
    return {name: torch.zeros(s, dtype=torch.float64, device=device) for name, s in zip(NAMES, shapes, strict=True)}


def interpolation(rows: int, tokens: int, device: str) -> tuple[torch.Tensor, ...]:
    """Linear interpolation of `tokens` onto `rows`: two entries per row."""
    position = torch.linspace(0, tokens - 1, rows, dtype=torch.float64)
    left = position.floor().clamp_max(tokens - 2).long()
    column, weight = torch.stack([left, left + 1], 1), torch.stack([1 - (position - left), position - left], 1)
    parts = torch.arange(rows + 1) * 2, column.flatten(), weight.flatten()
    return tuple(part.to(device) for part in parts)


def cases(d_source: int, d_target: int, device: str):
    """name, source, target, mixings, and the two float32 operands the product alone would take."""
    source, target = torch.randn(ROWS, d_source, device=device), torch.randn(ROWS, d_target, device=device)
    kept = (torch.rand(ROWS, device=device) < 0.8).nonzero()[:, 0]
    yield "float32", source, target, {}, source, target
    yield "bfloat16", source.bfloat16(), target.bfloat16(), {}, source, target
    mask = dict(source_mixing=(None, kept, None), target_mixing=(None, kept, None))
    yield "bfloat16, 80 % mask", source.bfloat16(), target.bfloat16(), mask, source[kept], target[kept]
    linear = dict(source_mixing=interpolation(ROWS, ROWS // 2, device))
    yield "bfloat16, interpolated", source[: ROWS // 2].bfloat16(), target.bfloat16(), linear, source, target


def seconds(functions: dict, device: str, repeats: int) -> dict[str, float]:
    """Fastest of `repeats` interleaved runs after one warm-up, so that a busy machine disturbs all alike."""
    best = dict.fromkeys(functions, float("inf"))
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if device == "cuda":
                torch.cuda.synchronize()
            if repeat:
                best[name] = min(best[name], time.perf_counter() - start)
    return best


def check(source, target, mixings, device: str) -> None:
    ours, torchs, exact = (masters(source.shape[1], target.shape[1], device) for _ in range(3))
    theseus_ext.cross_moment_(source, target, **ours, **mixings)
    baseline.cross_moment_(source, target, **torchs, **mixings)
    theseus_ext.reference.cross_moment_(source, target, **exact, **mixings)
    for name in NAMES:
        allowed = 2 * (torchs[name] - exact[name]).norm() + 1e-14 * exact[name].norm()
        assert (ours[name] - exact[name]).norm() <= allowed, name


def measure(device: str, repeats: int):
    for d_source, d_target in WIDTHS:
        for name, source, target, mixings, x, y in cases(d_source, d_target, device):
            check(source, target, mixings, device)
            out, product = masters(d_source, d_target, device), torch.empty(d_source, d_target, device=device)
            best = seconds(
                dict(
                    ours=lambda s=source, t=target, o=out, m=mixings: theseus_ext.cross_moment_(s, t, **o, **m),
                    baseline=lambda s=source, t=target, o=out, m=mixings: baseline.cross_moment_(s, t, **o, **m),
                    product=lambda x=x, y=y, p=product: torch.mm(x.T, y, out=p),
                ),
                device,
                repeats,
            )
            gflop = 2e-9 * len(x) * d_source * d_target
            yield dict(
                shape=[len(x), d_source, d_target],
                case=name,
                ours_ms=best["ours"] * 1e3,
                baseline_ms=best["baseline"] * 1e3,
                speedup=best["baseline"] / best["ours"],
                gflop_per_s=gflop / best["ours"],
                share_of_sgemm=best["product"] / best["ours"],
            )


def where(device: str) -> dict:
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], capture_output=True, text=True).stdout.strip()

    info = Path("/proc/cpuinfo")
    models = re.findall("model name\\s*: (.*)", info.read_text()) if info.exists() else []
    return dict(
        cpu=models[0] if models else platform.processor(),
        gpu=torch.cuda.get_device_name() if device == "cuda" else None,
        threads=torch.get_num_threads(),
        load_average=os.getloadavg()[0],  # above `threads`, other work shared the machine and the numbers are noisy
        torch=torch.__version__,
        commit=git("rev-parse", "--short", "HEAD") or "none",
        dirty=bool(git("status", "--porcelain")),
        date=datetime.date.today().isoformat(),
        build=theseus_ext.build_info(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(f"{'rows x dS x dT':>18}  {'case':<22} {'ours':>9} {'torch':>9} {'ratio':>6} {'GFLOP/s':>8} {'of sgemm':>8}")
    results = []
    for row in measure(options.device, options.repeats):
        results.append(row)
        shape = " x ".join(map(str, row["shape"]))
        print(
            f"{shape:>18}  {row['case']:<22} {row['ours_ms']:>6.1f} ms {row['baseline_ms']:>6.1f} ms"
            f" {row['speedup']:>6.2f} {row['gflop_per_s']:>8.1f} {row['share_of_sgemm']:>8.0%}",
            flush=True,
        )
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"cross_moment-{options.device}-{options.threads}threads.json"
    path.write_text(json.dumps(dict(machine=where(options.device), results=results), indent=1) + "\n")
    print(f"stored in {path}")


if __name__ == "__main__":
    main()
