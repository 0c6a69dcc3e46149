"""All that a machine with a GPU can show, in under ten minutes and without network: `PYTHON=python3 make gpu-check`.

Builds theseus_ext in place for the present GPU alone; runs the kernels' own tests on the device (primitives too, which
elsewhere run on their twins), under compute-sanitizer where that works; every test over CUDA tensors; the benches.
Prints one table, writes bench/results/*-cuda.json and gpu-check.json, and copies them to $OUT where that is set. Exit
code 0: all that could run passed; 1: something failed, or there is no GPU.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
NATIVE = ROOT / "build" / "gpu"
LIMIT = 570  # seconds for everything
# seconds at most
BENCHES = {"cross_moment": 120, "effect_moment": 40, "transport": 60, "small_svd": 120, "polar": 120, "job": 180}
SPARED = "job"  # its official recipe decomposes on the CPU: on a slow one it is stopped, and that is no failure
NEEDED = {  # module: what cannot be without it, and then nothing is checked
    "torch": "check",
    "pybind11": "build",
    "setuptools": "build",
    "ninja": "build",  # or a program of that name
    "pytest": "tests and benches",
}
WANTED = {  # module: a word in the files that are left out without it; theseus_transport imports these
    "numpy": "theseus_transport",
    "scipy": "theseus_transport",
    "safetensors": "theseus_transport",
    "transformers": "theseus_transport",
    "hypothesis": "hypothesis",
}
REFUSED = ("Device not supported", "No attachable process", "ERROR_NOT_SUPPORTED")  # compute-sanitizer's words


@dataclass
class Step:
    name: str
    state: str  # passed, FAILED, not run
    seconds: float
    note: str = ""


class Checks:
    """Runs commands within the time that is left, and remembers how each ended."""

    def __init__(self, limit: float) -> None:
        self.end = time.monotonic() + limit
        self.steps: list[Step] = []

    def run(
        self,
        name: str,
        command: Sequence[str | Path],
        *,
        most: float,
        refused: Sequence[str] = (),
        optional: bool = False,
    ) -> None:
        """FAILED where the command fails or takes more than ``most`` seconds.

        Not run: where its output has words of ``refused``, and where something ``optional`` took too long.
        """
        start = time.monotonic()
        left = min(most, self.end - start)
        late = "not run" if optional else "FAILED"
        state, note, output = late, f"no time left of {LIMIT} s", ""
        if left > 0:
            environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'python'}", "PYTHONUNBUFFERED": "1"}
            output, code = _finish(command, left, environment)
            if code is None:
                state, note = late, f"stopped after {left:.0f} s"
            elif code and any(words in output for words in refused):
                state, note = "not run", next(line for line in output.splitlines() if any(w in line for w in refused))
            else:
                state, note = ("passed", "") if code == 0 else ("FAILED", f"exit code {code}")
        self.add(Step(name, state, time.monotonic() - start, note or _summary(output)))
        if state == "FAILED":
            print("\n".join(output.splitlines()[-40:]), flush=True)

    def add(self, step: Step) -> None:
        self.steps.append(step)
        print(f"gpu-check: {step.state:8} {step.name:32} {step.seconds:6.1f} s  {step.note}", flush=True)


def _finish(command: Sequence[str | Path], seconds: float, environment: dict[str, str]) -> tuple[str, int | None]:
    """A command's output and exit code; None where it took too long and was ended, with all it had started."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **pipes)
    try:
        output, code = process.communicate(timeout=seconds)[0], process.returncode
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        output, code = process.communicate()[0], None
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
    return output.decode(errors="replace"), code


def _summary(output: str) -> str:
    """pytest's or a kernel test's last word."""
    words = re.findall(r"^=*\s*(\d+ (?:passed|tests).*?)\s*=*$|((?:ERROR|RACECHECK) SUMMARY: .*)", output, re.M)
    return (words[-1][0] or words[-1][1]) if words else ""


def reasons() -> list[str]:
    """Why nothing can be checked here."""
    missing = [f"{name} is missing: without it no {what}" for name, what in NEEDED.items() if not _has(name)]
    if missing:
        return missing
    import torch

    if not torch.cuda.is_available():
        return [f"there is no GPU: torch {torch.__version__} sees none. Nothing was checked"]
    home = os.environ.get("CUDA_HOME")
    if not (shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")):
        return ["there is no nvcc on PATH or in CUDA_HOME: the kernels cannot be compiled"]
    return []


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None or (module == "ninja" and shutil.which(module) is not None)


def left_out(path: str) -> str:
    """Why a file of tests or benches cannot run here, or nothing."""
    text = (ROOT / path.partition("::")[0]).read_text()
    missing = [name for name, word in WANTED.items() if word in text and not _has(name)]
    return f"{' and '.join(missing)} missing" if missing else ""


def native(checks: Checks, arch: str) -> list[Path]:
    """Compiles the kernels' own tests for the device and runs them there; the programs."""
    NATIVE.mkdir(parents=True, exist_ok=True)
    home = os.environ.get("CUDA_HOME")
    nvcc = [f"{home}/bin/nvcc" if home else "nvcc", "-std=c++17", "-O3", "-lineinfo", f"-arch=sm_{arch}"]
    includes = [f"-I{ROOT / folder}" for folder in ("csrc", "csrc/cuda", "tests/emulated")]
    kernels = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    tests = sorted((ROOT / "tests" / "emulated").glob("test_*.cpp"))

    def compile_one(source: Path) -> tuple[str, int | None]:
        command = [*nvcc, *includes, "-x", "cu", "-c", source, "-o", NATIVE / f"{source.stem}{source.suffix}.o"]
        return _finish(command, 300, dict(os.environ))

    start = time.monotonic()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        ends = list(pool.map(compile_one, [*kernels, *tests]))
    for test in tests:
        objects = [NATIVE / f"{path.name}.o" for path in (test, *kernels)]
        ends.append(_finish([*nvcc, *objects, "-o", NATIVE / test.stem], 60, dict(os.environ)))
    wrong = "".join(output for output, code in ends if code)
    state = "FAILED" if any(code != 0 for _, code in ends) else "passed"
    checks.add(Step("compile the kernels' tests", state, time.monotonic() - start))
    print(wrong, end="", flush=True)
    programs = [NATIVE / test.stem for test in tests] if state == "passed" else []
    for program in programs:
        checks.run(f"on the device: {program.name}", [program], most=60)
    return programs


def sanitize(checks: Checks, programs: Sequence[Path]) -> None:
    """compute-sanitizer's tools over the kernels' tests, in the time left; where it cannot run, that is said."""
    tool = shutil.which("compute-sanitizer")
    if not tool:
        return checks.add(Step("compute-sanitizer", "not run", 0, "there is none on PATH"))
    for kind in ("memcheck", "racecheck", "synccheck"):
        for program in programs:
            command = [tool, "--tool", kind, "--error-exitcode", "3", program]
            checks.run(f"{kind}: {program.name}", command, most=40, refused=REFUSED, optional=True)
            if any(words in checks.steps[-1].note for words in REFUSED):
                return None
    return None


def tests_over_devices() -> list[str]:
    """Test files of which a test asks for a device or a GPU; of others the tests that are skipped without one."""
    asks = re.compile(r"^def test_\w+\((?:[^)]*\W)?(?:device|gpu)\W", re.M)
    skipped = re.compile(r"skipif\(not torch\.cuda\.is_available\(\).*\n(?:@.*\n)*def (test_\w+)")
    found = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        text, name = path.read_text(), str(path.relative_to(ROOT))
        found += [name] if asks.search(text) else [f"{name}::{test}" for test in skipped.findall(text)]
    return found


def rows() -> list[dict]:
    """Every row of this run's benches, with the keys of the table."""
    found = []
    for path in sorted(RESULTS.glob("*-cuda.json")):
        record = json.loads(path.read_text())
        for row in record.get("rows", record["results"]):
            over = row.get("over torch", {})
            found.append(
                {
                    "shape": f"{path.stem.removesuffix('-cuda')}: {row['case']}",
                    "ours ms": row.get("ours ms"),
                    "target ms": row.get("target ms"),
                    "baseline ms": row.get("torch ms"),
                    "ratio": over.get("median") if isinstance(over, dict) else over,
                    "TFLOP/s": row["GFLOP/s"] / 1e3 if "GFLOP/s" in row else None,
                    "of ceiling": row.get("share of ceiling"),
                    "error": row.get("error"),
                }
            )
    return found


def table(found: Sequence[dict]) -> str:
    if not found:
        return "gpu-check: no bench left a row"
    formats = {
        "ours ms": ".3f",
        "target ms": ".0f",
        "baseline ms": ".3f",
        "ratio": ".2f",
        "TFLOP/s": ".1f",
        "of ceiling": ".0%",
        "error": ".1e",
    }
    width = max(len(row["shape"]) for row in found)
    lines = [f"{'shape':<{width}}" + "".join(f"{key:>13}" for key in formats)]
    for row in found:
        cells = ("-" if row[key] is None else format(row[key], form) for key, form in formats.items())
        lines.append(f"{row['shape']:<{width}}" + "".join(f"{cell:>13}" for cell in cells))
    return "\n".join(lines)


def driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    if not shutil.which(command[0]):
        return "unknown"
    return subprocess.run(command, capture_output=True, text=True).stdout.strip().partition("\n")[0] or "unknown"


def main() -> int:
    if why := reasons():
        print("\n".join(f"gpu-check: {line}" for line in why))
        return 1
    import torch

    capability, name = torch.cuda.get_device_capability(), torch.cuda.get_device_name()
    arch = "{}.{}".format(*capability)
    facts = dict(gpu=name, capability=arch, driver=driver(), torch=torch.__version__, python=sys.version.split()[0])
    print(f"gpu-check: {facts}", flush=True)
    RESULTS.mkdir(exist_ok=True)
    for old in RESULTS.glob("*-cuda.json"):  # no row of an earlier run, or of another GPU, may pass for one of this
        old.unlink()
    os.environ |= {"TORCH_CUDA_ARCH_LIST": arch, "THESEUS_CUDA": "1"}
    checks = Checks(LIMIT)
    python = sys.executable
    checks.run("build in place", [python, "setup.py", "build_ext", "--inplace"], most=240)
    fits = "import torch, theseus_ext as t; why = t.cuda_problem(torch.device('cuda')); assert not why, why"
    checks.run("the build runs on this GPU", [python, "-c", fits], most=60)
    if checks.steps[-1].state == "passed":
        programs = native(checks, arch.replace(".", ""))
        pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
        for path in (tests := tests_over_devices()):
            if why := left_out(path):
                checks.add(Step(path, "not run", 0, why))
        checks.run("tests over CUDA tensors", [*pytest, *(t for t in tests if not left_out(t))], most=180)
        for bench, most in BENCHES.items():
            path = f"bench/bench_{bench}.py"
            if why := left_out(path) if (ROOT / path).exists() else "there is no such bench":
                checks.add(Step(path, "not run", 0, why))
                continue
            command = [*pytest, path, "-o", "python_files=bench_*.py", "-o", "addopts=-rs"]
            checks.run(path, command, most=most, optional=bench == SPARED)
        sanitize(checks, programs)  # last: it may take what time is left
    found = rows()
    print(f"\n{table(found)}\n")
    steps = [asdict(step) for step in checks.steps]
    (RESULTS / "gpu-check.json").write_text(json.dumps(dict(facts=facts, steps=steps, rows=found), indent=4) + "\n")
    if out := os.environ.get("OUT"):
        for path in [*RESULTS.glob("*-cuda.json"), RESULTS / "gpu-check.json"]:
            shutil.copy(path, out)
    failed = [step.name for step in checks.steps if step.state == "FAILED"]
    print(f"gpu-check: {'FAILED: ' + ', '.join(failed) if failed else 'green'} on {name}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
