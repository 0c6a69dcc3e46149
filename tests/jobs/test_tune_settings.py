"""What a tune's config changed of the forward pass is named; what changes no forward pass is no news."""

import json

import pytest
from helpers.broken_inputs import edited
from helpers.command import FAST, call, outcome_of
from theseus_transport.files.checkpoint import Checkpoint
from theseus_transport.jobs.tune_settings import warn_of_settings
from transformers import GPT2Config, GPT2LMHeadModel

KEPT = "TARGET keeps its own settings, and what was learnt under others may not carry over"
ROPE = {"rope_theta": 500000.0, "rope_type": "linear", "factor": 4.0}
CHANGED = {
    "causal": [
        ({"rms_norm_eps": 1e-5}, ["rms_norm_eps 1e-05 instead of 1e-06"]),
        ({"hidden_act": "gelu"}, ["hidden_act gelu instead of silu"]),
        ({"rope_parameters": ROPE}, ["rope_theta 500000.0 instead of 10000.0", "rope_type linear instead of default",
                                     "factor 4.0 instead of nothing"]),
        ({"attention_bias": True, "some_multiplier": 2.0}, ["attention_bias True instead of False",
                                                             "some_multiplier 2.0 instead of nothing"]),
    ],
    "image": [({"layer_norm_eps": 1e-6, "hidden_act": "relu"}, ["layer_norm_eps 1e-06 instead of 1e-12",
                                                                "hidden_act relu instead of gelu"])],
}  # fmt: skip
INERT = {"attention_dropout": 0.1, "use_cache": False, "eos_token_id": 7, "dtype": "bfloat16", "pad_token_id": None,
         "_name_or_path": "x", "architectures": ["Other"], "transformers_version": "4.0", "initializer_range": 1.0,
         "max_position_embeddings": 128, "tie_word_embeddings": True, "id2label": {"0": "a"}}  # fmt: skip


def warned(caplog, *folders):
    warn_of_settings(*(Checkpoint.open(folder) for folder in folders))
    return caplog.messages


@pytest.mark.parametrize("pair, config, said", [(pair, *one) for pair, each in CHANGED.items() for one in each])
def test_what_the_forward_pass_follows_is_named(models, tmp_path, caplog, pair, config, said):
    tuned = edited(tmp_path / "tuned", models / pair / "tuned", config=config)
    (message,) = warned(caplog, models / pair / "source", tuned)
    assert all(part in message for part in said) and message.count(" instead of ") == len(said), message
    assert message.startswith("the tune's config changes what its forward pass does: ") and message.endswith(KEPT)


@pytest.mark.parametrize("name, value", INERT.items())
def test_what_changes_no_forward_pass_is_no_news(models, tmp_path, caplog, name, value):
    tuned = edited(tmp_path / "tuned", models / "causal/tuned", config={name: value})
    assert warned(caplog, models / "causal/source", tuned) == []


def test_a_default_left_out_is_the_same_as_the_default_said(models, tmp_path, caplog):
    tuned = edited(tmp_path / "tuned", models / "causal/tuned")
    config = json.loads((tuned / "config.json").read_text())
    for name in ("rms_norm_eps", "hidden_act", "attention_bias", "rope_parameters"):
        del config[name]
    (tuned / "config.json").write_text(json.dumps(config))
    assert warned(caplog, models / "causal/source", tuned) == []
    assert warned(caplog, models / "causal/source", models / "lora") == []  # has no config


def test_other_names_of_other_families(tmp_path, caplog):
    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 8, "vocab_size": 9, "bos_token_id": 0}
    for name, more in (("source", {}), ("tuned", {"activation_function": "relu", "layer_norm_epsilon": 1e-3,
                                                  "scale_attn_by_inverse_layer_idx": True})):  # fmt: skip
        GPT2LMHeadModel(GPT2Config(**sizes, eos_token_id=0, **more)).save_pretrained(tmp_path / name)
    (message,) = warned(caplog, tmp_path / "source", tmp_path / "tuned")
    assert "activation_function relu instead of gelu_new" in message and "layer_norm_epsilon 0.001 ins" in message
    assert "scale_attn_by_inverse_layer_idx True instead of False" in message and message.count(" instead of ") == 3


def test_it_reaches_the_screen_the_card_and_programs(models, tmp_path):
    tuned = edited(tmp_path / "tuned", models / "causal/tuned", config={"hidden_act": "gelu"})
    sides = (models / "causal/source", tuned, models / "causal/target")
    said = f"hidden_act gelu instead of silu; {KEPT}"
    told = call("transport", *sides, tmp_path / "out", "--calibration", models / "ids.safetensors", *FAST).stdout
    assert said in told and said in (tmp_path / "out/README.md").read_text()
    assert any(said in warning for warning in outcome_of(tmp_path / "out")["warnings"])
