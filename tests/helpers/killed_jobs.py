"""SIGKILL of whole jobs at random moments.

A process of its own forks the jobs (see forked.py). It has one thread; what reads ahead starts in a fork.
"""

import json
import os
import random
import shutil
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import theseus_transport as tt
import torch
from safetensors.torch import save_file
from theseus_transport.errors import AlreadyDone
from theseus_transport.jobs.align_job import AlignSession
from theseus_transport.jobs.settings import AlignJob, Job
from theseus_transport.jobs.transport_job import Session
from transformers.models.llama import modeling_llama  # noqa: F401 - imported before the forks

from helpers import tiny_models

KILLS = 6  # of each case, at least
FULL = {"tuned": "causal/tuned"}
EFFECT, BEHIND = (tt.Recipe("effect", prior=prior) for prior in ("none", "coherent"))
CASES: dict[str, dict[str, Any]] = {
    "full, two alphas": {**FULL, "alpha": (0.5, 1.0)},
    "matched alpha": {**FULL, "alpha": "match"},
    "delta without unchanged tensors": {"tuned": "partly", "output": "delta"},
    "lora": {"tuned": "lora"},
    "align": {},
    "apply": {**FULL, "maps": "maps"},
    "paper": {**FULL, "recipe": tt.Recipe("paper", whiten_power=0.25)},
    "unequal depth": {**FULL, "target": "deep"},
    "rank-poor vocabulary": {**FULL, "calibration": "poor.safetensors"},
    "offload folder": {**FULL, "offload_folder": "offload"},
    "effect": {**FULL, "recipe": EFFECT, "alpha": 1.0},
    "effect, lora behind a prior": {"tuned": "lora", "recipe": BEHIND, "alpha": 1.0},
    "effect at the best strength": {**FULL, "recipe": BEHIND},
    "effect at the best strength, offload folder": {"tuned": "lora", "recipe": EFFECT, "offload_folder": "offload"},
    "effect of applied maps": {**FULL, "recipe": BEHIND, "maps": "maps-of-effect"},
}


def build(root: Path) -> None:
    """What the cases move, beside tiny models."""
    torch.manual_seed(0)
    tiny_models.llama("target", depth=3).save_pretrained(root / "deep")
    save_file({"input_ids": torch.randint(3, 7, (32, 16))}, root / "poor.safetensors")
    partly = tiny_models.LlamaForCausalLM.from_pretrained(root / "causal/source")
    for name, p in partly.named_parameters():
        if "layers.1" in name:
            p.data += 0.02 * torch.randn_like(p)
    partly.save_pretrained(root / "partly")
    AlignSession(job_of(root, root / "maps", {})).run()
    AlignSession(job_of(root, root / "maps-of-effect", {"recipe": BEHIND})).run()


def job_of(root: Path, out: Path, case: dict[str, Any]) -> Job | AlignJob:
    options = {"target": "causal/target", "calibration": "ids.safetensors", **case}
    paths = {name: str(root / value) for name, value in options.items() if name in PATHS}
    known = {"source": str(root / "causal/source"), "out": out, "tokens": 256, "batch_size": 4}
    known |= {"recipe": tt.Recipe("coherent"), **options, **paths}
    if "offload_folder" in known:
        known["offload_folder"] = out.parent / "offload"
    return Job(**known) if "tuned" in case else AlignJob(**known)


PATHS = ("tuned", "target", "calibration", "maps")


def run(job: Job | AlignJob) -> None:
    """As a user who goes on with what a killed process left."""
    left = [path for path in job.out.parent.iterdir() if path != job.offload_folder] if job.out.parent.exists() else []
    job = replace(job, resume=bool(left))
    try:
        (Session(job) if isinstance(job, Job) else AlignSession(job)).run()
    except AlreadyDone:
        assert job.resume


def killed(work: Callable[[], object], after: float = 1e9, *, start: Callable[[], object] = lambda: True) -> bool:
    """Run in a fork and SIGKILL it ``after`` seconds from when ``start`` holds; whether that came before its end."""
    assert len(os.listdir("/proc/self/task")) == 1
    if (child := os.fork()) == 0:
        try:
            torch.set_num_threads(1)  # renews torch's pool: two threads that ask for it at once in a fork find none
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    began, code = 0.0, None
    while code is None and not (began and time.monotonic() >= began + after):
        time.sleep(0.001)
        began = began or (time.monotonic() if start() else 0.0)
        found, status = os.waitpid(child, os.WNOHANG)
        code = os.waitstatus_to_exitcode(status) if found else None
    if code is None:
        os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL), f"the job ended with {code}"
    return code != 0


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def commits(place: Path) -> int:
    """Of the run that lies unfinished there."""
    records = []
    for path in place.glob(".*.theseus/journal.json"):
        with suppress(FileNotFoundError):  # it is done
            records.append(json.loads(path.read_text()))
    return max((record["step"] for record in records), default=0)


def drive(root: Path, name: str) -> dict[str, int]:
    """Runs of a case, each killed at random moments until it comes through, compared with one that never was."""
    draw = random.Random(name)
    place = root / "runs" / "".join(c for c in name if c.isalnum())
    job, found = job_of(root, place / "out", CASES[name]), Counter[str]()
    began = time.monotonic()
    assert not killed(lambda: run(job))
    took, once = time.monotonic() - began, content(place / "out")
    assert any(path.endswith(".safetensors") for path in once)
    while found["kills"] < KILLS:
        shutil.rmtree(place)
        found["through"] += 1
        for number in range(KILLS + 1):  # the last comes through
            before = commits(place)
            if number == KILLS:
                through = not killed(lambda: run(job))
            elif number % 2:  # soon after a commit
                later = lambda before=before: commits(place) > before  # noqa: E731
                through = not killed(lambda: run(job), draw.uniform(0, 0.1 * took), start=later)
            else:
                through = not killed(lambda: run(job), draw.uniform(0, took))
            if through:
                break
            found["kills"] += 1
            found["behind a commit"] += commits(place) > 0
        now = content(place / "out")
        different = [path for path in once.keys() | now.keys() if once.get(path) != now.get(path)]
        assert not different, f"{name}: {sorted(different)} after {found['kills']} kills"
        left = [path for path in place.rglob("*") if path.is_file() and not path.is_relative_to(place / "out")]
        assert not left, f"{name} left {left}"
    return found
