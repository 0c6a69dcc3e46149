"""SIGKILL at every step of a write, and at random moments: a folder is the old one, the new one or absent, never torn.

A process of its own forks the writers: they start with all imports done, and no thread of the test run is copied.
"""

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
import theseus_transport as tt
import torch
from helpers import tiny_models
from helpers.forked import apart
from theseus_transport.files.checkpoint import Checkpoint
from theseus_transport.files.result_folder import differences, read_manifest
from theseus_transport.files.writer import Planned, write_checkpoint
from theseus_transport.updates.adapter import Adapter

KINDS = ("checkpoint", "adapter", "alignment")
RANDOM = 8  # writers killed at random moments
NEAR = 6  # steps before and after those of another write that are tried
FACTORS = {f"base_model.model.layers.0.q_proj.lora_{part}.weight": torch.ones(4, 4) for part in "AB"}
CONFIG = json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8})


def writer(kind: str) -> Callable[[Path, int], object]:
    """write(folder, version), over what is there."""
    if kind == "alignment":
        torch.manual_seed(0)
        alignment = tt.align(
            tiny_models.vit("source"), tiny_models.vit("target"), [{"pixel_values": torch.randn(30, 3, 8, 8)}]
        )

        def write(folder: Path, version: int) -> None:
            alignment.save(folder, metadata={"version": version}, overwrite=True)

        return write
    tensors = FACTORS if kind == "adapter" else {f"t{i}": torch.ones(5) for i in range(4)}
    files = {"adapter_config.json": CONFIG} if kind == "adapter" else {"config.json": "{}"}
    stem = "adapter_model" if kind == "adapter" else "model"

    def write_tensors(folder: Path, version: int) -> None:
        entries = [Planned(n, t.shape, t.dtype, lambda rows, t=t: t * version) for n, t in tensors.items()]
        options = {"files": files, "metadata": {"version": version}, "overwrite": True}
        write_checkpoint(folder, entries, stem=stem, shard_size=40, **options)

    return write_tensors


def version(kind: str, folder: Path) -> int:
    """Of a folder that is whole and opens."""
    assert differences(folder) == [], folder
    written = read_manifest(folder)["metadata"]["version"]
    if kind == "alignment":
        assert tt.Alignment.load(folder).maps
        return written
    opened = Checkpoint.open(folder)
    if kind == "adapter":
        assert Adapter.of(opened).factors("layers.0.q_proj").scaling == 2
    assert len(opened) in (2, 4) and all(bool((opened[name] == written).all()) for name in opened)
    return written


def killed(work: Callable[[], None], *, step: int | None = None, after: float = 0.0) -> bool:
    """Run in a fork; SIGKILL before its ``step``-th call that may touch a file, or ``after`` seconds into it."""
    ready, told = os.pipe()
    if (child := os.fork()) == 0:
        calls, sync = count(), os.fsync

        def watch(event: str, *_: object) -> None:
            if event.startswith(("open", "os.", "shutil.")) and next(calls) == step:
                os.kill(os.getpid(), signal.SIGKILL)

        os.write(told, b".")
        if step is not None:
            sys.addaudithook(watch)
            os.fsync = lambda file: (watch("os.fsync"), sync(file))[1]
        try:
            work()
        finally:
            os._exit(0 if sys.exc_info()[0] is None else 1)
    os.read(ready, 1)
    os.close(ready), os.close(told)
    if step is None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL), code
    return code != 0


def inspect(kind: str, place: Path) -> tuple[str, int]:
    """Whether a killed writer left ``out`` in place or absent, and of what version the folder then is that lies whole
    there or, between two renames, beside.
    """
    out = place / "out"
    hidden = {path for path in place.iterdir() if path.name.startswith((".out.tmp-", ".out.old-"))}
    assert {path.name for path in set(place.iterdir()) - hidden} <= {"out"}
    if out.exists():
        return "in place", version(kind, out)
    (aside,) = (path for path in hidden if ".old-" in path.name)
    return "absent", version(kind, aside)


def drive(kind: str, root: Path) -> dict[str, int]:
    """Kill writers of version 2 at every step; then of 2, 3, ... around the renames to 3, and at random moments."""
    write, generator, found, folders = writer(kind), random.Random(0), Counter(), count()

    def trial(work: Callable[[Path], object], **moment: float) -> tuple[bool, str, int]:
        """Whether the writer was killed before it was done, and what it left in place of version 1."""
        out = root / str(next(folders)) / "out"
        write(out, 1)
        early = killed(lambda: work(out), **moment)
        place, left = inspect(kind, out.parent)
        write(out, 10**6)
        assert version(kind, out) == 10**6, "what is left over stands in nobody's way"
        return early, place, left

    def again(out: Path) -> None:
        for later in count(2):
            write(out, later)

    renamed = 0
    for step in count():
        early, place, left = trial(lambda out: write(out, 2), step=step)
        if not early:
            assert (place, left) == ("in place", 2)
            break
        assert left == 1 or (place, left) == ("in place", 2)
        found["absent" if place == "absent" else "old" if left == 1 else "new"] += 1
        renamed = step if place == "absent" else renamed
    found["steps"] = steps = step  # the writer needed no more
    for step in range(steps + renamed - NEAR, steps + renamed + NEAR):
        _, place, left = trial(again, step=step)
        found[f"{left} {place}"] += 1
    for _ in range(RANDOM):
        assert trial(again, after=generator.uniform(0, 0.05))[0]
        found["random"] += 1
    return dict(found)


@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_every_step(kind: str, tmp_path: Path) -> None:
    found = apart(drive, kind, tmp_path)
    assert found["steps"] > 20 and found["random"] == RANDOM, found
    assert all(found.get(state) for state in ("old", "new", "absent", "2 in place", "2 absent", "3 in place")), found
