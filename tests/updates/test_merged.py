"""Adapters that factors cannot carry: merged they are what PEFT runs, and every refusal names a way that works."""

import copy
import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import theseus_transport as tt
import torch
from helpers import tiny_models
from peft import IA3Config, LoHaConfig, LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_delta import adapter, factors
from theseus_transport.files.checkpoint import Checkpoint
from theseus_transport.jobs.settings import Job
from theseus_transport.jobs.transport_job import Session
from theseus_transport.models.families import FAMILIES
from theseus_transport.models.text_families import LLAMA
from theseus_transport.updates.adapter import MERGING, PREFIX, Adapter
from theseus_transport.updates.merged import Merged
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaForSequenceClassification

Q = ["q_proj"]
IDS = torch.arange(24).view(2, 12)
READS = {"text": IDS, "vision": torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8)}
COHERENT = tt.Recipe("coherent")  # whose maps hardly see how merging rounds
ALL = 10**6  # more tokens than the calibration file holds
KINDS: dict[str, dict] = {
    "dora": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
    "dora-everywhere": {"target_modules": "all-linear", "use_dora": True, "rank_pattern": {"q_proj": 2}},
    "biases": {"target_modules": Q, "bias": "all"},
    "biases-of-lora": {"target_modules": Q, "bias": "lora_only"},
    "biases-behind-factors": {"target_modules": Q, "lora_bias": True},
    "tokens": {"target_modules": Q, "trainable_token_indices": [7, 2]},
    "tokens-of-both": {"target_modules": Q, "trainable_token_indices": {"embed_tokens": [5, 2], "lm_head": [4, 1, 0]}},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"], "use_rslora": True},
    "embedding-dora": {"target_modules": ["embed_tokens"], "use_dora": True},
    "norms": {"target_modules": Q, "modules_to_save": ["input_layernorm", "norm"]},
    "all-of-it": {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True, "bias": "all",
                  "modules_to_save": ["lm_head", "post_attention_layernorm"]},
    "vit-patches": {"target_modules": ["projection", "q_proj"], },
    "vit-patches-dora": {"target_modules": ["projection"], "use_dora": True},
    "vit-norms": {"target_modules": Q, "modules_to_save": ["layernorm_before", "classifier"]},
    "gpt2-dora": {"target_modules": ["c_attn", "c_fc"], "use_dora": True},
    "gpt2-biases": {"target_modules": ["c_attn", "c_proj"], "bias": "all"},
    "gpt2-positions": {"target_modules": ["wpe", "c_attn"]},
}  # fmt: skip


def gpt2() -> GPT2LMHeadModel:
    return tiny_models.randomised(
        GPT2LMHeadModel(
            GPT2Config(vocab_size=300, n_positions=64, n_embd=24, n_head=4, n_layer=2, bos_token_id=0, eos_token_id=0)
        )
    )


def trained(config: object, model: nn.Module) -> PeftModel:
    """A PEFT model, nothing that it trains where it started."""
    found = get_peft_model(copy.deepcopy(model), config).eval()
    for parameter in found.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return found


@pytest.fixture(scope="module")
def bases() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {"llama": tiny_models.llama("source", attention_bias=True), "gpt2": gpt2(), "vit": tiny_models.vit("source")}


@pytest.mark.parametrize("name", KINDS)
def test_merged_is_what_peft_runs(tmp_path: Path, bases: dict[str, nn.Module], name: str) -> None:
    family = FAMILIES.get(name.partition("-")[0], LLAMA)
    base = bases[family.model_type]
    tuned = trained(LoraConfig(r=4, lora_alpha=6, **KINDS[name]), base)
    tuned.save_pretrained(tmp_path)
    adapter = Adapter.open(tmp_path)
    merged = Merged(base.state_dict(), adapter, family)
    own = copy.deepcopy(base)
    own.load_state_dict(dict(merged))
    with torch.no_grad():
        before, after, found = (model(READS[family.modality]).logits.double() for model in (base, tuned, own))
    assert float((found - after).norm() / (after - before).norm()) < 1e-5  # float32, two sums in two orders
    for key in merged:
        assert merged.shapes[key] == merged[key].shape and merged.dtypes[key] == merged[key].dtype
        torch.testing.assert_close(merged.rows(key, slice(1, 4)), merged[key][1:4], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(merged.take(key, torch.tensor([0])), merged[key][:1], rtol=0, atol=0)
    assert tt.Delta.from_adapter(tmp_path, base).needs_merging(family)


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head"]}])
def test_what_factors_carry_is_not_merged(tmp_path: Path, bases: dict[str, nn.Module], options: dict) -> None:
    trained(LoraConfig(r=4, target_modules=Q, **options), bases["llama"]).save_pretrained(tmp_path)
    assert not tt.Delta.from_adapter(tmp_path, bases["llama"]).needs_merging(LLAMA)


@pytest.fixture(scope="module")
def adapters(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """On ``causal/source``: one of each kind that is merged on the way, and the same merged by PEFT."""
    root = tmp_path_factory.mktemp("adapters")
    base = AutoModelForCausalLM.from_pretrained(models / "causal" / "source")
    torch.manual_seed(0)
    for name in ("dora", "embedding", "norms"):
        tuned = trained(LoraConfig(r=4, lora_alpha=6, **KINDS[name]), base)
        tuned.save_pretrained(root / name)
        tuned.merge_and_unload().save_pretrained(root / f"{name}-merged")
    return root


def job(models: Path, tuned: Path, out: Path, **options: object) -> Job:
    bases = (str(models / "causal" / side) for side in ("source", "target"))
    source, target = bases
    return Job(source, str(tuned), target, out, str(models / "ids.safetensors"), tokens=ALL, recipe=COHERENT, **options)


@pytest.mark.parametrize("name, output", [("dora", "checkpoint"), ("embedding", "checkpoint"), ("norms", "delta")])
def test_the_cure_moves_what_peft_merges(models: Path, adapters: Path, tmp_path: Path, name: str, output: str) -> None:
    with pytest.raises(tt.InputRefused) as refused:
        Session(job(models, adapters / name, tmp_path / "adapter"))
    assert MERGING in str(refused.value)
    for given, place in ((name, "cure"), (f"{name}-merged", "peft")):
        Session(job(models, adapters / given, tmp_path / place, output=output)).run()
    stem = "model" if output == "checkpoint" else "delta"
    cure, peft = (load_file(tmp_path / place / f"{stem}.safetensors") for place in ("cure", "peft"))
    base = load_file(models / "causal" / "target" / "model.safetensors")
    assert cure.keys() == peft.keys()
    for key, value in cure.items():
        start = base[key] if output == "checkpoint" else torch.zeros_like(value)
        size = float((peft[key] - start).norm())
        # PEFT rounds W + BA to float32 where W is, by 6e-8 of W; here W is about 5 times the update
        assert float((value - peft[key]).norm()) <= 1e-5 * size + 1e-6, key


def test_merging_reads_the_base_in_bfloat16_exactly(models: Path, tmp_path: Path) -> None:
    source = Checkpoint.open(models / "bf16" / "source")
    config = LoraConfig(r=4, **KINDS["dora"], layers_to_transform=[0])
    tuned = trained(config, AutoModelForCausalLM.from_pretrained(models / "bf16" / "source"))
    tuned.save_pretrained(tmp_path / "lora")
    merged = Merged(source, Adapter.open(tmp_path / "lora"), LLAMA)
    changed = [name for name in merged if merged.dtypes[name] == torch.float32]
    assert len(changed) == 2 and not any(torch.equal(merged[name], source[name].float()) for name in changed)
    assert all(torch.equal(merged[name], source[name]) for name in merged if name not in changed)
    alone = replace(job(models, tmp_path / "lora", tmp_path / "out", output="delta"), source=str(source.folder))

    outcome = Session(alone).run()
    assert not [text for text in outcome.warnings if "rounding moves along" in text]
    assert outcome.skipped.startswith("1 of 2 blocks")  # of what the adapter leaves alone nothing is run


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "parts, config, message",
    [
        ({"lora_magnitude_vector": (31,)}, {"use_dora": True}, r"lora_magnitude_vector \[31\] do not fit"),
        ({"lora_B.bias": (3,)}, {"lora_bias": True}, "do not fit|the bias of .* the source base has none"),
        ({}, {"use_dora": True}, r"lora_A \[2, 24\], lora_B \[32, 2\] do not fit"),  # DoRA without its magnitudes
        ({}, {"trainable_token_indices": [1]}, "but no trained token is in the adapter"),
        ({"lora_A.bias": (2,)}, {}, r"lora_A\.bias \[2\], .* do not fit"),
        ({"lora_A.weight": (3, 24)}, {}, r"lora_A \[3, 24\], lora_B \[32, 2\] do not fit"),
        ({"lora_B.weight": (31, 2)}, {}, r"lora_B \[31, 2\] do not fit .*q_proj.weight \[32, 24\] of the source base"),
    ],
)
def test_parts_that_do_not_fit_the_base(parts: dict, config: dict, message: str) -> None:
    layer = "model.layers.0.self_attn.q_proj"
    given = {**factors(), **{f"{PREFIX}{layer}.{part}": torch.ones(shape) for part, shape in parts.items()}}
    with pytest.raises(tt.InputRefused, match=message):
        Merged({f"{layer}.weight": torch.ones(32, 24)}, adapter(given, **config), LLAMA)


@pytest.mark.parametrize(
    "indices", [None, [1], [1, 1], [1, 60], [-1, 2], ["a", "b"], {"wte": [1, 2]}, [1.0, 2.0]], ids=str
)
def test_trained_tokens_that_are_no_rows(indices: object) -> None:
    key = f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta"
    config = {"trainable_token_indices": indices}
    with pytest.raises(tt.InputRefused, match="expected token ids|do not fit model.embed_tokens.weight"):
        Merged({"model.embed_tokens.weight": torch.ones(60, 24)}, adapter({key: torch.ones(2, 24)}, **config), LLAMA)


def test_layers_the_base_does_not_have() -> None:
    with pytest.raises(tt.InputRefused, match="changes the weight of model.layers.0.self_attn.q_proj, but the source"):
        Merged({"model.norm.weight": torch.ones(24)}, adapter(), LLAMA)


PEFT_MERGES = {
    "IA3": (IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]), "of type 'IA3'"),
    "LoHa": (LoHaConfig(target_modules=Q, r=2), "of type 'LOHA'"),
    "PiSSA": (
        LoraConfig(target_modules=Q, r=2, init_lora_weights="pissa"),
        "initialised by pissa, which changes the b",
    ),
    "classes": (IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="SEQ_CLS"), "of type 'IA3'"),
}


@pytest.mark.parametrize("name", PEFT_MERGES)
def test_the_line_of_a_refusal_merges(models: Path, tmp_path: Path, name: str) -> None:
    """The printed line, run as it is, leaves the tuned model."""
    config, why = PEFT_MERGES[name]
    source, classes = models / "causal" / "source", name == "classes"
    cls, options = (LlamaForSequenceClassification, {"num_labels": 3}) if classes else (AutoModelForCausalLM, {})
    torch.manual_seed(0)
    tuned = trained(config, cls.from_pretrained(source, **options))
    with torch.no_grad():
        expected = tuned(input_ids=IDS).logits
    tuned.save_pretrained(tmp_path / "it's")  # a name that a shell reads otherwise
    with pytest.raises(tt.InputRefused, match=why) as refused:
        Session(job(models, tmp_path / "it's", tmp_path / "out"))
    told, _, line = str(refused.value).partition(": python -c ")
    assert f"then move {(tmp_path / 'it').resolve()}'s-merged" in told
    [code] = shlex.split(line)
    exec(code, {})  # noqa: S102 the line itself is what is tested
    with torch.no_grad():
        found = cls.from_pretrained(tmp_path / "it's-merged")(input_ids=IDS).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    if not classes:
        assert Session(job(models, tmp_path / "it's-merged", tmp_path / "out")).prepared.coverage


def test_what_chance_decided_is_saved_again_by_its_trainer(models: Path, tmp_path: Path) -> None:
    """The cure of initialisations that cannot be made again, on the one that runs anywhere."""
    source = models / "causal" / "source"
    torch.manual_seed(0)
    config = LoraConfig(target_modules=Q, r=2, init_lora_weights="pissa_niter_2")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(source), config).eval()
    model.save_pretrained(tmp_path / "first")
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter) if parameter.requires_grad else 0
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
    model.save_pretrained(tmp_path / "random")
    with pytest.raises(tt.InputRefused, match="path_initial_model_for_weight_conversion=first"):
        Adapter.open(tmp_path / "random")
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "first"))
    merged = Merged(Checkpoint.open(source), Adapter.open(tmp_path / "plain"), LLAMA)
    own = AutoModelForCausalLM.from_pretrained(source)
    own.load_state_dict(dict(merged))
    with torch.no_grad():
        torch.testing.assert_close(own(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)


def test_prompts_are_no_weights(models: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(models / "causal" / "source")
    get_peft_model(base, PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")).save_pretrained(
        tmp_path / "p"
    )
    with pytest.raises(tt.InputRefused, match="of type PREFIX_TUNING, which puts trained vectors .* train a LoRA"):
        Session(job(models, tmp_path / "p", tmp_path / "out"))


def test_names_in_a_line_to_run_are_no_code(models: Path, tmp_path: Path) -> None:
    """A config is another's: what it says reaches no line that a user is told to run."""
    for side in ("source", "tuned"):
        (tmp_path / side).mkdir()
    (tmp_path / "tuned" / "adapter_config.json").write_text(json.dumps({"peft_type": "LOHA", "task_type": "x; y"}))
    save_file({"a": torch.ones(1)}, tmp_path / "tuned" / "adapter_model.safetensors")
    (tmp_path / "source" / "config.json").write_text(json.dumps({"architectures": ["os; import shutil"]}))
    save_file({"a": torch.ones(1)}, tmp_path / "source" / "model.safetensors")
    source, tuned = (Checkpoint.open(tmp_path / side) for side in ("source", "tuned"))
    with pytest.raises(tt.InputRefused, match="import AutoModelForCausalLM as M; from peft"):
        Adapter.of(tuned, source=source)
