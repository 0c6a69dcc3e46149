"""Edges of the API where results or errors once were wrong; each test names the behaviour."""

import json

import pytest
import torch
from alignment.test_alignment import aligned
from exact.models import LLAMA, LLAMA_TIED, base, batches, tune
from linalg.test_procrustes import draw, known
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from theseus_transport import Alignment, Delta, InputRefused, Recipe, align, transport
from theseus_transport.linalg.procrustes import procrustes
from theseus_transport.models.text_families import LLAMA as LLAMA_FAMILY
from theseus_transport.updates.adapter import Adapter
from updates.test_delta import PLAIN, Watched, factors
from updates.test_update import SOURCE, TARGET, TUNED, moved


@pytest.mark.parametrize("shape", [(8, 8), (8, 6), (6, 8)], ids=str)
def test_completing_a_determined_map_changes_nothing(shape):
    c, toward = draw(*shape), draw(*shape, seed=1)
    partial, completed = procrustes(c), procrustes(c, null="completed", toward=toward)
    assert torch.equal(completed.rank, partial.rank)
    torch.testing.assert_close(completed.map, partial.map, rtol=0, atol=1e-13)


def test_completing_toward_what_says_nothing_new_changes_nothing():
    c = known((12, 10), torch.tensor([1.0] * 3 + [0.0] * 7).double())[2]
    completed = procrustes(c, null="completed", toward=3 * c)
    assert int(completed.rank) == 3
    torch.testing.assert_close(completed.map, procrustes(c).map, rtol=0, atol=1e-13)


def test_completed_maps_are_isometries_to_rounding():
    c = known((12, 10), torch.tensor([1.0] * 3 + [0.0] * 7).double())[2]
    t = procrustes(c, null="completed", toward=c + 1e-5 * draw(12, 10)).map
    assert float((t @ t.T @ t - t).norm()) <= 64 * 12 * 10**0.5 * 2.3e-16  # the certificate's own bound


def test_a_coherent_alignment_can_be_saved(tmp_path):
    Alignment.load(aligned("llama").save(tmp_path / "maps"))


def test_a_norm_left_on_request_is_not_folded():
    name = "layers.0.input_layernorm.weight"
    update = moved(leave=[name])
    assert {row.tensor: row.fate for row in update.coverage}[name] == "left"
    plain = moved({**TUNED, f"model.{name}": SOURCE.state[f"model.{name}"]})
    assert torch.equal(
        update["model.layers.0.self_attn.q_proj.weight"], plain["model.layers.0.self_attn.q_proj.weight"]
    )


@pytest.mark.parametrize("left, stays", [("bias", "weight"), ("weight", "bias")])
def test_weight_and_bias_are_left_one_by_one(left, stays):
    source, target = (base(LLAMA, attention_bias=True, seed=seed) for seed in (0, 5))
    alignment = align(source.build(), target.build(), batches(source, seed=3), recipe="coherent")
    layer = "layers.0.self_attn.q_proj"
    delta = Delta.between(source.state, tune(source, "everything").state)
    update = transport(alignment, delta, target.state, leave=[f"{layer}.{left}"])
    fates = {row.tensor: row.fate for row in update.coverage}
    assert fates[f"{layer}.{left}"] == "left" and fates[f"{layer}.{stays}"] == "transported"


def test_a_bias_without_a_place_is_no_transport():
    source = base(LLAMA, attention_bias=True)
    alignment = align(source.build(), base(LLAMA, seed=5).build(), batches(source, seed=3), recipe="coherent")
    name = "layers.0.self_attn.q_proj.bias"
    tuned = {**source.state, f"model.{name}": source.state[f"model.{name}"] + 1, "lm_head.weight": torch.zeros(60, 24)}
    update = transport(alignment, Delta.between(source.state, tuned), base(LLAMA, seed=5).state)
    assert {row.tensor: row.fate for row in update.coverage}[name] == "left"


@pytest.mark.parametrize("config", [{"intermediate_size": 44}, {"num_attention_heads": 6}, {"num_hidden_layers": 1}])
def test_bases_of_other_sizes_are_refused_at_once(config):
    other = base(LLAMA, **config)
    with pytest.raises(InputRefused, match="was the right base given"):
        delta = Delta.between(other.state, tune(other, "linear").state)
        transport(_same_sizes(), delta, TARGET.state)
    wide = base(LLAMA, seed=5, width=36, **({"intermediate_size": 44} | config | {"num_hidden_layers": 3}))
    with pytest.raises(InputRefused, match="was the right base given"):
        transport(_same_sizes(), Delta.between(SOURCE.state, TUNED), wide.state)


def _same_sizes():
    import test_update

    return test_update.aligned(intermediate_size=44)


def test_a_tied_head_that_did_not_change_is_not_left():
    source = base(LLAMA_TIED, tie_word_embeddings=True)
    target = base(LLAMA, seed=5)
    models = source.build(), tune(source, "linear").build()
    update = transport(align(models[0], target.build(), batches(source, seed=3)), Delta.between(*models), target.state)
    assert "left" not in {row.fate for row in update.coverage}


def test_a_full_update_is_no_adapter(tmp_path):
    with pytest.raises(
        InputRefused, match=r"has no factors; transport\(\.\.\., rank=16\) makes some, or write it as a ch"
    ):
        moved().save_adapter(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def damage(name, folder):
    record = json.loads((folder / "alignment.json").read_text())
    if name == "no maps":
        (folder / "maps.safetensors").unlink()
    elif name == "torn maps":
        (folder / "maps.safetensors").write_bytes((folder / "maps.safetensors").read_bytes()[:1000])
    elif name == "a map missing":
        save_file({"0.attention/matrix": torch.ones(2, 2)}, folder / "maps.safetensors")
    elif name == "no rules":
        (folder / "alignment.json").write_text(json.dumps({k: v for k, v in record.items() if k != "rules"}))
    else:
        (folder / "alignment.json").write_text("[]")


@pytest.mark.parametrize("name", ["no maps", "torn maps", "a map missing", "no rules", "a list"])
def test_damaged_alignments_are_refused(tmp_path, name):
    folder = aligned("llama", "paper").save(tmp_path / "maps")
    damage(name, folder)
    with pytest.raises(InputRefused, match="maps"):
        Alignment.load(folder)


def test_asking_whether_a_tensor_is_there_reads_nothing():
    after = Watched(SOURCE.state)
    assert "norm.weight" in Delta.between(SOURCE.state, after).tuned_tensors(LLAMA_FAMILY) and not after.read


def test_asking_whether_an_update_holds_a_name_computes_nothing(monkeypatch):
    update = moved()
    monkeypatch.setattr(type(update), "__getitem__", lambda *_: pytest.fail("computed"))
    assert "lm_head.weight" in update and "nonsense" not in update


def test_rank_of_the_factors_is_the_rank_of_the_configuration():
    with pytest.raises(InputRefused, match="rank"):
        Adapter({**PLAIN, "r": 3}, factors()).factors("model.layers.0.self_attn.q_proj")


def test_recipes_are_checked_before_any_data():
    for wrong in ({"null": "best"}, {"floor": 1.0}):
        with pytest.raises(InputRefused):
            Recipe(**wrong)


def test_a_model_aligned_with_itself():
    model = SOURCE.build()
    t = align(model, model, batches(SOURCE, seed=3)).maps["final"]
    torch.testing.assert_close(t(torch.eye(24).double()), torch.eye(24).double(), rtol=0, atol=1e-4)


def test_masked_batches_add_nothing_and_alone_are_refused():
    models, (good,) = (SOURCE.build(), TARGET.build()), batches(SOURCE, seed=3, count=1)
    ids = good["input_ids"]
    masked = {"input_ids": ids.flip(0), "attention_mask": torch.zeros_like(ids)}
    with pytest.raises(InputRefused, match="no token that is not masked"):
        align(*models, [masked])
    alone, beside = (align(*models, given).maps["final"] for given in ([good], [good, masked]))
    assert torch.equal(alone(torch.eye(24).double()), beside(torch.eye(24).double()))


@pytest.mark.parametrize("given", [{"input_ids": torch.zeros(1, 2).long()}, torch.zeros(1, 2).long()])
def test_batches_that_are_no_list(given):
    with pytest.raises(InputRefused, match=r"must be a list of batches, .* give \[batch\]"):
        align(SOURCE.build(), TARGET.build(), given)


def test_floor_follows_the_precision_of_both_models():
    given = batches(SOURCE, seed=3, count=1)
    single = [m.float() for m in (SOURCE.build(), TARGET.build())]
    assert align(SOURCE.build(), TARGET.build(), given).recipe.floor == 1e-12
    assert (
        align(*single, given).recipe.floor
        == align(SOURCE.build(), TARGET.build(), given, floor=1e-6).recipe.floor
        == 1e-6
    )


def test_a_peft_model_is_no_base():
    with pytest.raises(InputRefused, match="this is a PEFT model: give its base"):
        Delta.between(get_peft_model(SOURCE.build(), LoraConfig(target_modules=["q_proj"])), TUNED)


def test_forward_arguments_that_are_no_tensors():
    models = SOURCE.build(), TARGET.build()
    assert align(*models, [{**b, "output_hidden_states": False} for b in batches(SOURCE, seed=3)]).maps
