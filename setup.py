"""Builds theseus_ext._C: host C++ against torch's stable ABI and, where there is an nvcc, CUDA kernels.

Environment:
    THESEUS_CUDA          0: never CUDA kernels, 1: always; default: where torch has CUDA and there is an nvcc
    FORCE_CUDA            1: as THESEUS_CUDA=1, under the name other torch extensions use
    CUDA_HOME             the toolkit's folder; default: the nvcc on PATH
    TORCH_CUDA_ARCH_LIST  as torch reads it: "8.0;9.0+PTX" or "Hopper"; default: ARCHS, as far as nvcc knows them
    MAX_JOBS              compilers at once; default: ninja decides
    NVCC_THREADS          architectures one nvcc compiles at once
    DEBUG                 1: no optimisation and debug information, in host and device code
    CXX                   the host compiler
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # torch 2.10; with it any ATen include fails to compile
OLDEST_TORCH = (2, 10)
ARCHS = "8.0;9.0;10.0;12.0+PTX"
NAMED_ARCHS = {"Ampere": "8.0;8.6+PTX", "Ada": "8.9+PTX", "Hopper": "9.0+PTX", "Blackwell": "10.0;10.3;12.0;12.1+PTX"}
HOST = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.cpp"))
DEVICE = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.cu"))
RULES = """
rule cxx
  command = $cxx $flags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule nvcc
  command = $nvcc $nvccflags -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = $cxx -shared $in $libs -o $out
"""


def say(text: str) -> None:
    print(f"theseus_ext: {text}", flush=True)


def refuse(text: str) -> SystemExit:
    return SystemExit(f"theseus_ext: {text}")


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")


def want_cuda(nvcc: str | None, torch_cuda: str | None) -> bool:
    ours, forced = os.environ.get("THESEUS_CUDA", ""), os.environ.get("FORCE_CUDA") == "1"
    if ours not in ("", "0", "1"):
        raise refuse(f"THESEUS_CUDA is {ours!r}; give 0 (never), 1 (always) or nothing (where torch has CUDA)")
    always = "THESEUS_CUDA=1" if ours == "1" else "FORCE_CUDA=1" if forced and not ours else ""
    home = os.environ.get("CUDA_HOME")
    missing = f"no nvcc in CUDA_HOME ({home}/bin)" if home else "no nvcc on PATH"
    if always and not nvcc:
        raise refuse(f"{always} but there is {missing}; install the CUDA toolkit and set CUDA_HOME to its folder")
    if always or (ours != "0" and nvcc and torch_cuda):
        say(f"CUDA kernels with {nvcc}")
        return True
    why = "THESEUS_CUDA=0" if ours == "0" else missing if not nvcc else "torch has no CUDA (FORCE_CUDA=1 forces)"
    say(f"CPU only: {why}")
    return False


def nvcc_release(nvcc: str) -> str:
    """As in "13.0"."""
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return text.split("release ")[1].split(",")[0]


def warn_of_other_cuda(nvcc: str, torch_cuda: str | None) -> None:
    release = nvcc_release(nvcc)
    if torch_cuda and release.split(".")[0] != torch_cuda.split(".")[0]:
        say(f"WARNING: nvcc is CUDA {release} but torch was built with CUDA {torch_cuda}; kernels need a driver for "
            f"CUDA {release}. Set CUDA_HOME to a CUDA {torch_cuda} toolkit to be safe")  # fmt: skip


def find_archs(nvcc: str) -> list[str]:
    """The architectures to compile, as in ["8.0", "9.0+PTX"]; refuses those nvcc does not know."""
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    known = [f"{arch[:-1]}.{arch[-1]}" for arch in re.findall(r"compute_(\d+)", listed)]
    wish = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(" ", ";")
    for name, archs in NAMED_ARCHS.items():
        wish = wish.replace(name, archs)
    if not wish.strip(";"):
        chosen = [arch for arch in ARCHS.removesuffix("+PTX").split(";") if arch in known]
        if not chosen:
            raise refuse(f"{nvcc} knows none of {ARCHS}, only {', '.join(known)}; set TORCH_CUDA_ARCH_LIST")
        return [*chosen[:-1], f"{chosen[-1]}+PTX"]
    chosen = [arch for arch in wish.split(";") if arch]
    for arch in chosen:
        if not (match := re.fullmatch(r"(\d+\.\d)[af]?(\+PTX)?", arch)):
            names = ", ".join(NAMED_ARCHS)
            raise refuse(f"TORCH_CUDA_ARCH_LIST names {arch!r}; write 9.0, 9.0+PTX or one of {names}")
        if float(match[1]) < 8:
            raise refuse(f"TORCH_CUDA_ARCH_LIST names {arch}; the kernels need 8.0 (Ampere) or newer")
        if match[1] not in known:
            unknown = f"TORCH_CUDA_ARCH_LIST names {arch}, unknown to {nvcc} (CUDA {nvcc_release(nvcc)})"
            raise refuse(f"{unknown}; it knows {', '.join(known)}")
    return chosen


def gencode(archs: list[str]) -> list[str]:
    flags = []
    for arch in archs:
        name = arch.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{name},code=sm_{name}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{name},code=compute_{name}")
    return flags


def positive(name: str) -> list[str]:
    """[the value] of an environment variable that counts something, [] where it is not set."""
    value = os.environ.get(name, "")
    if value and not (value.isdecimal() and int(value)):
        raise refuse(f"{name} is {value!r}; give a number from 1")
    return [value] * bool(value)


def device_flags(archs: list[str], *, debug: bool) -> list[str]:
    threads = [f"--threads={count}" for count in positive("NVCC_THREADS")]
    optimise = ["-O0", "-g", "-G"] if debug else ["-O3", "-lineinfo"]
    return ["-std=c++17", *optimise, *threads, "-Xcompiler=-fPIC,-fvisibility=hidden", *gencode(archs)]


def find_ninja() -> str:
    try:
        import ninja

        return str(Path(ninja.BIN_DIR) / "ninja")
    except ImportError:
        return shutil.which("ninja") or "ninja"


def find_cudart(nvcc: str) -> str:
    homes = [os.environ.get("CUDA_HOME", ""), Path(nvcc).resolve().parent.parent, "/usr/local/cuda"]
    for home in filter(None, homes):
        for pattern in ("lib*/libcudart_static.a", "targets/*/lib/libcudart_static.a"):
            for library in sorted(Path(home).glob(pattern)):
                return str(library)
    raise refuse(f"no libcudart_static.a beside {nvcc}; set CUDA_HOME to the toolkit's folder")


def check_tools(torch_version: str, cxx: str) -> None:
    if not sys.platform.startswith("linux"):
        raise refuse(f"this is {sys.platform}; only Linux is supported")
    if tuple(int(part) for part in torch_version.split(".")[:2]) < OLDEST_TORCH:
        raise refuse(f"torch is {torch_version}, the stable ABI needs 2.10; pip install 'torch>=2.10'")
    if not shutil.which(shlex.split(cxx)[0]):
        raise refuse(f"no C++ compiler {cxx!r}; install g++, or set CXX")
    if not (header := Path(sysconfig.get_path("include"), "Python.h")).exists():
        raise refuse(f"no {header}; install Python's headers (python3-dev)")


class Build(build_ext):
    def build_extension(self, ext: Extension) -> None:
        try:
            import pybind11
            import torch
        except ImportError as error:
            raise refuse(f"{error.name} is missing; pip install 'torch>=2.10' 'pybind11>=2.12' ninja, or build without "
                         "--no-build-isolation") from error  # fmt: skip
        cxx, debug = os.environ.get("CXX", "c++"), os.environ.get("DEBUG") == "1"
        check_tools(torch.__version__, cxx)
        nvcc = find_nvcc()
        cuda = want_cuda(nvcc, torch.version.cuda)
        archs = find_archs(nvcc) if cuda else []
        site = Path(torch.__file__).parent
        # pybind11 before torch: the copy inside torch refuses TORCH_TARGET_VERSION.
        includes = [pybind11.get_include(), sysconfig.get_path("include"), site / "include"]
        facts = {"TORCH": torch.__version__, "NVCC": nvcc_release(nvcc) if cuda else "", "ARCHS": ";".join(archs)}
        flags = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", STABLE_ABI]
        flags += ["-O0", "-g"] if debug else ["-O3", "-g0", "-DNDEBUG"]
        flags += [f'-DTHESEUS_{key}="{value}"' for key, value in facts.items()] + [f"-DTHESEUS_DEBUG={debug:d}"]
        flags += ["-DTHESEUS_CUDA"] * cuda + [f"-isystem{include}" for include in includes]
        # libtorch_cuda is never named: -ltorch brings it in where it exists.
        libs = [f"-L{site / 'lib'}", "-ltorch_cpu", "-Wl,--no-as-needed", "-ltorch"]
        if cuda:
            warn_of_other_cuda(nvcc, torch.version.cuda)
            libs = [find_cudart(nvcc), "-ldl", "-lrt", "-lpthread", "-Wl,--exclude-libs,ALL", *libs]
        variables = {"cxx": cxx, "nvcc": nvcc or "nvcc", "flags": shlex.join(flags), "libs": shlex.join(libs)}
        variables["nvccflags"] = shlex.join(device_flags(archs, debug=debug))
        # One folder per torch: two environments in one checkout do not rebuild each other's objects.
        folder = ROOT.resolve() / "build" / f"ext-{sys.implementation.cache_tag}-torch-{torch.__version__}"
        compile_and_link(folder, Path(self.get_ext_fullpath(ext.name)).resolve(), HOST + DEVICE * cuda, variables)


def compile_and_link(folder: Path, target: Path, sources: list[str], variables: dict[str, str]) -> None:
    objects = {source: folder / f"{source.replace('/', '.')}.o" for source in sources}
    lines = [f"{name} = {value.replace('$', '$$')}" for name, value in variables.items()] + [RULES]
    for source, output in objects.items():
        rule = "nvcc" if source.endswith(".cu") else "cxx"
        lines.append(f"build {path(output)}: {rule} {path(ROOT.resolve() / source)}")
    lines.append(f"build {path(target)}: link {' '.join(map(path, objects.values()))}")
    folder.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text("\n".join(lines) + "\n")
    command = [find_ninja(), "-C", str(folder), *(f"-j{count}" for count in positive("MAX_JOBS"))]
    if subprocess.run(command).returncode:
        raise refuse("the compiler failed; its message is above")


def path(value: Path) -> str:
    """A path as ninja wants it."""
    return str(value).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


setup(
    packages=sorted({"theseus_ext", "theseus_transport", *find_packages("python")}),
    py_modules=["theseus_command"],
    package_dir={"": "python", "theseus_ext": "theseus_ext"},
    package_data={"theseus_ext": ["py.typed"], "theseus_transport": ["py.typed"]},
    ext_modules=[Extension("theseus_ext._C", sources=HOST + DEVICE)],
    cmdclass={"build_ext": Build},
)
