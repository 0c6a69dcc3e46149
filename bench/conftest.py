"""What a bench stores and prints: rows of one kind go to one file, and to one table at the end."""

import json
from collections import defaultdict
from pathlib import Path

import machine
import pytest
from timing import DEVICE

RESULTS = Path(__file__).parent / "results"


def pytest_addoption(parser) -> None:
    parser.addoption("--full", action="store_true", help="also what takes many minutes")


def pytest_configure(config) -> None:
    config.stash[ROWS] = defaultdict(list)


ROWS = pytest.StashKey[dict[str, list[dict]]]()


@pytest.fixture
def store(request):
    """store(bench, row): keep one row of numbers, in order of its keys; the first is the case."""
    return lambda bench, row: request.config.stash[ROWS][bench].append(row)


def pytest_sessionfinish(session) -> None:
    RESULTS.mkdir(exist_ok=True)
    for bench, rows in session.config.stash[ROWS].items():
        text = json.dumps(dict(machine=machine.facts(), results=rows), indent=4)
        (RESULTS / f"{bench}-{DEVICE}.json").write_text(text + "\n")


def pytest_terminal_summary(terminalreporter, config) -> None:
    for bench, rows in config.stash[ROWS].items():
        flat = [_flat(row) for row in rows]
        width = max(len(row["case"]) for row in flat)
        head = "".join(f"{key:>{max(len(key), 7) + 2}}" for key in list(flat[0])[1:])
        terminalreporter.write_line(f"\n{bench:<{width}}{head}")
        for row in flat:
            cells = "".join(
                f"{row[key]:>{max(len(key), 7) + 2}.{'1e' if key == 'error' else '2f'}}" for key in list(row)[1:]
            )
            terminalreporter.write_line(f"{row['case']:<{width}}{cells}")


def _flat(row: dict) -> dict:
    """A ratio as its fastest, and its quartiles over the turns."""
    flat = {}
    for key, value in row.items():
        flat |= {f"{key} {name}": x for name, x in value.items()} if isinstance(value, dict) else {key: value}
    return flat
