"""Builds theseus_ext._C: host C++ against torch's stable ABI and, where there is an nvcc, CUDA kernels.

Environment: THESEUS_CUDA=0 never, =1 always (default: nvcc present and torch built with CUDA); CUDA_HOME;
TORCH_CUDA_ARCH_LIST, as torch reads it ("8.0;9.0+PTX"); MAX_JOBS; DEBUG=1; CXX.
"""

import os
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
ARCHS = "8.0;9.0;10.0;12.0+PTX"
HOST = ["csrc/library.cpp", "csrc/bindings.cpp", "csrc/cross_moment.cpp", "csrc/cpu/cross_moment.cpp"]
DEVICE = ["csrc/cuda/cross_moment.cu"]
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


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")


def want_cuda(nvcc: str | None, torch_cuda: str | None) -> bool:
    wish = os.environ.get("THESEUS_CUDA", "")
    if wish == "1" and not nvcc:
        raise SystemExit("theseus_ext: THESEUS_CUDA=1 but there is no nvcc; put it on PATH or set CUDA_HOME")
    if wish == "1" or (wish != "0" and nvcc and torch_cuda):
        print(f"theseus_ext: CUDA kernels with {nvcc}")
        return True
    why = "THESEUS_CUDA=0" if wish == "0" else "no nvcc" if not nvcc else "torch has no CUDA (THESEUS_CUDA=1 forces)"
    print(f"theseus_ext: CPU only: {why}")
    return False


def gencode(archs: str) -> list[str]:
    flags = []
    for arch in archs.replace(" ", ";").split(";"):
        name = arch.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{name},code=sm_{name}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{name},code=compute_{name}")
    return flags


def find_ninja() -> str:
    try:
        import ninja

        return str(Path(ninja.BIN_DIR) / "ninja")
    except ImportError:
        return shutil.which("ninja") or "ninja"


def find_cudart(nvcc: str) -> str:
    homes = [os.environ.get("CUDA_HOME", ""), Path(nvcc).resolve().parent.parent, "/usr/local/cuda"]
    for home in filter(None, homes):
        for library in Path(home).glob("lib*/libcudart_static.a"):
            return str(library)
    raise SystemExit(f"theseus_ext: no libcudart_static.a beside {nvcc}; set CUDA_HOME to the toolkit's folder")


def nvcc_release(nvcc: str) -> str:
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return text.split("release ")[1].split(",")[0]


class Build(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11
        import torch

        nvcc = find_nvcc()
        cuda = want_cuda(nvcc, torch.version.cuda)
        archs = os.environ.get("TORCH_CUDA_ARCH_LIST", ARCHS) if cuda else ""
        debug = os.environ.get("DEBUG", "0") == "1"
        site = Path(torch.__file__).parent
        # pybind11 before torch: the copy inside torch refuses TORCH_TARGET_VERSION.
        includes = [pybind11.get_include(), sysconfig.get_path("include"), site / "include"]
        facts = {"TORCH": torch.__version__, "NVCC": nvcc_release(nvcc) if cuda else "", "ARCHS": archs}
        flags = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", STABLE_ABI]
        flags += ["-O0", "-g"] if debug else ["-O3", "-g0", "-DNDEBUG"]
        flags += [f'-DTHESEUS_{key}="{value}"' for key, value in facts.items()] + [f"-DTHESEUS_DEBUG={debug:d}"]
        flags += ["-DTHESEUS_CUDA"] * cuda + [f"-isystem{include}" for include in includes]
        # libtorch_cuda is never named: -ltorch brings it in where it exists.
        libs = [f"-L{site / 'lib'}", "-ltorch_cpu", "-Wl,--no-as-needed", "-ltorch"]
        device = []
        if cuda:
            device = ["-std=c++17", "-O3", "-lineinfo", "-Xcompiler=-fPIC,-fvisibility=hidden", *gencode(archs)]
            libs = [find_cudart(nvcc), "-ldl", "-lrt", "-lpthread", "-Wl,--exclude-libs,ALL", *libs]
        variables = {"cxx": os.environ.get("CXX", "c++"), "nvcc": nvcc or "nvcc"}
        variables |= {"flags": shlex.join(flags), "nvccflags": shlex.join(device), "libs": shlex.join(libs)}
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
    jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
    subprocess.run([find_ninja(), "-C", str(folder), *jobs], check=True)


def path(value: Path) -> str:
    """A path as ninja wants it."""
    return str(value).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


setup(
    packages=sorted({"theseus_ext", "theseus_transport", *find_packages("python")}),
    package_dir={"": "python", "theseus_ext": "theseus_ext"},
    package_data={"theseus_ext": ["py.typed"], "theseus_transport": ["py.typed"]},
    ext_modules=[Extension("theseus_ext._C", sources=HOST + DEVICE)],
    cmdclass={"build_ext": Build},
)
