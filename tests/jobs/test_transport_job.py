"""From files to files: what PEFT and transformers load is what the library computes."""

import copy
import json
import logging
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import theseus_transport as tt
import torch
import yaml
from helpers import tiny_models
from helpers.broken_inputs import edited
from peft import PeftModel
from safetensors.torch import load_file, save_file
from theseus_transport.calibration.calibration import drawn_rows
from theseus_transport.files import result_folder as folder
from theseus_transport.files.checkpoint import Checkpoint
from theseus_transport.files.result_folder import differences as verify
from theseus_transport.files.result_folder import read_manifest
from theseus_transport.jobs import bases as bases_module
from theseus_transport.jobs.model_card import condensed
from theseus_transport.jobs.settings import Job
from theseus_transport.jobs.transport_job import Session
from theseus_transport.jobs.vocabularies import check_rows
from theseus_transport.updates.fates import TensorFate
from transformers import (
    AutoModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    ViTForImageClassification,
    ViTModel,
)

COHERENT = tt.Recipe("coherent")
ALL = 10**6  # more tokens than any calibration file here holds: all of it is used


@pytest.fixture(scope="module")
def root(models):
    return models


@pytest.fixture
def lora(root, tmp_path):
    return make_job(root, tmp_path, "causal/source", "lora", "causal/target", "ids.safetensors")


@pytest.fixture
def full(root, tmp_path):
    return make_job(root, tmp_path, "causal/source", "causal/tuned", "causal/target", "ids.safetensors")


def make_job(root, tmp_path, source, tuned, target, calibration, **options):
    folders = (str(root / name) for name in (source, tuned, target))
    return Job(*folders, tmp_path / "out", str(root / calibration), **{"tokens": ALL, "recipe": COHERENT, **options})


def run(job):
    return Session(job).run(lambda stage, steps: lambda: None)


def held(folder):
    """All tensors of a folder."""
    return {k: v for path in Path(folder).glob("*.safetensors") for k, v in load_file(path).items()}


def computed(job, cls):
    """(base, its update) by the library alone: models from transformers, batches cut by hand."""
    vision = cls in (ViTModel, ViTForImageClassification)
    extra = {"add_pooling_layer": False} if cls is ViTModel else {}
    opened = cls if vision else AutoModel  # what reads the class token alone is known by its head
    bases = [opened.from_pretrained(r, dtype="auto", **extra).eval() for r in (job.source, job.target)]
    data, batches = load_file(job.calibration), []
    count = len(next(iter(data.values())))
    order = drawn_rows(torch.ones(count), job.tokens, job.batch_size, job.seed)  # those held out are the last batch
    data = {name: rows[order] for name, rows in data.items()}
    for start in range(0, count, job.batch_size):
        rows = {k: v[start : start + job.batch_size] for k, v in data.items()}
        sides = [
            {k.removeprefix(f"{side}."): v for k, v in rows.items() if k.startswith(side) or "." not in k}
            for side in ("source", "target")
        ]
        batches.append(tuple(s if vision else s | {"attention_mask": torch.ones_like(s["input_ids"])} for s in sides))
    alignment = tt.align(*bases, batches[:-1] if len(batches) > 2 else batches, recipe=job.recipe)  # one is held out
    target, source, tuned = cls.from_pretrained(job.target), held(job.source), Path(job.tuned)
    adapted = (tuned / "adapter_config.json").exists()
    delta = tt.Delta.from_adapter(tuned, source) if adapted else tt.Delta.between(source, held(tuned))
    return target, tt.transport(alignment, delta, target, alpha=job.strength, leave=job.leave)


def norm(tensors):
    return sum(float(t.double().square().sum()) for t in tensors) ** 0.5


FULL = [
    ("causal", "causal", LlamaForCausalLM, {}),
    ("causal", "bare", LlamaModel, {}),
    ("tied", "tied", LlamaForCausalLM, {"alpha": -0.5}),
    ("causal", "causal", LlamaForCausalLM, {"recipe": tt.Recipe(prior="none"), "alpha": 1.0}),
    ("bf16", "bf16", LlamaForCausalLM, {}),
    ("bare", "bare", LlamaModel, {"recipe": tt.Recipe("paper")}),
    ("sequence", "sequence", LlamaForSequenceClassification, {"leave": ("score.*",)}),
    ("image", "image", ViTForImageClassification, {}),
    ("vision", "vision", ViTModel, {"recipe": tt.Recipe("paper")}),
]


@pytest.mark.parametrize("source, target, cls, options", FULL, ids=[f"{s}-{t}" for s, t, _, _ in FULL])
def test_a_checkpoint_holds_base_plus_update(root, tmp_path, source, target, cls, options):
    calibration = {"image": "both", "vision": "images"}.get(source, "ids") + ".safetensors"
    job = make_job(root, tmp_path, f"{source}/source", f"{source}/tuned", f"{target}/target", calibration, **options)
    outcome = run(job)
    base, update = computed(job, cls)
    loaded, info = cls.from_pretrained(job.out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and len(update) > 5
    start = dict(base.named_parameters())
    for name, value in loaded.named_parameters():
        change = update[name] if name in update else torch.zeros(())
        assert torch.equal(value, (start[name].to(change.dtype) + change).to(start[name].dtype)), name
        assert value.dtype == start[name].dtype
    assert {row["fate"] for row in outcome.coverage} <= {"transported", "folded", "left", "unchanged", "fitted"}
    assert verify(job.out) == []
    assert outcome.bytes_out == sum(t.numel() * t.element_size() for t in held(job.out).values())


ADAPTERS = [
    ("lora", "causal", "causal", LlamaForCausalLM, {}),
    ("patterns", "causal", "causal", LlamaForCausalLM, {"alpha": 0.7}),
    ("patterns", "causal", "causal", LlamaForCausalLM, {"recipe": tt.Recipe("paper"), "leave": ("*.up_proj",)}),
    ("half", "causal", "causal", LlamaForCausalLM, {}),
    ("named", "causal", "bare", LlamaModel, {}),  # its target_modules and rank_pattern say "model.", which is not there
    ("score", "causal", "causal", LlamaForSequenceClassification, {"leave": ("score*",)}),
    ("classes", "image", "image", ViTForImageClassification, {}),
]


@pytest.mark.parametrize("lora, source, target, cls, options", ADAPTERS, ids=[f"{a}-{t}" for a, _, t, _, _ in ADAPTERS])
def test_an_adapter_merges_to_base_plus_update(root, tmp_path, lora, source, target, cls, options):
    calibration = "both.safetensors" if source == "image" else "ids.safetensors"
    job = make_job(root, tmp_path, f"{source}/source", lora, f"{target}/target", calibration, **options)
    run(job)
    base, update = computed(job, cls)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys")
        merged = PeftModel.from_pretrained(copy.deepcopy(base), job.out).merge_and_unload()
    found, start = merged.state_dict(), base.state_dict()
    gap = norm(found[n].double() - start[n].double() - (update[n].double() if n in update else 0) for n in found)
    factors, given = (
        {k: (t.dtype, min(t.shape)) for k, t in held(folder).items() if "lora_" in k}
        for folder in (job.out, root / lora)
    )
    assert sorted(factors.values(), key=str) == sorted(given.values(), key=str) or job.leave  # same dtypes, same ranks
    eps = max(torch.finfo(dtype).eps for dtype, _ in factors.values())
    rounding = eps * norm(update.values()) + torch.finfo(torch.float32).eps * norm(start.values())
    assert 0 < gap <= rounding  # of the factors, then of the sum
    assert json.loads((job.out / "adapter_config.json").read_text())["base_model_name_or_path"] == job.target


def test_an_adapter_as_checkpoint_and_as_delta(lora):
    run(replace(lora, output="checkpoint"))
    run(replace(lora, output="delta", alpha=2.0, out=lora.out.with_name("delta")))
    base, change, loaded = held(lora.target), held(lora.out.with_name("delta")), held(lora.out)
    assert len(change) == 4 and loaded.keys() == base.keys()
    for name, value in loaded.items():
        assert torch.equal(value, base[name] + change[name] / 2 if name in change else base[name]), name


def test_what_lies_beside_the_tensors(root, tmp_path):
    named = tmp_path / "a: target, #1 [b]"
    edited(named, root / "causal" / "target")
    tiny_models.tokenizer(named, 280)
    edited(tmp_path / "source", root / "causal" / "source")
    tiny_models.tokenizer(tmp_path / "source", 280)
    job = make_job(tmp_path, tmp_path, "source", root / "causal" / "tuned", named, root / "text.txt", tokens=64)
    outcome = run(job)
    assert json.loads((job.out / "config.json").read_text()) == json.loads((named / "config.json").read_text())
    assert (job.out / "tokenizer.json").read_bytes() == (named / "tokenizer.json").read_bytes()
    front, body = (job.out / "README.md").read_text().split("---\n", 2)[1:]
    assert yaml.safe_load(front)["base_model"] == str(named) and outcome.calibration in body
    manifest = read_manifest(job.out)
    told = manifest["metadata"]["outcome"]
    assert set(told["job"]["fingerprints"]) == {"source", "tuned", "target"} and told["coverage"] == outcome.coverage
    assert len(manifest["metadata"]["provenance"]["calibration_fingerprint"]) == 64
    assert outcome.used_bytes > 0 and outcome.predicted_bytes > 0


def test_different_tokenizers(root, tmp_path, caplog):
    for side, size in (("source", 260), ("target", 290)):
        edited(tmp_path / side, root / "causal" / side)
        tiny_models.tokenizer(tmp_path / side, size)
    job = make_job(root, tmp_path, tmp_path / "source", "causal/tuned", tmp_path / "target", "text.txt", tokens=100)
    assert run(job).tokens >= 100  # the same ids mean the same tokens: the larger vocabulary continues the smaller
    tokens = json.loads((path := tmp_path / "target" / "tokenizer.json").read_text())
    vocabulary = tokens["model"]["vocab"]
    tokens["model"]["vocab"] = {token: len(vocabulary) - 1 - i for token, i in vocabulary.items()}
    path.write_text(json.dumps(tokens))
    with pytest.raises(tt.InputRefused, match="tokenizers differ in .* --leave 'embed_tokens\\*' --leave 'lm_head\\*'"):
        run(replace(job, out=tmp_path / "other"))
    run(replace(job, out=tmp_path / "other", leave=("embed_tokens*", "lm_head*")))


def test_rows_of_any_family_are_compared(tmp_path):
    """GPT-2 calls its embedding wte; the family's record knows."""
    sides = []
    for side in ("source", "target"):
        sizes = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 8}
        GPT2LMHeadModel(GPT2Config(vocab_size=280, **sizes)).save_pretrained(tmp_path / side)
        tiny_models.tokenizer(tmp_path / side, 280)
        sides.append(Checkpoint.open(tmp_path / side))
    tokens = json.loads((path := tmp_path / "target" / "tokenizer.json").read_text())
    vocabulary = tokens["model"]["vocab"]
    tokens["model"]["vocab"] = {token: len(vocabulary) - 1 - i for token, i in vocabulary.items()}
    path.write_text(json.dumps(tokens))
    with pytest.raises(tt.InputRefused, match="tokenizers differ in .* wte move row by row; --leave 'wte\\*'"):
        check_rows([TensorFate("wte.weight", "transported")], *sides)
    check_rows([TensorFate("wte.weight", "left"), TensorFate("wpe.weight", "transported")], *sides)


def test_a_layer_of_an_adapter_is_left_by_its_tensors_name_too(lora):
    run(replace(lora, leave=("layers.0.self_attn.q_proj.weight", "lm_head.weight")))
    assert not any("layers.0.self_attn.q_proj" in name for name in held(lora.out))
    with pytest.raises(tt.InputRefused, match="matches nothing"):
        Session(replace(lora, leave=("layers.0.self_attn.q_proj.bias",)))


def test_classes_of_another_name_are_said(root, tmp_path):
    labels = {str(i): f"LABEL_{i}" for i in range(5)} | {"0": "cat", "1": "dog"}
    edited(tmp_path / "target", root / "image" / "target", config={"id2label": labels})
    job = make_job(root, tmp_path, "image/source", "image/tuned", tmp_path / "target", "both.safetensors")
    (said,) = [w for w in Session(job).rehearse().warnings if "id2label" in w]
    assert "differ in 2 of 5 ids" in said
    assert not any("id2label" in w for w in Session(replace(job, leave=("classifier.*",))).rehearse().warnings)


@pytest.mark.parametrize("recipe", ["coherent", "effect"])
def test_same_inputs_same_bytes(lora, recipe):
    for name in ("out", "again"):
        run(replace(lora, out=lora.out.with_name(name), recipe=tt.Recipe(recipe)))
    first, second = (
        {path.name: path.read_bytes() for path in lora.out.with_name(name).iterdir()} for name in ("out", "again")
    )
    assert first.keys() == second.keys() and first["adapter_model.safetensors"] == second["adapter_model.safetensors"]


def test_warnings_reach_outcome_manifest_and_screen(root, tmp_path):
    few = tmp_path / "few.safetensors"
    save_file({"input_ids": torch.zeros(1, 5, dtype=torch.int64)}, few)
    base = LlamaForCausalLM.from_pretrained(root / "bf16" / "source", dtype=torch.float32)
    tiny_models.tuned(base, 1e-5).save_pretrained(tmp_path / "tuned")
    outcome = run(make_job(root, tmp_path, "bf16/source", tmp_path / "tuned", "bf16/target", few))
    for expected in ("5 tokens, 1000000 were wanted", "less than half their rank", "swallows", "their rounding moves"):
        assert any(expected in warning for warning in outcome.warnings), expected
    assert read_manifest(tmp_path / "out")["metadata"]["outcome"]["warnings"] == outcome.warnings
    assert condensed(["block 1 is odd", "block 2 is odd", "x"]) == ["block 1 is odd (and 1 like it)", "x"]
    assert not logging.getLogger("theseus_transport").handlers


@pytest.mark.parametrize("error", [RuntimeError("in the middle"), None])
@pytest.mark.parametrize("overwrite", [False, True])
def test_after_a_failure_nothing_is_left_and_the_old_folder_stands(lora, monkeypatch, error, overwrite):
    if overwrite:
        run(lora)
    before = {path: path.read_bytes() for path in lora.out.parent.rglob("*") if path.is_file()}
    steps = []

    def progress(stage, number):
        def step():
            steps.append(stage)
            if error and steps.count("write") == 2:
                raise error

        return step

    alpha = 1.0 if error else 1e300  # without an error of its own: overflows when it is written
    with pytest.raises(type(error) if error else tt.NumericalError):
        Session(replace(lora, overwrite=overwrite, alpha=alpha)).run(progress)
    assert {path: path.read_bytes() for path in lora.out.parent.rglob("*") if path.is_file()} == before
    assert set(lora.out.parent.iterdir()) == ({lora.out} if overwrite else set())


def test_an_interrupted_job_is_kept_and_the_old_folder_stands(lora):
    """Until it is gone on with, or removed."""
    run(lora)
    before = {path: path.read_bytes() for path in lora.out.iterdir()}

    def progress(stage, number):
        def step():
            if stage == "write":
                raise KeyboardInterrupt

        return step

    with pytest.raises(KeyboardInterrupt, match="--resume to go on after step 1"):
        Session(replace(lora, overwrite=True, alpha=2.0)).run(progress)
    assert {path: path.read_bytes() for path in lora.out.iterdir()} == before
    assert {path.name for path in lora.out.parent.iterdir()} == {"out", ".out.theseus"}
    Session(replace(lora, overwrite=True, alpha=2.0, resume=True)).run()
    assert {path.name for path in lora.out.parent.iterdir()} == {"out"}
    assert {path: path.read_bytes() for path in lora.out.iterdir()} != before


def test_memory_and_disk_are_checked_first(full, monkeypatch):
    monkeypatch.setattr(Session, "run", None)  # nothing heavy may run
    monkeypatch.setattr(bases_module, "available_memory", lambda: 2**20)
    monkeypatch.setattr(bases_module, "resident_memory", lambda: 0)
    with pytest.raises(tt.ResourceError, match=r"1MiB of memory are available, and \d+MiB is the least that would do"):
        Session(full)
    with pytest.raises(tt.ResourceError, match=r"--max-ram is 100MiB, and \d+MiB is the least"):
        Session(replace(full, max_ram=100 << 20))
    assert Session(replace(full, max_ram=2 << 30)).plan.choice.batch_size == 8
    monkeypatch.undo()
    usage = folder.shutil.disk_usage("/")
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(tt.ResourceError, match="needs [0-9]{6} bytes, .* has 1000 free"):
        Session(full)
    assert not full.out.exists()
