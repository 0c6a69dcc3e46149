"""Jobs with the recipe `effect`: from files, by stored maps and in Python one update; strengths that follow from it."""

import copy

import pytest
import theseus_transport as tt
import torch
from helpers import tiny_models
from peft import PeftModel
from safetensors.torch import load_file, save_file
from theseus_transport.jobs.align_job import AlignSession
from theseus_transport.jobs.settings import AlignJob, Job
from theseus_transport.jobs.transport_job import Session
from theseus_transport.updates.alpha import TRIED
from transformers import GPT2Config, GPT2LMHeadModel

IDS = torch.randint(1, tiny_models.VOCABULARY, (40, 32), generator=torch.Generator().manual_seed(7))
PLAIN = {"tokens": 10**6, "held_out": False, "alpha": 1.0}


def gpt2():
    config = GPT2Config(
        n_embd=40,
        n_head=5,
        n_layer=3,
        vocab_size=tiny_models.VOCABULARY,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    return tiny_models.randomised(GPT2LMHeadModel(config))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    torch.manual_seed(8)
    folder = tmp_path_factory.mktemp("effect")
    source = tiny_models.llama("source")
    made = {"source": source, "tuned": tiny_models.tuned(source), "target": tiny_models.llama("target"), "gpt2": gpt2()}
    for name, model in made.items():
        model.save_pretrained(folder / name)
    tiny_models.adapter(folder / "lora", source, target_modules=["q_proj", "v_proj"])
    save_file({"input_ids": IDS}, folder / "ids.safetensors")
    return folder, made


def job(root, out, tune, target="target", **options):
    folder, _ = root
    return Job(
        *(str(folder / name) for name in ("source", tune, target)), out, str(folder / "ids.safetensors"), **options
    )


def run(job):
    return Session(job).run(lambda stage, steps: lambda: None)


def tensors(folder):
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


@pytest.mark.parametrize("prior", ["none", "coherent"])
def test_files_and_models_in_memory_give_the_same_bits(root, tmp_path, prior):
    _, models = root
    recipe = tt.Recipe("effect", prior=prior)
    run(job(root, tmp_path / "out", "tuned", recipe=recipe, **PLAIN))
    target = models["target"]
    alignment = tt.align(models["source"], target, [{"input_ids": rows} for rows in IDS.split(8)], recipe=recipe)
    update = tt.transport(alignment, tt.Delta.between(models["source"], models["tuned"]), target)
    written = tensors(tmp_path / "out")
    for name, base in target.state_dict().items():
        assert torch.equal(written[name], base + update[name] if name in update else base), name


@pytest.mark.parametrize("tune", ["tuned", "lora"])
def test_maps_that_are_applied_give_what_a_job_by_itself_gives(root, tmp_path, tune):
    recipe, ids = tt.Recipe("effect", prior="coherent"), str(root[0] / "ids.safetensors")
    run(job(root, tmp_path / "whole", tune, recipe=recipe, **PLAIN))
    sides = (str(root[0] / name) for name in ("source", "target"))
    how = {name: PLAIN[name] for name in ("tokens", "held_out")}
    AlignSession(AlignJob(*sides, tmp_path / "maps", ids, recipe=recipe, **how)).run(lambda stage, steps: lambda: None)
    run(Job.of_maps(str(tmp_path / "maps"), str(root[0] / tune), tmp_path / "out", calibration=ids, **PLAIN))
    whole, applied = tensors(tmp_path / "whole"), tensors(tmp_path / "out")
    assert whole.keys() == applied.keys()
    for name, value in whole.items():
        torch.testing.assert_close(applied[name], value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("tune", ["tuned", "lora"])
def test_an_update_written_first_gives_every_strength_the_same_bits(root, tmp_path, tune):
    recipe = tt.Recipe("effect", prior="coherent")
    plain = {"recipe": recipe, "tokens": 10**6}
    run(job(root, tmp_path / "one", tune, alpha=0.5, **plain))
    outcome = run(job(root, tmp_path / "all", tune, alpha=("auto", 0.5, "match"), **plain))
    one, other = tensors(tmp_path / "one"), tensors(tmp_path / "all" / "alpha-0.5")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    tried = {float(alpha): share for alpha, share in outcome.removed.items()}
    assert tried.keys() == {1.0, *TRIED}
    assert outcome.alphas[0]["alpha"] == max(tried, key=tried.get)
    assert not list(tmp_path.glob(".all*"))  # nothing is left beside it


def test_between_families_that_share_no_structure_an_adapter_is_fitted(root, tmp_path):
    """Llama to GPT-2: other norms, positions, gates and depth; nothing but the residual corresponds."""
    outcome = run(job(root, tmp_path / "out", "lora", "gpt2"))
    assert outcome.job["recipe"]["prior"] == "none" and {row["fate"] for row in outcome.coverage} == {"fitted"}
    base = copy.deepcopy(root[1]["gpt2"])
    before = base(IDS[:2]).logits
    moved = PeftModel.from_pretrained(base, tmp_path / "out")
    assert not torch.equal(moved(IDS[:2]).logits, before)
