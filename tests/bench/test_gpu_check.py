"""bench/gpu_check.py as far as it goes without a GPU: what it refuses, collects, prints, and calls passed or failed."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "bench"))
import gpu_check  # noqa: E402


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: gpu-check would run here, and in it this test")
def test_without_a_gpu_it_says_so_and_fails() -> None:
    found = subprocess.run([sys.executable, ROOT / "bench" / "gpu_check.py"], capture_output=True, text=True)
    expected = f"gpu-check: there is no GPU: torch {torch.__version__} sees none. Nothing was checked"
    assert (found.returncode, found.stdout.strip()) == (1, expected), found.stderr


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpu_check, "_has", lambda name: name not in ("pytest", "pybind11", "ninja", "scipy"))
    assert gpu_check.main() == 1
    assert capsys.readouterr().out.splitlines() == [
        "gpu-check: pybind11 is missing: without it no build",
        "gpu-check: ninja is missing: without it no build",
        "gpu-check: pytest is missing: without it no tests and benches",
    ]


def test_ninja_is_a_module_or_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check.importlib.util, "find_spec", lambda name: None)
    for program in ("/usr/bin/ninja", None):
        monkeypatch.setattr(gpu_check.shutil, "which", lambda name, program=program: program)
        assert gpu_check._has("ninja") == bool(program) and not gpu_check._has("pytest")


def test_what_only_the_package_needs_leaves_out_its_files_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    files = [*gpu_check.tests_over_devices(), *(f"bench/bench_{name}.py" for name in gpu_check.BENCHES)]
    assert not any(gpu_check.left_out(path) for path in files)
    monkeypatch.setattr(gpu_check, "_has", lambda name: name not in ("scipy", "transformers"))
    left = {path: why for path in files if (why := gpu_check.left_out(path))}
    assert {
        "tests/linalg/test_polar.py::test_cuda_iterates",
        "bench/bench_polar.py",
        "bench/bench_job.py",
    } <= left.keys()
    assert set(left.values()) == {"scipy and transformers missing"}
    assert not {"tests/ext/test_cross_moment.py", "tests/ext/test_svd.py", "bench/bench_cross_moment.py"} & left.keys()
    monkeypatch.setattr(gpu_check, "_has", lambda name: name != "hypothesis")
    assert gpu_check.left_out("tests/ext/test_svd.py") == "hypothesis missing"
    imported = {"numpy", "scipy", "safetensors", "transformers"}
    assert imported <= {name for name, word in gpu_check.WANTED.items() if word == "theseus_transport"}


def test_tests_over_devices_are_found() -> None:
    found = gpu_check.tests_over_devices()
    assert {
        f"tests/{name}.py"
        for name in (
            *(
                f"ext/test_{name}"
                for name in ("build", "cross_moment", "cross_moment_contract", "effect_moment", "svd")
            ),
            "updates/test_layer_moves_device",
            "linalg/test_ratios",
        )
    } <= {*found}
    assert "tests/linalg/test_polar.py::test_cuda_iterates" in found
    assert all((ROOT / "bench" / f"bench_{name}.py").exists() for name in gpu_check.BENCHES)
    assert not {"tests/ext/test_setup.py", "tests/ext/test_emulated.py"} & {*found}


@pytest.mark.parametrize("code, refused, optional, state, note", [
    ("print('3 tests, 0 failed checks')", (), False, "passed", "3 tests, 0 failed checks"),
    ("print('== 3 passed in 1s ==')", (), False, "passed", "3 passed in 1s"),
    ("raise SystemExit(3)", (), True, "FAILED", "exit code 3"),
    ("print('No such device'); raise SystemExit(3)", ("such device",), False, "not run", "No such device"),
    ("import time; time.sleep(60)", (), False, "FAILED", "stopped after 1 s"),
    ("import time; time.sleep(60)", (), True, "not run", "stopped after 1 s"),
])  # fmt: skip
def test_how_steps_end(code: str, refused: tuple[str, ...], optional: bool, state: str, note: str) -> None:
    checks = gpu_check.Checks(60)
    most = 1 if "sleep" in code else 30
    checks.run("a step", [sys.executable, "-c", code], most=most, refused=refused, optional=optional)
    (step,) = checks.steps
    assert (step.state, step.note) == (state, note)


def test_a_late_step_is_ended_with_all_it_started(tmp_path: Path) -> None:
    """As a bench that starts a process for every way; a killed process may stay as a zombie until it is waited for."""
    told = tmp_path / "pid"
    child = f"import os, time; open({str(told)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    checks = gpu_check.Checks(60)
    checks.run("a step", [sys.executable, "-c", code], most=5)
    assert checks.steps[0].note == "stopped after 5 s"

    def alive() -> bool:
        state = Path("/proc") / told.read_text() / "stat"
        return state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"

    ends = time.monotonic() + 30  # it was killed, and may be on its way out; else it sleeps for ten minutes
    while alive():
        assert time.monotonic() < ends, "it still runs"
        time.sleep(0.1)


def test_no_step_starts_when_time_is_up() -> None:
    checks = gpu_check.Checks(0)
    checks.run("late", [sys.executable, "-c", "raise SystemExit(0)"], most=30)
    assert checks.steps[0].state == "FAILED" and checks.steps[0].note.startswith("no time left")


def test_one_table_of_all_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu_check, "RESULTS", tmp_path)
    assert gpu_check.table(gpu_check.rows()) == "gpu-check: no bench left a row"
    whole = {"case": "3 x 4", "ours ms": 0.5, "torch ms": 1.0, "GFLOP/s": 2500.0, "error": 1.5e-7}
    whole |= {"over torch": {"median": 2.0}, "share of ceiling": 0.25}
    job = {"results": {"official": {}}, "rows": [{"case": "paper", "ours ms": 2e3, "torch ms": 5e5, "over torch": 250}]}
    polar = {"results": [{"case": "5 x 6", "ours ms": 7.0, "target ms": 40}]}
    for name, record in {"polar": polar, "job-l14": job, "cross_moment": {"results": [whole]}}.items():
        (tmp_path / f"{name}-cuda.json").write_text(json.dumps(record))
    head, *lines = gpu_check.table(gpu_check.rows()).splitlines()
    columns = ["shape", "ours ms", "target ms", "baseline ms", "ratio", "TFLOP/s", "of ceiling", "error"]
    assert head.split() == " ".join(columns).split()
    assert [line.split() for line in lines] == [
        ["cross_moment:", "3", "x", "4", "0.500", "-", "1.000", "2.00", "2.5", "25%", "1.5e-07"],
        ["job-l14:", "paper", "2000.000", "-", "500000.000", "250.00", *"---"],
        ["polar:", "5", "x", "6", "7.000", "40", *"-----"],
    ]
