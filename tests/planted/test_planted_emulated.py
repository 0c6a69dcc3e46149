"""The list of bugs planted in the CUDA kernels fits the code. Planting all takes minutes: run_emulated.py."""

from collections import Counter

import pytest
from emulated import BUGS, EmulatedBug
from run_emulated import ROOT, main, plant

TESTS = "".join(path.read_text() for path in (ROOT / "tests" / "emulated").glob("test_*.cpp"))


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_bug_can_be_planted(bug: EmulatedBug) -> None:
    text = (ROOT / bug.file).read_text()
    assert plant(bug, text) != text
    assert f"TEST({bug.test})" in TESTS and bug.build in ("plain", "address", "thread")


def test_names_are_unique() -> None:
    assert max(Counter(bug.name for bug in BUGS).values()) == 1


def test_unknown_bugs_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nonsense"]) == 2
    assert "no bug is called 'nonsense'" in capsys.readouterr().out
