"""setup.py: what it compiles, what it reads from the environment, and what it refuses in which words.

Compilers are stand-ins that write down how they were called; .ci/package-check and .ci/cuda-check run the real ones.
"""

import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import setuptools

ROOT = Path(__file__).parents[2]
VARIABLES = (
    "THESEUS_CUDA",
    "FORCE_CUDA",
    "CUDA_HOME",
    "TORCH_CUDA_ARCH_LIST",
    "MAX_JOBS",
    "NVCC_THREADS",
    "DEBUG",
    "CXX",
)
STAND_IN = """#!/bin/sh
case "$1" in
  --version) echo "Cuda compilation tools, release 12.4, V12.4.131"; exit ;;
  --list-gpu-arch) printf 'compute_75\\ncompute_80\\ncompute_86\\ncompute_90\\n'; exit ;;
esac
mkdir {log}.running 2>/dev/null && mine=1 || echo "at once" >> {log}
echo "$(basename $0) $*" >> {log}
sleep 0.1
while [ $# -gt 0 ]; do case "$1" in -o|-MF) : > "$2" ;; esac; shift; done
[ -z "$mine" ] || rmdir {log}.running
"""


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def setup_py(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The functions of setup.py."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    return SimpleNamespace(**runpy.run_path(str(ROOT / "setup.py")))


@pytest.fixture
def toolkit(tmp_path: Path) -> Path:
    """A folder with nvcc 12.4, a host compiler and the CUDA runtime, none of which does anything."""
    (tmp_path / "cuda/bin").mkdir(parents=True)
    (tmp_path / "cuda/lib64").mkdir()
    (tmp_path / "cuda/lib64/libcudart_static.a").touch()
    for name in ("nvcc", "host-c++"):
        (tmp_path / "cuda/bin" / name).write_text(STAND_IN.format(log=tmp_path / "log"))
        (tmp_path / "cuda/bin" / name).chmod(0o755)
    return tmp_path / "cuda"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """What a build needs of the checkout, where it can be built without touching the checkout's own build."""
    for name in ("csrc", "theseus_ext", "python", "tests"):
        shutil.copytree(
            ROOT / name,
            tmp_path / "tree" / name,
            ignore=shutil.ignore_patterns("*.so", "*.egg-info", ".*", "__pycache__"),
        )
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "CMakeLists.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / "tree" / name)
    return tmp_path / "tree"


def build(tree: Path, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", "built"]
    return subprocess.run(command, cwd=tree, env=os.environ | environment, capture_output=True, text=True)


def test_every_variable_reaches_the_compilers(tree: Path, toolkit: Path) -> None:
    done = build(tree, FORCE_CUDA="1", CUDA_HOME=str(toolkit), CXX=str(toolkit / "bin/host-c++"), DEBUG="1",
                 MAX_JOBS="1", NVCC_THREADS="3", TORCH_CUDA_ARCH_LIST="8.0 9.0a;8.6+PTX")  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    calls = (toolkit.parent / "log").read_text().splitlines()
    host = [call for call in calls if call.startswith("host-c++") and "-shared" not in call]
    device = [call for call in calls if call.startswith("nvcc")]
    assert len(host) == len(list((tree / "csrc").rglob("*.cpp"))) > 0
    assert len(device) == len(list((tree / "csrc").rglob("*.cu"))) > 0
    assert "at once" not in calls, "MAX_JOBS=1"
    for call in host:
        assert all(
            f in call for f in (" -O0 -g ", " -DTHESEUS_DEBUG=1 ", " -DTHESEUS_CUDA ", " -DTORCH_TARGET_VERSION=")
        )
        assert '-DTHESEUS_ARCHS="8.0;9.0a;8.6+PTX"' in call and '-DTHESEUS_NVCC="12.4"' in call
    for call in device:
        assert " -O0 -g -G " in call and " --threads=3 " in call and "-isystem" not in call
        codes = [flag.split(",code=")[1] for flag in call.split() if flag.startswith("-gencode")]
        assert codes == ["sm_80", "sm_90a", "sm_86", "compute_86"]
    (link,) = (call for call in calls if "-shared" in call)
    assert "libcudart_static.a" in link and "-ltorch_cpu -Wl,--no-as-needed -ltorch" in link
    assert not any(name in link for name in ("torch_cuda", "torch_python", "c10"))


def test_without_nvcc_the_host_code_is_built(tree: Path, toolkit: Path) -> None:
    done = build(tree, CUDA_HOME=str(tree), CXX=str(toolkit / "bin/host-c++"), MAX_JOBS="2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"theseus_ext: CPU only: no nvcc in CUDA_HOME ({tree}/bin)" in done.stdout
    calls = (toolkit.parent / "log").read_text().splitlines()
    assert "at once" in calls and not any("-DTHESEUS_CUDA " in call or "cudart" in call for call in calls)
    assert all(" -O3 -g0 -DNDEBUG " in call for call in calls if " -c " in call)


def test_a_refusal_is_the_last_line(tree: Path) -> None:
    done = build(tree, FORCE_CUDA="1", CUDA_HOME=str(tree))
    assert done.returncode == 1 and not (tree / "built").exists()
    refusal = f"theseus_ext: FORCE_CUDA=1 but there is no nvcc in CUDA_HOME ({tree}/bin); install the CUDA toolkit"
    assert done.stderr.splitlines()[-1].startswith(refusal)
    done = build(tree, THESEUS_CUDA="0", CXX="no-such-compiler")
    assert done.stderr.splitlines()[-1] == "theseus_ext: no C++ compiler 'no-such-compiler'; install g++, or set CXX"
    done = build(tree, THESEUS_CUDA="0", CXX="false")
    assert done.stderr.splitlines()[-1] == "theseus_ext: the compiler failed; its message is above"


@pytest.mark.parametrize("variables, nvcc, torch_cuda, wanted", [
    ({}, "nvcc", "13.0", "CUDA kernels with nvcc"),
    ({}, None, "13.0", "CPU only: no nvcc on PATH"),
    ({}, "nvcc", None, r"CPU only: torch has no CUDA \(FORCE_CUDA=1 forces\)"),
    ({"FORCE_CUDA": "0"}, "nvcc", "13.0", "CUDA kernels"),
    ({"FORCE_CUDA": "1"}, "nvcc", None, "CUDA kernels"),
    ({"THESEUS_CUDA": "1"}, "nvcc", None, "CUDA kernels"),
    ({"THESEUS_CUDA": "0"}, "nvcc", "13.0", "CPU only: THESEUS_CUDA=0"),
    ({"THESEUS_CUDA": "0", "FORCE_CUDA": "1"}, None, None, "CPU only: THESEUS_CUDA=0"),
    ({"THESEUS_CUDA": "1"}, None, "13.0", "refused: .*THESEUS_CUDA=1 but there is no nvcc on PATH; install"),
    ({"FORCE_CUDA": "1"}, None, None, "refused: .*FORCE_CUDA=1 but there is no nvcc on PATH; install"),
    ({"THESEUS_CUDA": "yes"}, "nvcc", "13.0", r"refused: .*THESEUS_CUDA is 'yes'; give 0 \(never\), 1"),
])  # fmt: skip
def test_whether_cuda_is_built(setup_py, monkeypatch, capsys, variables, nvcc, torch_cuda, wanted) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if wanted.startswith("refused"):
        with pytest.raises(SystemExit, match=wanted.partition(": ")[2]):
            setup_py.want_cuda(nvcc, torch_cuda)
        return
    cuda = setup_py.want_cuda(nvcc, torch_cuda)
    assert cuda == wanted.startswith("CUDA")
    assert re.search(wanted, capsys.readouterr().out)


def test_nvcc_is_found_where_the_environment_says(setup_py, monkeypatch, toolkit: Path, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    assert setup_py.find_nvcc() == str(toolkit / "bin/nvcc")
    monkeypatch.setenv("PATH", str(toolkit / "bin"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert setup_py.find_nvcc() is None, "CUDA_HOME goes before PATH"
    monkeypatch.delenv("CUDA_HOME")
    assert setup_py.find_nvcc() == str(toolkit / "bin/nvcc")


@pytest.mark.parametrize("wish, archs", [
    (None, ["8.0", "9.0+PTX"]),  # of 8.0, 9.0, 10.0 and 12.0 this nvcc knows two; the last is also the PTX
    ("", ["8.0", "9.0+PTX"]),
    ("8.6", ["8.6"]),
    ("8.0 8.6;9.0+PTX", ["8.0", "8.6", "9.0+PTX"]),
    ("9.0a", ["9.0a"]),
    ("Ampere", ["8.0", "8.6+PTX"]),
    ("Ampere;Hopper", ["8.0", "8.6+PTX", "9.0+PTX"]),
])  # fmt: skip
def test_architectures(setup_py, monkeypatch, toolkit: Path, wish: str | None, archs: list[str]) -> None:
    if wish is not None:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wish)
    assert setup_py.find_archs(str(toolkit / "bin/nvcc")) == archs


@pytest.mark.parametrize("wish, message", [
    ("8.0;10.0+PTX", r"names 10.0\+PTX, unknown to .*nvcc \(CUDA 12.4\); it knows 7.5, 8.0, 8.6, 9.0$"),
    ("Blackwell", "names 10.0, unknown to"),
    ("7.5;8.0", r"names 7.5; the kernels need 8.0 \(Ampere\) or newer"),
    ("sm_90", r"names 'sm_90'; write 9.0, 9.0\+PTX or one of Ampere, Ada, Hopper, Blackwell"),
    ("90", "names '90'; write"),
    ("9.0+ptx", "names '9.0.ptx'; write"),
    ("native", "names 'native'; write"),
])  # fmt: skip
def test_architectures_refused(setup_py, monkeypatch, toolkit: Path, wish: str, message: str) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wish)
    with pytest.raises(SystemExit, match=f"theseus_ext: TORCH_CUDA_ARCH_LIST {message}"):
        setup_py.find_archs(str(toolkit / "bin/nvcc"))


def test_another_cuda_than_torchs_is_said(setup_py, toolkit: Path, capsys: pytest.CaptureFixture) -> None:
    nvcc = str(toolkit / "bin/nvcc")
    setup_py.warn_of_other_cuda(nvcc, "12.8")
    setup_py.warn_of_other_cuda(nvcc, None)
    assert capsys.readouterr().out == ""
    setup_py.warn_of_other_cuda(nvcc, "13.0")
    assert "WARNING: nvcc is CUDA 12.4 but torch was built with CUDA 13.0" in capsys.readouterr().out


@pytest.mark.parametrize("name, value", [("MAX_JOBS", "0"), ("MAX_JOBS", "many"), ("NVCC_THREADS", "-1")])
def test_counts_are_numbers(setup_py, monkeypatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match=f"{name} is '{value}'; give a number from 1"):
        setup_py.positive(name)
    monkeypatch.setenv(name, "")
    assert setup_py.positive(name) == []


def test_old_torch_is_refused(setup_py) -> None:
    setup_py.check_tools("2.10.0+cpu", "sh")
    with pytest.raises(SystemExit, match="torch is 2.9.1, the stable ABI needs 2.10; pip install 'torch>=2.10'"):
        setup_py.check_tools("2.9.1", "sh")


def test_source_distribution_is_whole(tree: Path) -> None:
    (tree / "csrc/cuda/primitives.cuh").touch()
    wanted = {str(path.relative_to(tree)) for path in tree.rglob("*") if path.is_file() and "tests" not in path.parts}
    code = "import setuptools.build_meta as backend; print(backend.build_sdist('dist'))"
    subprocess.run([sys.executable, "-c", code], cwd=tree, check=True, capture_output=True)
    with tarfile.open(next((tree / "dist").glob("*.tar.gz"))) as archive:
        held = {name.partition("/")[2] for name in archive.getnames() if not archive.getmember(name).isdir()}
    metadata = {"PKG-INFO", "setup.cfg"}
    assert {name for name in held - wanted if ".egg-info/" not in name} == metadata and wanted - held == set()
    assert {"theseus_ext/py.typed", "python/theseus_transport/py.typed", "LICENSE", "csrc/library.cpp"} <= held
