"""Calibration "self": text that the tune itself says, through the command, and the tuned model that says it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import tiny_models
from helpers.broken_inputs import edited
from helpers.calibration import TEXT, make_tokenizer
from helpers.command import call, identical, invoke, outcome_of, refused
from peft import PeftModel
from theseus_transport.budget.plan import RUNTIME
from theseus_transport.errors import InputRefused
from theseus_transport.files.checkpoint import Checkpoint
from theseus_transport.jobs.bases import Bases
from theseus_transport.jobs.self_text import SelfText
from theseus_transport.jobs.settings import AlignJob, Job
from theseus_transport.jobs.transport_job import Session
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

SAMPLED = ("--calibration", "self", "--tokens", "256")
ADAPTERS = {
    "lora": {"target_modules": ["q_proj", "v_proj"]},
    "dora": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
    "headed": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "embedded": {"target_modules": ["q_proj", "embed_tokens"]},
}


def saved(model, folder: Path, size: int) -> None:
    model.save_pretrained(folder)
    make_tokenizer(folder, size, begin=True)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source and a target that tokenize differently, tunes of the source, and a tied source with its tune."""
    place = tmp_path_factory.mktemp("said")
    torch.manual_seed(0)
    base = tiny_models.llama("source")
    saved(base, place / "source", 280)
    saved(tiny_models.llama("target"), place / "target", 290)
    tiny_models.tuned(base).save_pretrained(place / "tuned")
    for name, options in ADAPTERS.items():
        tiny_models.adapter(place / name, base, **options)
    tied = tiny_models.llama("source", tie_word_embeddings=True)
    tied.save_pretrained(place / "tied")
    tiny_models.tuned(tied).save_pretrained(place / "tied-tuned")
    sizes = {"n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 300}
    gpt2 = tiny_models.randomised(GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)))
    gpt2.save_pretrained(place / "gpt2")
    tiny_models.tuned(gpt2).save_pretrained(place / "gpt2-tuned")
    return place


def tune_of(root: Path, source: str, tuned: str, **options) -> SelfText:
    job = AlignJob(str(root / source), str(root / source), root / "out", tuned=str(root / tuned), **options)
    bases = Bases.open(job)
    return SelfText.of(job, bases.source, bases.geometries.source, bases.device, 32)


TUNES = [("source", "tuned"), ("tied", "tied-tuned"), ("gpt2", "gpt2-tuned"), *(("source", name) for name in ADAPTERS)]


@pytest.mark.parametrize("source, tuned", TUNES)
def test_the_model_that_writes_is_the_tuned_model(root: Path, source: str, tuned: str) -> None:
    ids = torch.arange(3, 30).view(1, -1)
    with torch.no_grad():
        found = tune_of(root, source, tuned)._model()(ids).logits
        if tuned in ADAPTERS:
            whole = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(root / source), root / tuned)
        else:
            whole = AutoModelForCausalLM.from_pretrained(root / tuned)
        base = AutoModelForCausalLM.from_pretrained(root / source)
        expected, before = (model.eval()(ids).logits for model in (whole, base))
    scale = expected.abs().max()
    assert (found - expected).abs().max() < 1e-4 * scale < (before - expected).abs().max()


def test_a_head_trained_over_a_tied_base_writes(root: Path, tmp_path: Path) -> None:
    base = LlamaForCausalLM.from_pretrained(root / "tied")
    torch.manual_seed(1)
    tiny_models.adapter(tmp_path / "head", base, target_modules=["lm_head", "q_proj"])
    ids = torch.arange(3, 30).view(1, -1)
    with torch.no_grad():
        model = tune_of(root, "tied", str(tmp_path / "head"))._model()
        assert model.lm_head.weight is not model.get_input_embeddings().weight
        said = model(ids).logits
        own = model.lm_head.weight
        factors = PeftModel.from_pretrained(base, tmp_path / "head").base_model.model.lm_head
        assert torch.allclose(own, factors.get_base_layer().weight + factors.get_delta_weight("default"), atol=1e-5)
    assert said.isfinite().all()


@pytest.mark.parametrize("tuned", ["tuned", "lora", "dora"])
def test_a_tune_moves_on_what_it_says_itself(root: Path, tmp_path: Path, tuned: str) -> None:
    output = ("--output", "checkpoint") if tuned == "dora" else ()
    sides = [root / name for name in ("source", tuned, "target")]
    outcomes = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        invoke("transport", *sides, tmp_path / name, *SAMPLED, *output, "--seed", seed)
        outcomes.append(outcome_of(tmp_path / name))
    assert all(o["calibration"].startswith("text sampled from TUNED: ") and o["tokens"] >= 256 for o in outcomes)
    assert identical(tmp_path / "a", tmp_path / "b") and not identical(tmp_path / "a", tmp_path / "c")
    invoke("verify", tmp_path / "a")


def test_it_is_mixed_with_general_text(root: Path, tmp_path: Path) -> None:
    sides = [root / name for name in ("source", "lora", "target")]
    invoke("transport", *sides, tmp_path / "out", *SAMPLED, "--mix", "0.5")
    told = outcome_of(tmp_path / "out")["calibration"]
    assert told.startswith("text sampled from TUNED: ") and "; mixed with text of Python 3" in told


def test_a_strength_that_needs_all_maps_first_moves_on_the_same_text(root: Path, tmp_path: Path) -> None:
    sides = [root / name for name in ("source", "tuned", "target")]
    for name, alpha in (("match", "match"), ("one", "1")):
        invoke("transport", *sides, tmp_path / name, *SAMPLED, "--alpha", alpha)
    assert outcome_of(tmp_path / "match")["calibration"] == outcome_of(tmp_path / "one")["calibration"]


def test_an_interrupted_run_goes_on_with_the_same_text(root: Path, tmp_path: Path) -> None:
    def job(name: str, **options) -> Job:
        sides = [str(root / side) for side in ("source", "tuned", "target")]
        return Job(*sides, tmp_path / name, "self", tokens=256, **options)

    def stop(stage: str, total: int):
        steps = iter(range(total // 2)) if stage == "align" else iter(())
        return lambda: next(steps, None) is None and stage == "align" and (_ for _ in ()).throw(KeyboardInterrupt)

    with pytest.raises(KeyboardInterrupt):
        Session(job("out")).run(stop)
    with pytest.raises(InputRefused, match="begun otherwise: .*seed"):
        Session(job("out", resume=True, seed=5)).run()
    Session(job("out", resume=True)).run()
    Session(job("whole")).run()
    assert identical(tmp_path / "out", tmp_path / "whole")


def test_prompts_and_a_chat_template_tell_what_is_said(root: Path, tmp_path: Path) -> None:
    tuned = edited(tmp_path / "tuned", root / "tuned")
    make_tokenizer(tuned, 280, begin=True)
    (tuned / "chat_template.jinja").write_text("{% for m in messages %}Q {{ m.content }} {% endfor %}"
                                               "{% if add_generation_prompt %}A {% endif %}")  # fmt: skip
    (tmp_path / "ask.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "fox"}]}))
    (tmp_path / "ask.txt").write_text("\n".join(TEXT.split("\n")[:2]))
    for file, start in (("ask.jsonl", "Q fox A "), ("ask.txt", ("The quick brown", "Äpfel und Birnen"))):
        options = {"prompts": tmp_path / file, "calibration": "self"}
        texts = next(tune_of(root, "source", str(tuned), **options).batches(10**4))
        assert len(texts) == 16 and all(text.startswith(start) for text in texts), file
        command = ("transport", root / "source", tuned, root / "target", tmp_path / file.replace(".", "-"))
        invoke(*command, *SAMPLED, "--prompts", tmp_path / file)


def test_what_ends_a_text_is_what_the_tune_says(root: Path, tmp_path: Path) -> None:
    tuned = edited(tmp_path / "tuned", root / "tuned")
    (tuned / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8], "temperature": 3.0}))
    assert tune_of(root, "source", str(tuned))._model().generation_config.eos_token_id == [7, 8]


def test_memory_for_the_whole_tune_is_planned_and_refused_with_a_cure(root: Path, tmp_path: Path) -> None:
    sides = [root / name for name in ("source", "tuned", "target")]
    job = Job(*map(str, sides), tmp_path / "out", "self")
    bases = Bases.open(job.alignment)
    needed = bases.calibrating.extent(256).loading
    general = replace(bases.job, calibration="builtin")
    more = needed - Bases.open(general).calibrating.extent(256).loading
    weights = sum(t.nbytes for t in Checkpoint.open(root / "tuned").values())
    assert weights < more < weights + (8 << 20)
    command = ("transport", *sides, tmp_path / "out", *SAMPLED)
    refused(
        r"--calibration self holds TUNED whole once: \d+ bytes, and 105906176 is what the run may take \(--max-ram\); "
        "sample elsewhere, and give --calibration the text as a file",
        *command,
        "--max-ram",
        "101MiB",
        code=4,
    )
    assert not (tmp_path / "out").exists()
    assert json.loads(call("plan", *command[1:], "--json").stdout)["host"]["calibration"] == RUNTIME + needed


def test_options_that_do_not_go_together_are_refused(root: Path, models: Path, tmp_path: Path) -> None:
    sides, out = [root / name for name in ("source", "tuned", "target")], tmp_path / "out"
    transport = ("transport", *sides, out)
    for mix in ("1", "-0.5", "nan", "2"):
        refused(
            f"mix is {float(mix)}; give a share of general text from 0 to below 1", *transport, *SAMPLED, f"--mix={mix}"
        )
    refused("the calibration is general text already; give --calibration yours", *transport, "--mix", "0.5")
    (tmp_path / "ask.txt").write_text("why?")
    refused("ask.txt begin what TUNED says; give --calibration self", *transport, "--prompts", tmp_path / "ask.txt")
    refused("absent.txt is no file; give lines", *transport, *SAMPLED, "--prompts", tmp_path / "absent.txt")
    (tmp_path / "ask.txt").write_text("\n \n")
    refused("ask.txt holds no prompt", *transport, *SAMPLED, "--prompts", tmp_path / "ask.txt")
    refused("an alignment has none; use theseus transport", "align", root / "source", root / "target", out, *SAMPLED)
    images = [models / "image" / name for name in ("source", "tuned", "target")]
    refused("reads images; give a folder of the task's images", "transport", *images, out, *SAMPLED)
    pixels = ("--calibration", models / "both.safetensors")
    refused("mix is 0.5, but .* reads images", "transport", *images, out, *pixels, "--mix", "0.5")
    assert not out.exists()


def test_a_tune_without_a_vocabulary_head_is_refused(models: Path, tmp_path: Path) -> None:
    bare = [models / "bare" / name for name in ("source", "tuned", "target")]
    refused("TUNED .* has no vocabulary head to write text with", "transport", *bare, tmp_path / "out", *SAMPLED)


def test_without_a_tokenizer_it_is_refused(models: Path, tmp_path: Path) -> None:
    sides = [models / "causal" / name for name in ("source", "tuned", "target")]
    refused("has no tokenizer; copy the model's tokenizer", "transport", *sides, tmp_path / "out", *SAMPLED)
