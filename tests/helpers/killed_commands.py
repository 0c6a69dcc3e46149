"""Commands killed by signals at random moments, and what they leave.

More of them: ``PYTHONPATH=tests python -m helpers.killed_commands --rounds 20``.

After every kill there is what was there before, or a run to resume, or the whole result; after an interrupt nothing
lies about that its message does not name; and the same command with --resume then ends whole, with the bytes of one
that nobody disturbed.
"""

import argparse
import os
import random
import re
import shutil
import signal
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import theseus_command
import torch
from theseus_transport.demo import results as demo

from helpers import killed_jobs, tiny_models
from helpers.large_pairs import command

CODES = {signal.SIGKILL: -9, signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
MODELS = ("{root}/causal/source", "{root}/causal/tuned", "{root}/causal/target")
DATA = ("--calibration", "{root}/ids.safetensors", "--tokens", "256", "--batch-size", "4")
MADE = {  # command -> what it writes is {out}
    "transport": ("transport", *MODELS, "{out}", *DATA, "--offload-folder", "{place}/offload"),
    "overwrite": ("transport", *MODELS, "{out}", *DATA, "--alpha", "0.5,2", "--overwrite"),
    "match": ("transport", *MODELS, "{out}", *DATA, "--alpha", "match"),
    "align": ("align", MODELS[0], MODELS[2], "{out}", *DATA),
    "apply": ("apply", "{root}/maps", MODELS[1], "{out}"),
    "demo": ("demo", "--out", "{out}"),
}
READ = {
    "plan": ("plan", *MODELS, "{out}", *DATA),
    "dry run": ("transport", *MODELS, "{out}", *DATA, "--dry-run"),
    "inspect": ("inspect", "{root}/maps"),
    "verify": ("verify", "{root}/maps"),
    "doctor": ("doctor",),
}


def run(arguments: list[str], place: Path, number: int = 0, after: float = 0.0) -> tuple[int, float, str]:
    """A command in a fork, sent a signal ``after`` seconds; its exit code, how long it took, and what it said."""
    ready, told = os.pipe()
    log = Path(tempfile.mkdtemp())
    if (child := os.fork()) == 0:
        for caught in theseus_command.STOPPING:
            signal.signal(caught, theseus_command._leave)  # from here on it is the command
        os.write(told, b".")
        demo.DemoSettings = lambda seeds: QUICK  # type: ignore[assignment,misc]
        torch.set_num_threads(1)  # as killed_jobs.killed does
        try:
            command(log, [*arguments], theseus_command.main)
        except SystemExit as end:
            os._exit(end.code if isinstance(end.code, int) else 0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.read(ready, 1)
    os.close(ready), os.close(told)
    began, code = time.monotonic(), None
    while code is None and not (number and time.monotonic() >= began + after):
        time.sleep(0.001)
        found, status = os.waitpid(child, os.WNOHANG)
        code = os.waitstatus_to_exitcode(status) if found else None
    if code is None:
        os.kill(child, number)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    said = (log / "stderr").read_text() if (log / "stderr").exists() else ""
    shutil.rmtree(log)
    return code, time.monotonic() - began, said


QUICK = demo.DemoSettings.quick()


def lying(place: Path) -> set[Path]:
    """What lies beside the output, and in an offload folder."""
    found = set(place.iterdir()) - {place / "out", place / "offload"}
    return found | (set((place / "offload").iterdir()) if (place / "offload").exists() else set())


def drive(root: Path, name: str, rounds: int, seed: int) -> dict[str, int]:
    """Rounds of kills of one command; what they left, counted."""
    draw, place, found = random.Random(f"{name} {seed}"), root / "killed" / name.replace(" ", ""), Counter[str]()
    known = {"root": root, "place": place, "out": place / "out"}
    arguments = [argument.format(**known) for argument in (MADE | READ)[name]]
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    code, took, said = run(arguments, place)
    assert code == 0 and not lying(place), f"{name}: {code} {said} {lying(place)}"
    whole, again = killed_jobs.content(place / "out"), [*arguments, *["--resume"] * (name in MADE and name != "demo")]
    old = whole if name == "overwrite" else {}
    for _ in range(rounds):
        if name != "overwrite":
            shutil.rmtree(place)
            place.mkdir()
        number = draw.choice([*CODES])
        code, _, said = run(arguments, place, number, took * draw.choice((draw.uniform(0, 1), draw.uniform(0.6, 1))))
        assert code in (0, CODES[signal.Signals(number)]), f"{name}: {signal.Signals(number).name} gave {code}: {said}"
        assert "Traceback" not in said, said
        left, now = lying(place), killed_jobs.content(place / "out")
        assert now in ({}, old, whole) or name in ("overwrite", "demo"), f"{name}: torn after {code}"
        if code > 0:
            unnamed = [path for path in left if str(path) not in said]
            assert not unnamed, f"{name}: {said} names not {unnamed}"
            assert left or now == whole or "nothing was written" in said, said
            assert not re.search("nothing was written", said) or now == old, f"{name}: {said} is not so"
        assert name in MADE or not (left or now), f"{name} left {left}"
        found["whole" if code == 0 else "resumable" if left else "as before"] += 1
        code, _, said = run(again, place)
        assert code == 0, f"{name}: --resume gave {code}: {said}"
        assert not lying(place), f"{name} left {lying(place)}"
        different = [path for path, data in whole.items() if killed_jobs.content(place / "out").get(path) != data]
        assert not different or name == "demo", f"{name}: {different}"
    return found


def build(root: Path) -> Path:
    tiny_models.build(root)
    killed_jobs.build(root)
    return root


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=[*MADE, *READ])
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder))
        for name in [chosen.only] if chosen.only else [*MADE, *READ]:
            print(name, dict(drive(Path(folder), name, chosen.rounds, chosen.seed)), flush=True)


if __name__ == "__main__":
    main()
