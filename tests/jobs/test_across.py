"""The command between unlike models: other families of one kind, other depths, parts of fused layers."""

import json

import pytest
import torch
from helpers import tiny_models
from helpers.command import COHERENT, FAST, call, held, invoke, outcome_of, refused
from peft import PeftModel
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM


def gpt2(width, heads):
    sizes = dict(
        n_embd=width, n_head=heads, n_layer=2, n_inner=2 * width, n_positions=32, vocab_size=tiny_models.VOCABULARY
    )
    return tiny_models.randomised(GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("across")
    torch.manual_seed(0)
    made = {
        "two": tiny_models.llama("source"),
        "three": tiny_models.llama("target", depth=3),
        "deep": tiny_models.llama("source", depth=3),
    }
    sizes = dict(hidden_size=40, num_attention_heads=5, num_key_value_heads=5, intermediate_size=48)
    config = Qwen2Config(**sizes, num_hidden_layers=2, vocab_size=tiny_models.VOCABULARY, max_position_embeddings=64)
    made |= {"qwen2": tiny_models.randomised(Qwen2ForCausalLM(config)), "shallow": tiny_models.llama("target")}
    made |= {"gpt2": gpt2(24, 4), "wide-gpt2": gpt2(36, 6)}
    for layer in (made["deep"].model.layers[0].self_attn.o_proj, made["deep"].model.layers[0].mlp.down_proj):
        layer.weight.data.zero_()
    for name, model in made.items():
        model.save_pretrained(root / name)
    for name in ("two", "gpt2"):
        tiny_models.tuned(made[name]).save_pretrained(root / f"{name}-tuned")
    tiny_models.adapter(root / "lora", made["two"], target_modules=["q_proj", "down_proj"])
    tiny_models.adapter(root / "last", made["deep"], target_modules=["q_proj"], layers_to_transform=[2])
    tiny_models.adapter(root / "fused", made["gpt2"], target_modules=["c_attn"], fan_in_fan_out=True)
    save_file({"input_ids": torch.randint(0, tiny_models.VOCABULARY, (24, 16))}, root / "ids.safetensors")
    return root


def moved(root, out, source, tuned, target, *options):
    folders = (root / name for name in (source, tuned, target))
    invoke("transport", *folders, out, "--calibration", root / "ids.safetensors", *COHERENT, *options)
    return outcome_of(out)


def fates(outcome):
    return {row["tensor"]: (row["fate"], row["note"]) for row in outcome["coverage"]}


def test_a_llama_tune_becomes_a_qwen2_tune(root, tmp_path):
    """The target has biases the source has not: they stay, and nothing asks the source for them."""
    out = tmp_path / "out"
    moved(root, out, "two", "two-tuned", "qwen2")
    base, written = held(root / "qwen2"), held(out)
    assert written.keys() == base.keys()
    for name, tensor in base.items():
        assert torch.equal(written[name], tensor) == (name.endswith(".bias") or "norm" in name), name
    assert call("verify", out).exit_code == 0


@pytest.mark.parametrize("tuned, rank", [("lora", 4)])
def test_an_adapter_for_a_deeper_model_touches_the_fed_blocks_only(root, tmp_path, tuned, rank):
    out = tmp_path / "out"
    outcome = moved(root, out, "two", tuned, "three")
    fed = [b for b, own in enumerate(outcome["blocks"]) if own is not None]
    assert len(outcome["blocks"]) == 3 and len(fed) == 2
    layers = {name.split(".lora_")[0].removeprefix("base_model.model.model.layers.") for name in held(out)}
    assert layers == {f"{b}.{layer}" for b in fed for layer in ("self_attn.q_proj", "mlp.down_proj")}
    loaded = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(root / "three"), out)
    adapted = {name for name, _ in loaded.named_modules() if name.endswith(".lora_A.default")}
    assert len(adapted) == len(layers) and json.loads((out / "adapter_config.json").read_text())["r"] == rank


def test_a_block_that_only_a_guess_would_lose_is_moved(root, tmp_path):
    """An adapter of the last of three blocks, the first of which does nothing, for a model of two."""
    outcome = moved(root, tmp_path / "out", "deep", "last", "shallow")
    assert outcome["blocks"] == [1, 2]
    assert fates(outcome) == {"layers.2.self_attn.q_proj": ("transported", "as factors")}
    folders = (root / name for name in ("deep", "last", "shallow"))
    invoke("transport", *folders, tmp_path / "dry", "--calibration", root / "ids.safetensors", *COHERENT, "--dry-run")


def test_coverage_is_of_what_was_written(root, tmp_path):
    """A final norm that its head reads is folded, in the report as in the library."""
    outcome = moved(root, tmp_path / "out", "two", "two-tuned", "shallow")
    assert fates(outcome)["norm.weight"] == ("folded", "into its readers")


def test_one_part_of_a_fused_layer_can_be_left(root, tmp_path):
    out = tmp_path / "out"
    outcome = moved(root, out, "gpt2", "fused", "wide-gpt2", "--leave", "h.*.attn.c_attn.q")
    assert fates(outcome)["h.0.attn.c_attn.q"] == ("left", "left on request")
    for name, tensor in held(out).items():
        if name.endswith("lora_B.weight"):
            q, k, v = tensor.chunk(3)
            assert not q.any() and k.any() and v.any(), name


def test_kinds_that_do_not_mix(root, tmp_path):
    folders = (root / name for name in ("two", "lora", "gpt2"))
    refused(
        "whose norms are of kind rms, target is gpt2, whose norms are of kind layer",
        *("transport", *folders, tmp_path, "--recipe", "coherent"),
    )


def test_an_effect_moves_between_any_kinds(root, tmp_path):
    """Only the residual stream has to correspond."""
    folders = (root / name for name in ("two", "two-tuned", "gpt2"))
    invoke("transport", *folders, tmp_path / "out", "--calibration", root / "ids.safetensors", *FAST)
    assert outcome_of(tmp_path / "out")["job"]["recipe"]["prior"] == "none"
    assert {fate for fate, _ in fates(outcome_of(tmp_path / "out")).values()} >= {"fitted", "transported"}
    invoke("verify", tmp_path / "out")
