"""Jobs through the block loop: the bytes of whole models, and on from every interruption."""

import json
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import theseus_transport as tt
import torch
from helpers import tiny_models
from helpers.command import held, identical
from helpers.whole_models import of_whole_models
from safetensors.torch import save_file
from theseus_transport.alignment.alignment import Alignment
from theseus_transport.files.journal import Work
from theseus_transport.jobs.align_job import AlignSession
from theseus_transport.jobs.settings import AlignJob, Job
from theseus_transport.jobs.transport_job import Session
from theseus_transport.streaming import passage as passage_module


@pytest.fixture(scope="module")
def root(models, tmp_path_factory):
    """With a target of a block more, and one whose head is much the source's."""
    root = tmp_path_factory.mktemp("models") / "with-deep"
    shutil.copytree(models, root)
    torch.manual_seed(3)
    tiny_models.llama("target", depth=3).save_pretrained(root / "deep")
    tiny_models.tuned(tiny_models.LlamaForCausalLM.from_pretrained(root / "causal/source")).save_pretrained(
        root / "near"
    )
    return root


def job_of(root, tmp_path, tuned, **options):
    folders = (str(root / name) for name in ("causal/source", tuned, options.pop("target", "causal/target")))
    options = {"recipe": tt.Recipe("coherent"), "tokens": 256, "batch_size": 4, **options}
    return Job(*folders, tmp_path / "out", str(root / "ids.safetensors"), **options)


def effect(prior, alpha=1.0, **choices):
    return {"recipe": tt.Recipe("effect", prior=prior, **choices), "alpha": alpha}


CASES = {
    "full": ("causal/tuned", "checkpoint", {}),
    "full, paper": ("causal/tuned", "checkpoint", {"recipe": tt.Recipe("paper", whiten_power=0.25)}),
    "delta, least squares": (
        "causal/tuned",
        "delta",
        {"output": "delta", "recipe": tt.Recipe("coherent", scale="regression")},
    ),
    "lora": ("lora", "adapter", {}),
    "lora on few": ("patterns", "adapter", {}),
    "lora into a checkpoint": ("lora", "checkpoint", {"output": "checkpoint"}),
    "completed": ("causal/tuned", "checkpoint", {"recipe": tt.Recipe("coherent", null="completed")}),
    "effect": ("causal/tuned", "checkpoint", effect("none")),
    "effect behind a prior": ("causal/tuned", "delta", {"output": "delta", **effect("coherent")}),
    "effect, lora": ("lora", "adapter", effect("none")),
    "effect behind a prior, lora": ("lora", "adapter", effect("coherent")),
    "effect, its penalty chosen": ("lora", "adapter", effect("none", ridge=0)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_job_writes_what_whole_models_give(name, root, tmp_path):
    """The same bytes, whether hidden states lie in files, and blocks are read ahead, or not."""
    tuned, kind, options = CASES[name]
    job = job_of(root, tmp_path, tuned, **options)
    outcome = Session(job).run()
    alignment = of_whole_models(job, tmp_path / "whole", kind)
    assert identical(job.out, tmp_path / "whole")
    wanted = {row["space"] for row in outcome.maps}
    assert [r for r in map(vars, alignment.reports) if r["space"] in wanted] == outcome.maps
    assert wanted == {r.space for r in alignment.reports} or tuned != "causal/tuned"
    files = replace(job, out=tmp_path / "files", offload_folder=tmp_path / "offload")
    Session(files).run()
    assert identical(job.out, files.out)


def test_every_weight_is_read_once(root, tmp_path):
    """Of all three checkpoints, but for vectors read again by every layer that needs them and rows of a check."""
    session = Session(job_of(root, tmp_path, "causal/tuned"))
    windows = (*session.inputs.bases.windows, session.inputs.window)
    matrices = [{n: [] for n, shape in w.shapes.items() if len(shape) > 1} for w in windows]
    for window, reads in zip(windows, matrices, strict=True):
        read = window.checkpoint.__class__.__getitem__

        def counted(name, window=window, reads=reads, read=read):
            if name in reads:
                reads[name].append(1)
            return read(window.checkpoint, name)

        window._whole = lambda name, counted=counted, window=window: window._checked(name, counted(name))
    session.run()
    table = "model.embed_tokens.weight"  # compared before anything runs, moved when all maps are there
    twice = [{table}, set(), {table}]
    assert [{n: len(r) for n, r in reads.items()} for reads in matrices] == [
        {n: 1 + (n in again) for n in reads} for again, reads in zip(twice, matrices, strict=True)
    ]


INTERRUPTED = {
    **{name: CASES[name] for name in ("full", "full, paper", "delta, least squares", "lora")},
    **{name: case for name, case in CASES.items() if name.startswith("effect")},
    "effect at the best strength": ("causal/tuned", "checkpoint", effect("none", "auto")),
    "effect at the best strength, lora": ("lora", "adapter", effect("auto", "auto")),
    "effect at two strengths": ("causal/tuned", "checkpoint", effect("none", ("auto", 0.5))),
    "effect at a block more": ("causal/tuned", "checkpoint", {"target": "deep", **effect("none")}),
    "effect with a head": ("causal/tuned", "checkpoint", {"target": "near", **effect("coherent", "auto")}),
    "effect of rank 2": ("causal/tuned", "adapter", {"output": "adapter", "rank": 2, **effect("coherent")}),
}


IN_FILES = "full", "effect at the best strength", "effect behind a prior, lora"


@pytest.mark.parametrize(
    "name, files",
    [
        pytest.param(name, files, id=f"{name}, in files" if files else name)
        for files, names in ((False, INTERRUPTED), (True, IN_FILES))
        for name in names
    ],
)
def test_an_interrupted_run_goes_on_to_the_same_bytes(name, files, root, tmp_path, monkeypatch):
    tuned, _, options = INTERRUPTED[name]
    where = {"offload_folder": tmp_path / "offload"} if files else {}
    goes_on(job_of(root, tmp_path, tuned, **options, **where), monkeypatch)


@pytest.mark.parametrize("alpha", [1.0, "auto"])
@pytest.mark.parametrize("tuned", ["causal/tuned", "lora"])
def test_interrupted_fits_of_applied_maps_go_on_to_the_same_bytes(tuned, alpha, root, tmp_path, monkeypatch):
    job = job_of(root, tmp_path, tuned, **effect("coherent", alpha))
    AlignSession(replace(job.alignment, out=tmp_path / "maps")).run()
    goes_on(replace(job, maps=str(tmp_path / "maps")), monkeypatch)


@pytest.mark.parametrize("name", ["full", "effect", "effect at the best strength", "effect with a head"])
@pytest.mark.parametrize("files", [False, True], ids=["in memory", "in files"])
def test_a_run_interrupted_just_before_its_end_goes_on_to_the_same_bytes(name, files, root, tmp_path, monkeypatch):
    """When hidden states are gone: all that they tell has to be known."""
    tuned, _, options = INTERRUPTED[name]
    where = {"offload_folder": tmp_path / "offload"} if files else {}
    finish, stopped = Work.finish, []

    def interrupted(self, *endings):
        if self.home not in stopped and "once" not in str(self.home):
            stopped.append(self.home)
            raise KeyboardInterrupt
        return finish(self, *endings)

    monkeypatch.setattr(Work, "finish", interrupted)
    goes_on(job_of(root, tmp_path, tuned, **options, **where), monkeypatch)


def goes_on(job, monkeypatch):
    """Interrupted behind every single commit, and each time resumed by another session."""
    once = job.out.with_name("once")
    Session(replace(job, out=once)).run()
    commit = Work.commit

    def interrupted(self, *state):
        commit(self, *state)
        raise KeyboardInterrupt

    monkeypatch.setattr(Work, "commit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Session(job).run()
    steps = 1
    while not job.out.exists():
        with suppress(KeyboardInterrupt):
            Session(replace(job, resume=True)).run()
        steps += 1
    assert steps >= 3  # the embeddings, two blocks, and for a full tune the end
    for folder in {path.parent.relative_to(once) for path in once.rglob("*.safetensors")}:
        assert identical(job.out / folder, once / folder)
    manifests = [
        json.loads(path.read_text().replace(str(out), "OUT"))
        for out in (job.out, once)
        for path in sorted(out.rglob("theseus.json"))
    ]
    assert manifests[: len(manifests) // 2] == manifests[len(manifests) // 2 :]
    assert {path.name for path in job.out.parent.iterdir() if path.name.startswith(".")} == set()


def test_a_run_of_other_inputs_is_not_gone_on_with(root, tmp_path, monkeypatch):
    job = job_of(root, tmp_path, "causal/tuned")
    commit = passage_module.Passage._commit

    def interrupted(self, loop):
        commit(self, loop)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(passage_module.Passage, "_commit", interrupted)
        Session(job).run()
    with pytest.raises(tt.InputRefused, match="--resume"):
        Session(job).run()
    with pytest.raises(tt.InputRefused, match="seed"):
        Session(replace(job, resume=True, seed=1)).run()
    other = tmp_path / "other"
    shutil.copytree(root / "causal/target", other)
    (other / "config.json").touch()
    with pytest.raises(tt.InputRefused, match="TARGET config.json time of change"):
        Session(replace(job, resume=True, target=str(other))).run()
    assert Session(replace(job, resume=True)).run().written == str(job.out)
    with pytest.raises(tt.TheseusError, match="whole|done|complete"):
        Session(replace(job, resume=True)).run()


def test_an_alignment_is_saved_as_it_is_made(root, tmp_path):
    """The folder that `theseus align` fills block by block loads as what :func:`align` returns."""
    source, target = (str(root / "causal" / side) for side in ("source", "target"))
    options = {"calibration": str(root / "ids.safetensors"), "tokens": 256, "batch_size": 4}
    options |= {"recipe": tt.Recipe("coherent")}
    job = AlignJob(source, target, tmp_path / "maps", **options)
    AlignSession(job).run()
    loaded = Alignment.load(job.out)
    alignment = of_whole_models(job_of(root, tmp_path, "causal/tuned"), tmp_path / "whole", "checkpoint")
    assert loaded.rules == alignment.rules and loaded.vectors == alignment.vectors
    assert loaded.reports == alignment.reports and set(loaded.maps) == set(alignment.maps)
    for name, t in alignment.maps.items():
        assert all(torch.equal(part, loaded.maps[name].tensors()[n]) for n, part in t.tensors().items())
    applied = Job.of_maps(str(job.out), str(root / "causal/tuned"), tmp_path / "applied")
    Session(applied).run()
    assert identical(applied.out, tmp_path / "whole")


def test_blocks_that_no_adapter_touches_are_not_read(root, tmp_path):
    """A LoRA on the first block's attention: no later block, and no MLP map."""
    config = json.loads((root / "lora" / "adapter_config.json").read_text())
    tensors = {n: t for n, t in held(root / "lora").items() if ".layers.0.self_attn.v_proj" in n}
    assert len(tensors) == 2
    folder = tmp_path / "first"
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["v_proj"]}))
    session = Session(replace(job_of(root, tmp_path, "lora"), tuned=str(folder)))
    held_names = []
    for window in session.inputs.bases.windows:
        hold = window.hold
        window.hold = lambda names, hold=hold: (held_names.extend(names), hold(names))
    outcome = session.run()
    assert {row["space"] for row in outcome.maps} == {"0.attention", "0.context"}
    assert outcome.skipped == "1 of 2 blocks were not run, 7 of 9 spaces not mapped"
    assert held_names and not [n for n in held_names if ".layers.1." in n]


def test_depths_are_paired_block_by_block(root, tmp_path):
    """A target with a block more: the pairing of the streamed pass is that of whole models."""
    job = job_of(root, tmp_path, "causal/tuned", target="deep")
    outcome = Session(job).run()
    alignment = of_whole_models(job, tmp_path / "whole", "checkpoint")
    assert outcome.blocks == alignment.blocks and outcome.blocks.count(None) == 1
    assert identical(job.out, tmp_path / "whole")


def test_rank_poor_first_maps_are_completed_at_the_end(root, tmp_path):
    """Four token types: the first block's q, k and v wait for all of depth, and survive an interruption."""
    save_file({"input_ids": torch.randint(3, 7, (32, 16))}, tmp_path / "poor.safetensors")
    job = replace(job_of(root, tmp_path, "causal/tuned"), calibration=str(tmp_path / "poor.safetensors"))
    outcome = Session(job).run()
    assert {"0.attention.completed"} <= {row["space"] for row in outcome.maps}
    of_whole_models(job, tmp_path / "whole", "checkpoint")
    assert identical(job.out, tmp_path / "whole")


def test_the_folder_of_hidden_states_is_empty_afterwards(root, tmp_path):
    offload = tmp_path / "offload"
    Session(job_of(root, tmp_path, "causal/tuned", offload_folder=offload)).run()
    assert not [path for path in Path(offload).rglob("*") if path.is_file()]
