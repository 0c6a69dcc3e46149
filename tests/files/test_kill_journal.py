"""SIGKILL at every step of a resumable run, and of its resumes; see test_kill.py."""

import itertools
import os
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from helpers.forked import apart
from helpers.three_steps import OLD, content, loop, names
from test_kill import killed
from theseus_transport.errors import AlreadyDone
from theseus_transport.files.checkpoint import Checkpoint
from theseus_transport.files.result_folder import differences
from theseus_transport.files.writer import Output, Planned, write_checkpoints


def go_on(out: Path) -> None:
    """What a user does after a kill."""
    try:
        loop(out).run(resume=True, overwrite=True, shard_size=200)
    except AlreadyDone:
        return


def state_of(out: Path, new: dict[str, bytes]) -> str:
    """What a killed run left under its name: for each folder the old one, the new one or, between two renames, none."""
    found = set()
    for i in range(2):
        folder = out / f"alpha-{i}"
        if not folder.exists():
            (aside,) = out.glob(f".alpha-{i}.old-*")
            assert differences(aside) == [] and list(Checkpoint.open(aside)) == ["old"]
            found.add("absent")
            continue
        assert differences(folder) == [], folder
        expected = {name: data for name, data in new.items() if name.startswith(folder.name)}
        mine = {f"{folder.name}/{name}": data for name, data in content(folder).items()}
        found.add("new" if mine == expected else "old" if list(Checkpoint.open(folder)) == ["old"] else "torn")
    return "+".join(sorted(found))


def drive(root: Path) -> dict[str, int]:
    """Kill runs that overwrite old folders, at every step once and again and again at random; what was found."""
    os.fsync = lambda descriptor: None  # what a killed process has written the system still has
    loop(root / "straight/out").run(shard_size=200)
    new = content(root / "straight/out")
    found: Counter = Counter()
    generator = random.Random(0)

    def trial(number: int, steps: Iterator[int]) -> bool:
        """Whether the first of the runs got killed."""
        out = root / str(number) / "out"
        old = [Planned("old", (4,), torch.float32, lambda rows: OLD["old"])]
        write_checkpoints([Output(out / f"alpha-{i}", old) for i in range(2)])
        hit = False
        for i, step in enumerate(steps):
            if not killed(lambda: go_on(out), step=step):
                break
            hit = True
            found[state_of(out, new)] += 1
            assert i < 50, "the runs get nowhere"
        go_on(out)
        assert content(out) == new
        assert names(out.parent) == {"out"}, "nothing is left over"
        return hit

    first = next(number for number in itertools.count() if not trial(number, iter([number])))
    for number in range(RANDOM):
        trial(first + 1 + number, (generator.randrange(first) for _ in itertools.count()))
    return {**found, "steps": first}


RANDOM = 8  # runs killed at random steps, and their resumes again until one comes through


def test_killed_at_every_step(tmp_path: Path) -> None:
    found = apart(drive, tmp_path)
    assert found["steps"] > 50 and found["old"] > found["steps"] / 2, found
    assert all(found.get(state) for state in ("old", "new", "absent+old", "absent+new", "new+old")), found
