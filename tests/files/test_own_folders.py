"""Folders that a run makes for itself: of this user alone, never through a link, never removed on a journal's word."""

import json
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch
from theseus_transport.errors import InputRefused, ResourceError
from theseus_transport.files.result_folder import make_private, refuse_foreign
from theseus_transport.files.run_record import signed
from theseus_transport.jobs.settings import Job
from theseus_transport.jobs.transport_job import Session
from theseus_transport.recipes.recipe import Recipe
from theseus_transport.streaming.hidden_states import Hidden, own_folder, temporary
from theseus_transport.streaming.passage import Passage

OPTIONS = {"tokens": 64, "batch_size": 4, "recipe": Recipe("coherent")}  # one step, whose folder lies beside the output


def job_of(models: Path, out: Path, **options: object) -> Job:
    places = (str(models / name) for name in ("causal/source", "lora", "causal/target"))
    return Job(*places, out, str(models / "ids.safetensors"), **{**OPTIONS, **options})


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A folder that nothing here may touch."""
    folder = tmp_path / "victim"
    (folder / "before").mkdir(parents=True)
    (folder / "before" / "kept").write_text("kept")
    return folder


def kept(victim: Path) -> bool:
    return [str(p.relative_to(victim)) for p in sorted(victim.rglob("*"))] == ["before", "before/kept"]


def test_a_private_folder_is_made_for_this_user_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        make_private(tmp_path / "a" / "b")
    finally:
        os.umask(before)
    make_private(tmp_path / "a" / "b")
    assert stat.S_IMODE((tmp_path / "a" / "b").stat().st_mode) == 0o700


def test_what_is_no_folder_of_ours_is_refused(tmp_path: Path, victim: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "link").symlink_to(victim)
    (tmp_path / "file").write_text("")
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    for name in ("link", "file", "open"):
        with pytest.raises(InputRefused, match=f"{name} is in the way and no folder of yours alone; remove it first"):
            make_private(tmp_path / name)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(InputRefused, match="no folder of yours alone"):
        refuse_foreign(victim)


def test_an_offload_folder_is_not_followed(models: Path, tmp_path: Path, victim: Path) -> None:
    job = job_of(models, tmp_path / "out", offload_folder=tmp_path / "offload")
    (tmp_path / "offload").mkdir()
    own = own_folder(tmp_path / "offload", job.out)
    own.symlink_to(victim)
    with pytest.raises(InputRefused, match="is in the way"), temporary(own):
        pass
    with pytest.raises(InputRefused, match="is in the way"):
        Session(job).run()
    assert kept(victim) and not job.out.exists()


def test_hidden_states_go_through_no_link(tmp_path: Path, victim: Path) -> None:
    make_private(tmp_path / "own")
    (tmp_path / "own" / "source-0.bin").symlink_to(victim / "before" / "kept")
    with pytest.raises(InputRefused, match="source-0.bin is no file of this run"):
        Hidden(tmp_path / "own", "source", resident=False).append(torch.zeros(1, 2, 3))
    assert (victim / "before" / "kept").read_text() == "kept"


def test_a_journal_cannot_have_a_folder_removed(
    models: Path, tmp_path: Path, victim: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of(models, tmp_path / "out")
    with monkeypatch.context() as patched:
        patched.setattr(Passage, "_measure", lambda self, seen: interrupt(self.work.step))
        with pytest.raises(KeyboardInterrupt):
            Session(job).run()
    journal = tmp_path / ".out.theseus" / "journal.json"
    assert stat.S_IMODE(journal.parent.stat().st_mode) == 0o700
    record = json.loads(journal.read_text())
    record["state"]["folder"] = str(victim)
    journal.write_text(json.dumps(signed(record)))
    with pytest.raises(InputRefused, match="keeps its files in .*victim, which is not its own; remove it"):
        Session(job_of(models, tmp_path / "out", resume=True)).run()
    assert kept(victim)


def interrupt(step: int) -> None:
    if step:
        raise KeyboardInterrupt


@pytest.mark.parametrize("recipe, place", [("coherent", ".out.maps"), ("effect", ".out.update")])
def test_a_first_step_beside_the_output_is_not_followed(
    models: Path, tmp_path: Path, victim: Path, recipe: str, place: str
) -> None:
    (tmp_path / place).symlink_to(victim)
    with pytest.raises(InputRefused, match="is in the way"):
        Session(job_of(models, tmp_path / "out", alpha="match", recipe=Recipe(recipe))).run()
    assert kept(victim)


def test_an_offload_folder_is_looked_at_before_the_work(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may not lie in what is read, nor in what is written and gets its name by a rename; and it has to have room."""
    out = tmp_path / "out"
    for place in (models / "causal/source", models / "lora/new", out, out / "deep", tmp_path / ".out.theseus/x"):
        with pytest.raises(InputRefused, match=f"--offload-folder {place} lies in .*; name a folder outside of it"):
            Session(job_of(models, out, offload_folder=place))
    (tmp_path / "file").touch()
    with pytest.raises(InputRefused, match="file may not be written; name another"):
        Session(job_of(models, out, offload_folder=tmp_path / "file"))
    usage, small = shutil.disk_usage(tmp_path), tmp_path / "small"
    small.mkdir()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=99) if path == small else usage)
    with pytest.raises(ResourceError, match=r"is to hold \d+ bytes of hidden states, .* has 99 free; free some, or"):
        Session(job_of(models, out, offload_folder=small))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "small"]
