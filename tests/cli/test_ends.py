"""Heads that are tied to the embedding, or are not, in base, tune and target; moved to a copy they are the tune's."""

import json

import pytest
import theseus_transport as tt
import torch
from helpers import tiny_models
from helpers.ended import (
    EMBEDDING,
    EXACT,
    HEAD,
    IDS,
    ROWS,
    adapter,
    build,
    error,
    fates,
    logits,
    move,
    saved,
    with_adapter,
)
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from theseus_transport.jobs.verify import verify
from transformers import AutoModelForCausalLM

TIES = "the target ties its head to the embedding"
TIED_ADAPTERS = {  # options; whether embedding and head are written whole
    "head": ({"modules_to_save": ["lm_head"]}, False, True),
    "embedding": ({"modules_to_save": ["embed_tokens"]}, True, False),
    "both": ({"modules_to_save": ["embed_tokens", "lm_head"]}, True, True),
    "ensured": ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True, True),
    "ensured-head": ({"modules_to_save": ["lm_head"], "ensure_weight_tying": True}, True, True),
    "ensured-both": ({"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}, True, True),
    "factors": ({"target_modules": ["q_proj", "lm_head"]}, False, False),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return build(tmp_path_factory.mktemp("ends"))


@pytest.mark.parametrize("kind", TIED_ADAPTERS)
def test_an_adapter_of_a_tied_base_moves_to_an_untied_copy(root, tmp_path, kind):
    """Head and embedding each move from what the base has there, the embedding."""
    options, embedding, head = TIED_ADAPTERS[kind]
    given = adapter(tmp_path / "given", root / "tied", **options)
    outcome = move(root, tmp_path / "out", "tied", given, "apart")
    base, tuned = logits(AutoModelForCausalLM.from_pretrained(root / "tied")), with_adapter(root / "tied", given)
    assert error(with_adapter(root / "apart", tmp_path / "out"), tuned, base) < EXACT
    assert saved(tmp_path / "out") == [HEAD] * head + [EMBEDDING] * embedding
    stay = {n for n, (fate, note) in fates(outcome).items() if fate != "transported" and not note.startswith("nothing")}
    assert stay == ({HEAD} if kind == "factors" else set())
    assert verify(tmp_path / "out") == []


@pytest.mark.parametrize("kind", TIED_ADAPTERS)
def test_an_adapter_of_a_tied_base_moves_to_a_tied_copy(root, tmp_path, kind):
    """What is one tensor in tune and target moves as one; a head of its own stays behind and is told."""
    options, embedding, head = TIED_ADAPTERS[kind]
    given = adapter(tmp_path / "given", root / "tied", **options)
    outcome = move(root, tmp_path / "out", "tied", given, "tied")
    base, tuned = logits(AutoModelForCausalLM.from_pretrained(root / "tied")), with_adapter(root / "tied", given)
    moved = with_adapter(root / "tied", tmp_path / "out")
    assert verify(tmp_path / "out") == []
    if kind in ("head", "both"):
        assert fates(outcome)[HEAD] == ("left", TIES) and any(TIES in text for text in outcome.warnings)
        assert saved(tmp_path / "out") == [EMBEDDING] * embedding
    else:
        assert error(moved, tuned, base) < EXACT and not any(TIES in text for text in outcome.warnings)
        assert saved(tmp_path / "out") == [HEAD] * head + [EMBEDDING] * embedding


@pytest.mark.parametrize("kind", ["head", "both", "ensured", "factors"])
@pytest.mark.parametrize("target", ["wide", "wide-tied"])
def test_adapters_load_on_another_base(root, tmp_path, kind, target):
    given = adapter(tmp_path / "given", root / "tied", **TIED_ADAPTERS[kind][0])
    move(root, tmp_path / "out", "tied", given, target)
    base = logits(AutoModelForCausalLM.from_pretrained(root / target))
    assert not torch.equal(with_adapter(root / target, tmp_path / "out"), base) and verify(tmp_path / "out") == []


def test_a_checkpoint_cannot_carry_factors_of_a_tied_head(root, tmp_path):
    given = adapter(tmp_path / "given", root / "tied", target_modules=["q_proj", "lm_head"])
    outcome = move(root, tmp_path / "out", "tied", given, "tied", output="checkpoint")
    assert fates(outcome)["lm_head"] == ("left", TIES) and any(TIES in text for text in outcome.warnings)
    only = adapter(tmp_path / "only", root / "tied", target_modules=["lm_head"])
    with pytest.raises(tt.InputRefused, match=f"nothing to transport: .*{TIES}"):
        move(root, tmp_path / "none", "tied", only, "tied", output="checkpoint")


MERGED = {
    "head": ({"use_dora": True, "modules_to_save": ["lm_head"]}, [HEAD]),
    "embedding": ({"use_dora": True, "modules_to_save": ["embed_tokens"]}, [EMBEDDING]),
    "factors": ({"use_dora": True, "target_modules": ["q_proj", "lm_head"]}, [HEAD]),
    "one": ({"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}, []),
}


@pytest.mark.parametrize("kind", MERGED)
@pytest.mark.parametrize("target", ["apart", "tied"])
def test_a_merged_adapter_of_a_tied_base(root, tmp_path, kind, target):
    """As PEFT runs it, head and embedding are two where the adapter changed one, unless it ensures tying."""
    options, alone = MERGED[kind]
    given = adapter(tmp_path / "given", root / "tied", **options)
    outcome = move(root, tmp_path / "out", "tied", given, target, output="checkpoint")
    base, tuned = logits(AutoModelForCausalLM.from_pretrained(root / "tied")), with_adapter(root / "tied", given)
    said = [text.split(":")[0] for text in outcome.warnings if TIES in text]
    if target == "tied" and alone:
        assert said == [alone[0].removeprefix("model.")]
    else:
        assert error(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), tuned, base) < EXACT and not said
    assert verify(tmp_path / "out") == []


@pytest.mark.parametrize("own", [True, False], ids=["own-head", "one-tensor"])
@pytest.mark.parametrize("target", ["apart", "tied"])
def test_a_full_tune_of_a_tied_base(root, tmp_path, own, target):
    """A tune that trained its head apart from the embedding, as merged adapters have it."""
    tuned = tiny_models.tuned(AutoModelForCausalLM.from_pretrained(root / ("apart" if own else "tied")))
    tuned.save_pretrained(tmp_path / "tuned")
    outcome = move(root, tmp_path / "out", "tied", tmp_path / "tuned", target)
    if own and target == "tied":
        assert fates(outcome)[HEAD] == ("left", TIES) and any(
            HEAD in text and TIES in text for text in outcome.warnings
        )
    else:
        base, moved = (logits(AutoModelForCausalLM.from_pretrained(p)) for p in (root / "tied", tmp_path / "out"))
        assert error(moved, logits(tuned), base) < EXACT
    assert verify(tmp_path / "out") == []


@pytest.mark.parametrize("ties", [True, False])
def test_a_full_tune_of_an_untied_base_without_a_head(root, tmp_path, ties):
    """Tied by its config, its head is its embedding; else nothing tells what its head is."""
    tuned = tiny_models.tuned(AutoModelForCausalLM.from_pretrained(root / "untied"))
    tuned.lm_head.weight.data = tuned.model.embed_tokens.weight.data.clone()
    tuned.save_pretrained(tmp_path / "tuned")
    weights = load_file(tmp_path / "tuned" / "model.safetensors")
    weights.pop(HEAD, None)
    save_file(weights, tmp_path / "tuned" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "tuned" / "config.json").read_text()) | {"tie_word_embeddings": ties}
    (tmp_path / "tuned" / "config.json").write_text(json.dumps(config))
    outcome = move(root, tmp_path / "out", "untied", tmp_path / "tuned", "untied")
    base, moved = (logits(AutoModelForCausalLM.from_pretrained(p)) for p in (root / "untied", tmp_path / "out"))
    if ties:
        assert error(moved, logits(tuned), base) < EXACT and fates(outcome)[HEAD][0] == "transported"
    else:
        assert fates(outcome)[HEAD] == ("left", "the tuned model has no such tensor")
        assert any(HEAD in text for text in outcome.warnings)


@pytest.mark.parametrize("fault", ["no head", "no embedding", "not asked for", "not targeted"])
def test_verify_knows_what_peft_does_not_load(root, tmp_path, fault):
    given = adapter(tmp_path / "given", root / "tied", **TIED_ADAPTERS["ensured"][0])
    move(root, tmp_path / "out", "tied", given, "tied")
    weights, path = load_file(tmp_path / "out" / "adapter_model.safetensors"), tmp_path / "out" / "adapter_config.json"
    config, said = json.loads(path.read_text()), "which is in no file"
    if fault == "no head":
        del weights[f"base_model.model.{HEAD}"]
    elif fault == "no embedding":
        del weights[f"base_model.model.{EMBEDDING}"]
    elif fault == "not asked for":
        config, said = config | {"modules_to_save": None}, "modules_to_save do not name"
    else:
        config, said = config | {"target_modules": ["k_proj"]}, "target_modules do not name"
    save_file(weights, tmp_path / "out" / "adapter_model.safetensors")
    path.write_text(json.dumps(config))
    assert any(said in text for text in verify(tmp_path / "out"))


def test_every_misfit_is_named_at_once(root):
    base = AutoModelForCausalLM.from_pretrained(root / "untied")
    state = {**base.state_dict(), "model.layers.0.mlp.up_proj.weight": torch.ones(33, 24)}
    state |= {
        "model.layers.1.mlp.up_proj.weight": torch.ones(34, 24),
        "model.layers.0.self_attn.q_proj.bias": torch.ones(7),
    }
    maps = tt.align(base, base, [{"input_ids": IDS}])
    with pytest.raises(tt.InputRefused) as refused:
        tt.transport(maps, tt.Delta.between(base, state), base)
    for text in (
        "0.mlp.up_proj.weight is [33, 24]",
        "1.mlp.up_proj.weight is [34, 24]",
        "bias is [7] in the tuned model",
    ):
        assert text in str(refused.value)
    assert "--leave 'layers.0.self_attn.q_proj*'" in str(refused.value)


def test_factors_that_are_zero(root, tmp_path):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(root / "untied"), LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "untrained")
    with pytest.raises(tt.InputRefused, match="nothing to transport: every LoRA of the adapter is zero"):
        move(root, tmp_path / "out", "untied", tmp_path / "untrained", "wide")
    model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight.data.fill_(0.1)
    model.save_pretrained(tmp_path / "half")
    outcome = move(root, tmp_path / "out", "untied", tmp_path / "half", "wide")
    assert fates(outcome)["layers.1.self_attn.q_proj"] == ("unchanged", "its factors are zero")
    assert any("the LoRA of 1 layers is zero" in text for text in outcome.warnings)


def test_activations_that_are_zero(root, caplog):
    """Of a norm: nothing could move. Of a block's middle: what belongs to it does not, and that is told."""
    base, batch = AutoModelForCausalLM.from_pretrained(root / "untied"), {"input_ids": IDS}
    for name, said in (
        ("model.embed_tokens", None),
        ("model.layers.1.mlp.up_proj", "space 1.middle are zero in the target"),
    ):
        dead = AutoModelForCausalLM.from_pretrained(root / "untied")
        dead.get_submodule(name).weight.data.zero_()
        if said:
            tt.align(base, dead, [batch])
            assert any(said in record.message for record in caplog.records)
        else:
            with pytest.raises(tt.InputRefused, match="are zero in the target; are all its weights in the checkpoint"):
                tt.align(base, dead, [batch])
    spans = torch.arange(12)[None, :, None] + torch.tensor([0, 1])
    apart = [batch | {"offsets": (spans + start).repeat(len(IDS), 1, 1)} for start in (0, 1000)]
    with pytest.raises(tt.InputRefused, match=r"no token that is not masked, or \(by offsets\) none both models have"):
        tt.align(base, base, [tuple(apart)])


def test_offsets_that_never_meet(root, tmp_path):
    sides = {f"{side}.input_ids": torch.randint(0, ROWS, (24, 16)) for side in ("source", "target")}
    spans = torch.arange(16)[None, :, None] + torch.tensor([0, 1]) + torch.zeros(24, 1, 1, dtype=torch.int64)
    save_file(sides | {"source.offsets": spans, "target.offsets": spans + 1000}, tmp_path / "apart.safetensors")
    given = adapter(tmp_path / "given", root / "untied")
    with pytest.raises(tt.InputRefused, match=r"zero in the source and the target; .* token of the other \(offsets\)"):
        move(root, tmp_path / "out", "untied", given, "wide", tmp_path / "apart.safetensors")
