"""The list of planted bugs fits the code, and the runner tells a bug that is noticed from one that is not.

The whole list takes minutes: ``python tests/planted/run.py``, or ``make planted``.
"""

import os
import subprocess
import sys
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
from bugs import BUGS, Bug
from helpers.forked import apart
from run import ROOT, original, plant

SAMPLE = ["certificate accepts T = 0", "T_in and T_out swapped where both are square"]
UNNOTICED = Bug("unnoticed", BUGS[0].test, BUGS[0].file, BUGS[0].old, BUGS[0].old + "    # says nothing new\n")


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_bug_can_be_planted(bug: Bug) -> None:
    text = original(bug)
    assert plant(bug, text) != text
    compile(plant(bug, text), bug.file, "exec")


def unknown(tests: list[str]) -> str:
    """What pytest says of the names that it does not find."""
    with redirect_stderr(StringIO()) as said, redirect_stdout(StringIO()):
        found = pytest.main(["--collect-only", "-p", "no:xdist", "-p", "no:cacheprovider", *tests])
    return said.getvalue() or f"exit code {found}" * bool(found)


def test_every_named_test_exists() -> None:
    """With its parameters: what the runner would find only when it gets there."""
    named = sorted({f"{ROOT}/{bug.test}" for bug in BUGS})
    assert "::no_such_test" in apart(unknown, [f"{named[0].partition('::')[0]}::no_such_test"])
    assert not apart(unknown, named)


def test_names_are_unique() -> None:
    assert max(Counter(bug.name for bug in BUGS).values()) == 1


def test_a_bug_out_of_date_is_said() -> None:
    with pytest.raises(ValueError, match="old: its old text is 0 times in .*, not once; bring the bug up to date"):
        plant(Bug("old", "", BUGS[0].file, "no such text", ""), original(BUGS[0]))


def test_runner_tells_red_from_green() -> None:
    planted = Path(__file__).parent
    add = f"import run, sys; from bugs import BUGS, Bug; BUGS.append({UNNOTICED!r}); sys.exit(run.main(sys.argv[1:]))"
    found = subprocess.run(
        [sys.executable, "-c", add, *SAMPLE, UNNOTICED.name],
        env={**os.environ, "PYTHONPATH": str(planted), "OMP_NUM_THREADS": "1"},
        cwd=planted,
        capture_output=True,
        text=True,
    )
    verdicts = [line.split()[0] for line in found.stdout.splitlines()[:-1]]
    assert verdicts == ["RED", "RED", "GREEN"] and found.returncode == 1, found.stdout + found.stderr


def test_unknown_bugs_are_named() -> None:
    found = subprocess.run(
        [sys.executable, Path(__file__).parent / "run.py", "nonsense"], capture_output=True, text=True
    )
    assert found.returncode == 2 and "no bug is called 'nonsense'; there are: gains of norms not folded" in found.stdout
