"""Plants bugs, one at a time, in a copy of the CUDA kernels and their twin, and shows whether the named test notices.

    python tests/planted/run_emulated.py [name ...]

Prints one line per bug: RED (noticed, with what the test said), GREEN (missed), BROKEN (no such test, or the planted
code does not compile) or LACKS (this machine has no such sanitizer). Exit code 1 unless all are red; the named tests
must pass on the untouched copy. No torch is needed; a bug costs one compilation.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from emulated import BUGS, EmulatedBug

ROOT = Path(__file__).parents[2]
COPIED = ("csrc", "tests/emulated")


def plant(bug: EmulatedBug, text: str) -> str:
    """The file's text with the bug in it; ValueError where the old text is not there exactly once."""
    if (found := text.count(bug.old)) != 1:
        raise ValueError(f"{bug.name}: its old text is {found} times in {bug.file}, not once; bring the bug up to date")
    return text.replace(bug.old, bug.new)


def run_tests(folder: Path, build: str, tests: Iterable[str]) -> tuple[int, str]:
    """run.sh's exit code (0 passed, 1 failed, 70 not built, 77 no such sanitizer) and output."""
    command = [folder / "tests" / "emulated" / "run.sh", build, "--", *tests]
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.returncode, done.stdout


def reason(output: str) -> str:
    """The failed check, the twin's last words, or the sanitizer's verdict."""
    signs = ("  /", "emulated kernel:", "SUMMARY:", "runtime error:", "error:")
    lines = [line.strip() for line in output.splitlines() if any(sign in line for sign in signs)]
    text = (lines or output.strip().splitlines() or ["no output"])[0]
    return re.sub(r"/\S*/", "", text)[:110]


def check(bugs: Iterable[EmulatedBug]) -> list[str]:
    """Names of the bugs no test noticed; prints as it goes."""
    bugs, missed = list(bugs), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        for part in COPIED:
            shutil.copytree(ROOT / part, folder / part)
        for build in sorted({bug.build for bug in bugs}):
            code, output = run_tests(folder, build, sorted({bug.test for bug in bugs if bug.build == build}))
            if code not in (0, 77):
                print(f"BROKEN before any bug is planted: {reason(output)}\n{output}")
                return [bug.name for bug in bugs]
        for bug in bugs:
            path = folder / bug.file
            text = path.read_text()
            path.write_text(plant(bug, text))
            code, output = run_tests(folder, bug.build, [bug.test])
            path.write_text(text)
            if bug.test not in output:
                code = 77 if code == 77 else 70
            verdict = {0: "GREEN", 1: "RED", 77: "LACKS"}.get(code, "BROKEN")
            if verdict != "RED":
                missed.append(bug.name)
            print(f"{verdict:6} {bug.name:48} {bug.build} {bug.test}: {reason(output)}", flush=True)
    print(f"{len(bugs) - len(missed)} of {len(bugs)} planted bugs turned their test red")
    return missed


def main(names: Sequence[str]) -> int:
    known = {bug.name: bug for bug in BUGS}
    if unknown := [name for name in names if name not in known]:
        print(f"no bug is called {unknown[0]!r}; there are: {', '.join(known)}")
        return 2
    for bug in BUGS:
        plant(bug, (ROOT / bug.file).read_text())
    os.environ.setdefault("MAX_JOBS", "2")
    return 1 if check(known[name] for name in names or known) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
