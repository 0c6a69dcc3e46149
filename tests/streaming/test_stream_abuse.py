"""The command under abuse: killed, with inputs that break under it, on a full disk, and interrupted."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import theseus_transport as tt
import torch
from helpers import killed_jobs
from helpers.command import identical, invoke, refused
from helpers.forked import apart
from helpers.large_pairs import COMMIT, TINY, arguments, job_of, written
from safetensors.torch import save_file
from theseus_transport.files.journal import Work
from theseus_transport.jobs.transport_job import Session
from theseus_transport.streaming import passage as passage_module


@pytest.fixture
def root(tmp_path):
    return written(tmp_path, TINY, samples=16, length=16)


def after_commit(monkeypatch, number: int, act) -> None:
    """``act`` once that many commits are done."""

    def commit(passage, loop):
        COMMIT(passage, loop)
        if passage.work.step == number:
            act()

    monkeypatch.setattr(passage_module.Passage, "_commit", commit)


def stop() -> None:
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def killed_models(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("killed")
    shutil.copytree(models, root, dirs_exist_ok=True)
    apart(killed_jobs.build, root)
    return root


@pytest.mark.parametrize("name", killed_jobs.CASES)
def test_killed_at_random_moments(name: str, killed_models: Path) -> None:
    """It goes on from every kill to the bytes of a run that was never killed."""
    found = apart(killed_jobs.drive, killed_models, name)
    assert found["kills"] >= killed_jobs.KILLS and found["behind a commit"] > 0, found


# --- inputs that break ------------------------------------------------------------------------------------------------
SHARD = "model-00002-of-*.safetensors"  # the second block's
BREAKS = {
    "truncated": (lambda path: os.truncate(path, path.stat().st_size // 2), "the file of now|the file changed"),
    "vanished": (Path.unlink, "No such file"),
    "changed": (lambda path: path.write_bytes(path.read_bytes()), "the file changed"),
}


@pytest.mark.parametrize("how", BREAKS)
@pytest.mark.parametrize("side", ["source", "tuned", "target"])
def test_a_shard_that_breaks_in_the_middle(how, side, root, monkeypatch):
    """Named with its tensor and exit 4; what was done is kept, and goes on once the file is as it was."""
    Session(job_of(root, "once")).run()
    act, said = BREAKS[how]
    (path,), whole = (root / side).glob(SHARD), root / "whole"
    shutil.copy2(path, whole)
    with monkeypatch.context() as patched:
        after_commit(patched, 1, lambda: act(path))
        refused(rf"{side}/{path.name}: 'model.layers.1.*({said}).*--resume", *arguments(root), code=4)
    work = root / ".out.theseus"
    before = json.loads((work / "journal.json").read_text())["step"]
    assert before >= 1 and not (root / "out").exists()
    refused(path.name, *arguments(root), "--resume", code=3)
    assert json.loads((work / "journal.json").read_text())["step"] == before, "a refused resume changes nothing"
    shutil.copy2(whole, path)
    invoke(*arguments(root), "--resume")
    assert identical(root / "out", root / "once") and not work.exists()


@pytest.mark.parametrize("side", ["source", "tuned", "target"])
def test_a_shard_changed_between_runs_is_refused_by_name(side, root, monkeypatch):
    after_commit(monkeypatch, 2, stop)
    with pytest.raises(KeyboardInterrupt):
        Session(job_of(root)).run()
    (path,) = (root / side).glob(SHARD)
    path.write_bytes(path.read_bytes())
    refused(f"{side.upper()} {path.name} time of change", *arguments(root), "--resume")
    assert (root / ".out.theseus/journal.json").exists()


CHANGES = {
    "recipe": ({"recipe": tt.Recipe("paper")}, "recipe name"),
    "field of the recipe": ({"recipe": tt.Recipe("coherent", embeddings="leave")}, "recipe embeddings|other tensors"),
    "alpha": ({"alpha": 0.5}, "alphas"),
    "tokens": ({"tokens": 128}, "tokens"),
    "batch size": ({"batch_size": 2}, "batch size"),
    "held out": ({"held_out": False}, "held_out"),
    "leave": ({"leave": ("*down_proj*",)}, "leave"),
    "dtype": ({"out_dtype": "bfloat16"}, "out_dtype"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_option_is_refused_by_name(name, root, monkeypatch):
    options, said = CHANGES[name]
    after_commit(monkeypatch, 2, stop)
    with pytest.raises(KeyboardInterrupt):
        Session(job_of(root)).run()
    with pytest.raises(tt.InputRefused, match=rf"begun otherwise: .*({said})"):
        Session(job_of(root, resume=True, **options)).run()


def test_another_calibration_is_refused_by_name(root, monkeypatch):
    """The file of the same name holds other tokens."""
    after_commit(monkeypatch, 2, stop)
    with pytest.raises(KeyboardInterrupt):
        Session(job_of(root)).run()
    save_file({"input_ids": torch.randint(0, 300, (16, 16))}, root / "ids.safetensors")
    with pytest.raises(tt.InputRefused, match="begun otherwise: calibration is"):
        Session(job_of(root, resume=True)).run()


def test_other_maps_are_refused_by_name(root, monkeypatch):
    """An alignment made anew under the name of the one that a run had begun to apply."""
    common = arguments(root)[4:]
    align = ("align", root / "source", root / "target", root / "maps", *common[1:])
    invoke(*align)
    commit = Work.commit

    def interrupted(work, *state):
        commit(work, *state)
        raise KeyboardInterrupt

    apply = ("apply", root / "maps", root / "tuned", root / "out")
    with monkeypatch.context() as patched:
        patched.setattr(Work, "commit", interrupted)
        refused("--resume", *apply, code=130)
    invoke(*align, "--overwrite", "--floor", "1e-3")
    refused("begun otherwise: MAPS", *apply, "--resume")


# --- disks and interrupts ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["staged-0", "hidden", "state-", "journal.json", "offload"])
def test_a_full_disk_in_the_middle(kind, root, monkeypatch):
    """Whatever is being written: exit 4, the last commit stays, and goes on when there is room."""
    Session(job_of(root, "once")).run()
    more = ("--offload-folder", root / "offload") if kind == "offload" else ()
    opened = open

    class Full:
        """A file on a full disk."""

        def __init__(self, file):
            self.file = file

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def write(self, content):
            self.file.write(content[: len(content) // 2])
            self.file.flush()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def limited(path, mode="r", *rest, **options):
        file, path = opened(path, mode, *rest, **options), Path(path)
        full = kind in str(path.relative_to(root)) if path.is_relative_to(root) else False
        return Full(file) if full and set(mode) & set("wa+x") else file

    def fill():
        patched.setattr(Path, "open", limited)
        patched.setattr("builtins.open", limited)

    with monkeypatch.context() as patched:
        after_commit(patched, 2, fill)
        where = {"offload": "offload/theseus-.*", "hidden": r"\.out\.theseus/hidden"}.get(kind, "out")
        refused(f"{where}: disk full.*--resume", *arguments(root), *more, code=4)
    step = json.loads((root / ".out.theseus/journal.json").read_text())["step"]
    assert step == 2
    invoke(*arguments(root), *more, "--resume")
    assert identical(root / "out", root / "once") and not (root / ".out.theseus").exists()
