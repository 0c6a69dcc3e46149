"""Plants bugs, one at a time, in a copy of the packages, and shows whether the named test notices.

    python tests/planted/run.py [name ...]

Prints one line per bug: RED (noticed, with the failed assertion), GREEN (missed), or BROKEN (no such test, or the
planted code does not even import). Exit code 1 unless all are red. The same tests must pass on the untouched copy.

Every run is a fork of a process that has imported torch, transformers and peft, but not this project: a bug then costs
its test, not the imports.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path

from bugs import BUGS, Bug

ROOT = Path(__file__).parents[2]
PACKAGES = {"theseus_ext": ROOT / "theseus_ext", "theseus_transport": ROOT / "python" / "theseus_transport"}


def plant(bug: Bug, text: str) -> str:
    """The file's text with the bug in it; ValueError where the old text is not there exactly once."""
    if (found := text.count(bug.old)) != 1:
        raise ValueError(f"{bug.name}: its old text is {found} times in {bug.file}, not once; bring the bug up to date")
    return text.replace(bug.old, bug.new)


def original(bug: Bug) -> str:
    package, _, rest = bug.file.partition("/")
    return (PACKAGES[package] / rest).read_text()


def run_tests(tests: Sequence[str], folder: Path) -> tuple[int, str]:
    """pytest's exit code (0 all passed, 1 some failed) and output, with the packages in ``folder`` in place of ours."""
    log = folder / "output.txt"
    sys.stdout.flush()
    if (child := os.fork()) == 0:
        code = 70  # what fails before pytest runs is neither red nor green
        try:
            with log.open("w") as file:
                os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
            os.chdir(folder)
            os.environ["PYTHONPATH"] = str(folder)
            sys.path.insert(0, str(folder))
            code = _pytest(tests, folder)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), log.read_text()


def _pytest(tests: Sequence[str], folder: Path) -> int:
    import pytest
    import theseus_transport

    assert Path(theseus_transport.__file__).is_relative_to(folder), "the copy is not what is imported"
    options = ["-q", "-x", "--tb=short", "-p", "no:cacheprovider", "-p", "no:warnings", f"--rootdir={ROOT}"]
    return int(pytest.main([*options, *(f"{ROOT}/{test}" for test in tests)]))


def reason(output: str) -> str:
    """What pytest says of the first failure."""
    lines = re.findall(r"^E +(.+)$", output, re.M) or output.strip().splitlines() or ["no output"]
    return re.sub(r"\s+", " ", lines[0])[:100]


def check(bugs: Iterable[Bug]) -> list[str]:
    """Names of the bugs no test noticed; prints as it goes."""
    bugs, missed = list(bugs), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        for package, path in PACKAGES.items():
            shutil.copytree(path, folder / package, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        code, output = run_tests(sorted({bug.test for bug in bugs}), folder)
        if code != 0:
            print(f"BROKEN before any bug is planted: {reason(output)}\n{output}")
            return [bug.name for bug in bugs]
        for bug in bugs:
            path = folder / bug.file
            text = path.read_text()
            path.write_text(plant(bug, text))
            code, output = run_tests([bug.test], folder)
            path.write_text(text)
            verdict = {0: "GREEN", 1: "RED"}.get(code, "BROKEN")
            if verdict != "RED":
                missed.append(bug.name)
            print(f"{verdict:6} {bug.name:48} {bug.test.split('/')[-1]}: {reason(output)}", flush=True)
    print(f"{len(bugs) - len(missed)} of {len(bugs)} planted bugs turned their test red")
    return missed


def main(names: Sequence[str]) -> int:
    known = {bug.name: bug for bug in BUGS}
    if unknown := [name for name in names if name not in known]:
        print(f"no bug is called {unknown[0]!r}; there are: {', '.join(known)}")
        return 2
    for bug in BUGS:
        plant(bug, original(bug))
    sys.dont_write_bytecode = True  # a bug of the same size in the same second would meet a stale cache
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import hypothesis  # noqa: F401
    import peft  # noqa: F401
    import torch  # noqa: F401
    from transformers import LlamaForCausalLM, ViTForImageClassification  # noqa: F401

    return 1 if check(known[name] for name in names or known) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
