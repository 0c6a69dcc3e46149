"""However a run is carried out, it writes the same; and a plan knows what of it a job will need."""

import re
from dataclasses import replace

import pytest
import theseus_transport as tt
import torch
from helpers.command import held, identical
from helpers.large_pairs import MIDDLE, TINY, job_of, written
from random_checkpoint import write_adapter, write_random
from theseus_transport.files import result_folder as folder_module
from theseus_transport.jobs.align_job import AlignSession
from theseus_transport.jobs.transport_job import Session
from theseus_transport.streaming.hidden_states import Hidden, own_folder
from theseus_transport.streaming.passage import Passage

SHAPE = {"samples": 14, "length": 16}  # of the calibration: more tokens than the widest space has features


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = written(tmp_path_factory.mktemp("models"), TINY, **SHAPE)
    write_random(root / "deeper", replace(TINY[1], num_hidden_layers=4), seed=2, dtype=torch.float32)
    return root


def carried_out(job, **choice):
    """The outcome of a job whose plan is changed so."""
    session = Session(job)
    plan = replace(session.plan, choice=replace(session.plan.choice, **choice))
    session.fitted = replace(session.fitted, plan=plan)
    return session.run()


JOBS = {
    "as asked": {},
    "depths that differ": {"target": "deeper"},
    "completed": {"recipe": tt.Recipe("coherent", null="completed")},
    "paper": {"recipe": tt.Recipe("paper", whiten_power=0.25)},
}


@pytest.mark.parametrize("name", JOBS)
def test_halves_and_files_change_no_byte(name, root, tmp_path):
    """Also in the passes before the loop."""
    options = dict(JOBS[name])
    target = str(root / options.pop("target", "target"))
    once = replace(job_of(root, tmp_path / "once", **options), target=target)
    plain = Session(once).run()
    halves = replace(once, out=tmp_path / "halves", offload_folder=tmp_path / "offload")
    outcome = carried_out(halves, halves=True)
    assert identical(once.out, halves.out) and outcome.maps == plain.maps
    assert "hidden states in files" in outcome.plan and "attention and MLP one after the other" in outcome.plan
    assert not [path for path in (tmp_path / "offload").rglob("*") if path.is_file()]


def test_passes_before_the_loop_keep_hidden_states_in_files(root, tmp_path, monkeypatch):
    """All that is put away is put into files of the folder that was named, in every pass."""
    begun, begin = [], Hidden.__init__

    def noted(self, folder, name, *, resident):
        begun.append((tmp_path / "offload" in folder.parents, resident))
        begin(self, folder, name, resident=resident)

    monkeypatch.setattr(Hidden, "__init__", noted)
    job = job_of(
        root, tmp_path / "out", recipe=tt.Recipe("coherent", null="completed"), offload_folder=tmp_path / "offload"
    )
    Session(replace(job, target=str(root / "deeper"))).run()
    assert set(begun) == {(True, False)}
    assert len(begun) > 6  # of both models: pairing of blocks, the sum over depth, the loop, and all beside it


def test_what_a_killed_pass_left_goes_with_the_next_run(root, tmp_path):
    """Its files lie in the folder that the same job takes again."""
    job = job_of(root, tmp_path / "out", offload_folder=tmp_path / "offload", alpha=1.0)
    left = own_folder(job.offload_folder, job.out) / "before"
    left.mkdir(parents=True)
    (left / "alone-3.bin").write_bytes(b"hidden states")
    Session(replace(job, target=str(root / "deeper"))).run()
    assert list(job.offload_folder.iterdir()) == []


@pytest.mark.parametrize("choice", [{"polar": "cpu"}, {"polar": "cpu", "tiles": 2}], ids=["maps", "tiles"])
def test_the_choices_of_a_gpu_carried_out_on_the_cpu(choice, root, tmp_path):
    """Maps made on the CPU are the same; moments by tiles are added up in another order."""
    once = job_of(root, tmp_path / "once")
    Session(once).run()
    job = replace(once, out=tmp_path / "out")
    outcome = carried_out(job, **choice)
    assert "maps made on the CPU" in outcome.plan and ("moments in 2 passes" in outcome.plan) is ("tiles" in choice)
    if "tiles" not in choice:
        assert identical(once.out, job.out)
    ours, theirs, base = held(job.out), held(once.out), held(root / "target")
    for name, tensor in ours.items():
        change = (theirs[name] - base[name]).norm()
        assert (tensor - theirs[name]).norm() <= 1e-4 * change, name


@pytest.mark.parametrize("folders", [("first", None), (None, "second"), ("first", "second")])
def test_hidden_states_are_found_where_the_run_began(folders, root, tmp_path, monkeypatch):
    """Whatever --offload-folder the run that goes on is given."""
    before, after = (folder and tmp_path / folder for folder in folders)
    once, job = job_of(root, tmp_path / "once"), job_of(root, tmp_path / "out", offload_folder=before)
    Session(once).run()
    commit = Passage._commit

    def interrupted(self, loop):
        commit(self, loop)
        if self.work.step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Passage, "_commit", interrupted)
        Session(job).run()
    Session(replace(job, offload_folder=after, resume=True)).run()
    assert identical(once.out, job.out)
    for folder in (before, after):
        assert folder is None or not [path for path in folder.rglob("*") if path.is_file()]


def test_a_plan_counts_the_maps_that_an_adapter_needs(tmp_path):
    """On q and v alone no middle of an MLP is compared: the least memory is far less, and it does."""
    root = written(tmp_path, MIDDLE, samples=9, length=16)
    for name, only in (("few", ("q_proj", "v_proj")), ("all", ())):
        write_adapter(root / name, MIDDLE[0], 8, **({"only": only} if only else {}))
    jobs = {
        name: replace(job_of(root, name), tuned=str(root / name), out=tmp_path / f"out-{name}")
        for name in ("few", "all")
    }
    plans = {name: Session(job).plan for name, job in jobs.items()}
    widest = 8 * MIDDLE[0].intermediate_size * MIDDLE[1].intermediate_size
    assert plans["all"].host["maps"] - plans["few"].host["maps"] > widest
    with pytest.raises(tt.ResourceError) as refusal:
        Session(replace(jobs["few"], max_ram=1 << 20))
    least = int(re.search(r"and (\d+)MiB is the least", str(refusal.value))[1]) << 20
    outcome = Session(replace(jobs["few"], max_ram=least)).run()
    assert not [row["space"] for row in outcome.maps if row["space"].endswith(".middle")]


def test_a_plan_counts_the_samples_there_are(root, tmp_path):
    """Ready tensors that hold fewer tokens than are wanted."""
    there = SHAPE["samples"] * SHAPE["length"]
    plans = [Session(job_of(root, tmp_path / "out", tokens=tokens)).plan for tokens in (there, 1000 * there)]
    assert plans[0].host == plans[1].host
    assert Session(job_of(root, tmp_path / "out", tokens=there // 2)).plan.peak < plans[0].peak


@pytest.mark.parametrize("what", ["align", "delta", "match", "checkpoint"])
def test_room_is_checked_for_what_is_copied_at_the_end(what, root, tmp_path, monkeypatch):
    """Optional tensors are left out by a copy; with a matched strength all maps lie beside the output."""
    options = {"delta": {"output": "delta"}, "match": {"alpha": "match"}}.get(what, {})
    job = job_of(root, tmp_path / "out", **options)
    session, maps = Session(job), AlignSession(replace(job.alignment, out=tmp_path / "maps")).bases.bytes_of_maps
    needed = {"align": 2 * maps, "delta": 2 * session.prepared.bytes_out, "checkpoint": session.prepared.bytes_out}
    needed["match"] = max(2 * maps, maps + session.prepared.bytes_out)
    usage = folder_module.shutil.disk_usage("/")
    opened = (lambda: AlignSession(job.alignment)) if what == "align" else lambda: Session(job)
    for free, enough in ((needed[what] - 1, False), (4 * needed[what], True)):
        monkeypatch.setattr(folder_module.shutil, "disk_usage", lambda path, free=free: usage._replace(free=free))
        if enough:
            opened()
        else:
            with pytest.raises(tt.ResourceError, match="free"):
                opened()
