"""Seeded hostile cases for every verb; ``make fuzz`` runs as many fresh ones as are asked for."""

from types import SimpleNamespace

import pytest
from helpers.fuzz import World, run

SEED, CASES, AT_ONCE = 12, 300, 30


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("first", range(0, CASES, AT_ONCE))
def test_hostile_input_is_refused_or_read_and_nothing_else_happens(world: World, first: int) -> None:
    """Exit codes of refusals, no traceback, no hang, nothing written elsewhere, nothing raw on the screen."""
    found = [case for number in range(first, first + AT_ONCE) if (case := run(world, SEED, number)).fault]
    assert not found, "\n".join(f"{case.broken}\n{case.fault}" for case in found)


def test_a_case_is_the_same_again(world: World) -> None:
    numbers = range(6)
    assert [run(world, 1, n)[:3] for n in numbers] == [run(world, 1, n)[:3] for n in numbers]
    assert {run(world, 1, n).broken for n in numbers}.isdisjoint(run(world, 2, n).broken for n in numbers)


@pytest.mark.parametrize(
    "fault, answer",
    [
        ("", {}),
        ("ZeroDivisionError", {"exception": ZeroDivisionError()}),
        ("exit 1", {"exit_code": 1}),
        (r"raw '\x1b'", {"output": "a\x1b[2Jb"}),
        ("wrote", {"outside": "written"}),
    ],
)
def test_what_must_not_happen_is_found(
    world: World, monkeypatch: pytest.MonkeyPatch, fault: str, answer: dict[str, object]
) -> None:
    def called(_: object) -> SimpleNamespace:
        if "outside" in answer:
            (world.root / "outside" / "secret").write_text("written")
        return SimpleNamespace(**{"exception": None, "exit_code": 3, "output": "refused", **answer})

    monkeypatch.setattr("helpers.fuzz.called", called)
    assert run(world, 1, 0).fault.startswith(fault) and bool(run(world, 1, 0).fault) is bool(fault)
