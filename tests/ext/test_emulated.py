"""The CUDA kernels on the host twin: built by CMake without torch or nvcc, plain and under the sanitizers."""

import fcntl
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RUN = ROOT / "tests" / "emulated" / "run.sh"


@pytest.mark.parametrize("build", ["plain", "address", "thread"])
def test_emulated_kernels(build: str) -> None:
    """Every kernel on a CPU; ``address`` adds AddressSanitizer and UBSan, ``thread`` ThreadSanitizer."""
    folder = ROOT / "build"
    folder.mkdir(exist_ok=True)
    with (folder / f"emulated.{build}.lock").open("w") as lock:  # two test processes may want the same build
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = subprocess.run([RUN, build], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode == 77:
        pytest.skip(done.stdout.strip().splitlines()[-1])
    assert done.returncode == 0, done.stdout
