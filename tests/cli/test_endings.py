"""How a command ends: signals at any time, readers that go away, terminals that cannot show a text."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from helpers import killed_commands, killed_jobs
from helpers.command import identical, invoke
from helpers.forked import apart, started
from helpers.large_pairs import TINY, arguments, command, written
from theseus_transport.files.result_folder import new_folder

SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a manifest."""
    with new_folder(tmp_path / "out"):
        pass
    return tmp_path / "out"


@pytest.mark.parametrize("number, code", SIGNALS.items())
def test_a_signal_while_the_command_is_imported(number: int, code: int) -> None:
    call = [sys.executable, "-m", "theseus_command", "doctor", "--json"]
    process = subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    status = Path(f"/proc/{process.pid}/status")

    def caught() -> int:
        return int(next(line for line in status.read_text().splitlines() if line.startswith("SigCgt")).split()[1], 16)

    while process.poll() is None and not all(caught() >> (other - 1) & 1 for other in SIGNALS):
        time.sleep(0.001)
    process.send_signal(number)
    told, said = process.communicate()
    assert process.returncode == code and said == "error interrupted; nothing was written\n"
    assert json.loads(told) == {"error": "interrupted; nothing was written", "exit_code": code}


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As processes of their own have: bytes are promised for one thread count."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("number, code", SIGNALS.items())
def test_an_interrupted_command_says_how_to_go_on(number: int, code: int, tmp_path: Path, one_thread: None) -> None:
    """A signal to a process of its own, behind a commit."""
    root = written(tmp_path, TINY, samples=128, length=16)  # 16 passes a block: it is at work when the signal comes
    call = [*arguments(root), "--recipe", "effect", "--tokens", 1024, "--json"]
    journal = root / "..out.update.theseus/journal.json"  # beside the output, until the strength is known
    process = started(command, root, call)
    while process.is_alive() and not (journal.exists() and json.loads(journal.read_text())["step"] > 1):
        time.sleep(0.002)
    os.kill(process.pid, number)
    process.join()
    told, said = ((root / name).read_text() for name in ("stdout", "stderr"))
    assert process.exitcode == code, said
    assert json.loads(told)["exit_code"] == code and "--resume" in json.loads(told)["error"]
    assert "interrupted; run again with --resume to go on after step" in said and "Traceback" not in said
    invoke(*call, "--resume")
    invoke(*arguments(root, "once"), "--recipe", "effect", "--tokens", 1024)
    assert identical(root / "out", root / "once")


def reader_gone() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    os.dup2(writing, 1)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 - a pipe has no position


def closed() -> None:
    os.close(1)
    sys.stdout = None  # as the interpreter has it then


def ascii_only() -> None:
    sys.stdout = open(1, "w", encoding="ascii", closefd=False)  # noqa: SIM115


def full() -> None:
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115


ENDS: dict[str, tuple[Callable[[], None], int, str]] = {
    "reader gone": (reader_gone, 0, ""),
    "closed from the start": (closed, 0, ""),
    "full": (full, 4, "error standard output cannot be written: No space left on device; all else is done\n"),
}


@pytest.mark.parametrize("as_json", [False, True], ids=["table", "json"])
@pytest.mark.parametrize("change, code, said", ENDS.values(), ids=ENDS)
def test_standard_output_that_takes_nothing(
    change: Callable[[], None], code: int, said: str, as_json: bool, folder: Path, tmp_path: Path
) -> None:
    process = started(command, tmp_path, ["inspect", folder, *["--json"] * as_json], change)
    process.join()
    assert (tmp_path / "stderr").read_text() == said and process.exitcode == code


def test_a_terminal_that_cannot_show_a_name(folder: Path, tmp_path: Path) -> None:
    (folder / "größe").touch()
    process = started(command, tmp_path, ["inspect", folder], ascii_only)
    process.join()
    shown = (tmp_path / "stdout").read_text()
    assert "damaged gr\\xf6\\xdfe is not in the manifest" in shown and process.exitcode == 3


@pytest.fixture(scope="module")
def killed_models(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("killed")
    shutil.copytree(models, root, dirs_exist_ok=True)
    apart(killed_jobs.build, root)
    return root


@pytest.mark.parametrize("name", ["transport", "overwrite", "match", "align", "apply", "plan", "verify"])
def test_commands_killed_at_random_moments(name: str, killed_models: Path) -> None:
    """A round of each; ``python tests/helpers/killed_commands.py --rounds 20`` runs more, and the other commands."""
    assert sum(apart(killed_commands.drive, killed_models, name, 1, 0).values()) == 1
