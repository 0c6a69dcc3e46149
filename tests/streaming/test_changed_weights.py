"""Tensors as a tune or an update changes them, beside those of their base."""

import fnmatch

import pytest
import theseus_transport as tt
import torch
from helpers import tiny_models
from helpers.command import held
from peft import PeftModel
from theseus_transport.files.checkpoint import Checkpoint
from theseus_transport.models import tensors as tensors_module
from theseus_transport.models.text_families import LLAMA
from theseus_transport.streaming.changed_weights import Scaled, TunedWeights, UpdatedWeights
from theseus_transport.streaming.window import Window
from transformers import LlamaForCausalLM

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Q, DOWN, NORM = (f"model.layers.0.{name}.weight" for name in ("self_attn.q_proj", "mlp.down_proj", "input_layernorm"))
SOME = torch.tensor([0, 3, 4, 17, 299])


def window(folder):
    return Window(Checkpoint.open(folder))


def leaving(*patterns):
    return lambda name: any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def tuned_of(models, delta, *patterns):
    base = window(models / "causal/source")
    return base, TunedWeights(base, delta, LLAMA, leaving(*patterns))


def of_files(models, name, *patterns):
    folders = Checkpoint.open(models / "causal/source"), Checkpoint.open(models / name)
    return tuned_of(models, tt.Delta.between(*folders), *patterns)


def all_ways(weights, name):
    """A matrix as it is read whole, by the rows that are named, and by consecutive ones."""
    whole = weights[name]
    index = SOME[len(whole) > SOME]
    assert torch.equal(weights.take(name, index), whole[index])
    assert torch.equal(weights.rows(name, slice(2, 9)), whole[2:9])
    return whole


# --- S+ ---------------------------------------------------------------------------------------------------------------
def test_a_tune_is_read_under_the_names_of_its_base(models):
    base, weights = of_files(models, "causal/tuned")
    expected = held(models / "causal/tuned")
    for name in (EMBEDDING, HEAD, Q, DOWN, NORM):
        assert torch.equal(all_ways(weights, name), expected[name]) and weights.changes([name])
    assert base.shapes.keys() == expected.keys()


@pytest.mark.parametrize("name", ["lora", "patterns"])
def test_an_adapter_is_its_base_and_its_product_as_peft_merges_them(name, models):
    """With its scaling, 2 of the one, sqrt of the rank and patterns of the other; float32 sums in two orders."""
    delta = tt.Delta.from_adapter(models / name, Checkpoint.open(models / "causal/source"))
    base, weights = tuned_of(models, delta)
    merged = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(models / "causal/source"), models / name)
    expected = merged.merge_and_unload().state_dict()
    for layer in (Q, DOWN, NORM, EMBEDDING):
        found = all_ways(weights, layer)
        torch.testing.assert_close(found, expected[layer], rtol=1e-6, atol=1e-6)
        moves = not torch.equal(expected[layer], base[layer])
        assert weights.changes([layer]) == moves and torch.equal(found, base[layer]) != moves
    assert weights.changes([Q])


def test_what_is_left_behind_on_request_is_the_bases(models):
    base, weights = of_files(models, "causal/tuned", "layers.0.mlp.*", "lm_head*")
    for name in (DOWN, HEAD):
        assert torch.equal(all_ways(weights, name), base[name]) and not weights.changes([name])
    assert weights.changes([DOWN, HEAD, Q]) and not torch.equal(weights[Q], base[Q])


def test_rows_that_a_tune_added_to_a_vocabulary_are_no_rows_of_the_base(models, tmp_path):
    model = LlamaForCausalLM.from_pretrained(models / "causal/tuned")
    model.resize_token_embeddings(tiny_models.VOCABULARY + 8)
    model.save_pretrained(tmp_path)
    base, weights = tuned_of(
        models, tt.Delta.between(Checkpoint.open(models / "causal/source"), Checkpoint.open(tmp_path))
    )
    expected = held(models / "causal/tuned")
    for name in (EMBEDDING, HEAD):
        found = all_ways(weights, name)
        assert found.shape == base[name].shape and torch.equal(found, expected[name])
        assert weights.changes([name])


def test_a_tensor_of_another_shape_stays_the_bases(models, tmp_path):
    """A head over fewer outputs, as of another task."""
    model = LlamaForCausalLM.from_pretrained(models / "causal/tuned")
    model.lm_head = torch.nn.Linear(24, 7, bias=False)
    torch.manual_seed(0)
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    delta = tt.Delta.between(Checkpoint.open(models / "causal/source"), state)
    base, weights = tuned_of(models, delta)
    assert torch.equal(all_ways(weights, HEAD), base[HEAD]) and not weights.changes([HEAD])


def test_what_did_not_change_is_told_by_its_last_row(models):
    base = held(models / "causal/source")
    state = {name: value.clone() for name, value in base.items()}
    state[EMBEDDING][-1, -1] += 1
    own, weights = tuned_of(models, tt.Delta.between(Checkpoint.open(models / "causal/source"), state))
    assert weights.changes([EMBEDDING]) and weights.changes([Q, EMBEDDING])
    assert not weights.changes([Q, DOWN, NORM, HEAD]) and not weights.changes([])
    assert not weights.changes(["no.such.tensor"])


# --- T+ ---------------------------------------------------------------------------------------------------------------
def moved(models):
    folders = [models / f"causal/{name}" for name in ("source", "tuned", "target")]
    source, tuned, target = (LlamaForCausalLM.from_pretrained(folder) for folder in folders)
    ids = torch.randint(0, 300, (16, 16), generator=torch.Generator().manual_seed(1))
    alignment = tt.align(source, target, [{"input_ids": ids}], recipe="coherent")
    return tt.transport(alignment, tt.Delta.between(source, tuned), target)


@pytest.fixture(scope="module")
def update(models):
    return moved(models)


def updated(models, update):
    base = window(models / "causal/target")
    return base, UpdatedWeights(base, update)


@pytest.mark.parametrize("tile", [None, 7])
def test_the_update_is_added_to_its_base_whole_or_by_rows(tile, models, monkeypatch):
    """In tiles of seven rows, too, of which the rows that are asked for take the first, some, and the last."""
    if tile:
        monkeypatch.setattr(tensors_module, "TILE", 8 * 40 * tile)
    update = moved(models)
    assert len(update.tiles(EMBEDDING)) == (43 if tile else 0)
    base, weights = updated(models, update)
    for name in (EMBEDDING, HEAD, Q, DOWN):
        assert torch.equal(all_ways(weights, name), base[name] + update[name]) and bool(update[name].any())


def test_what_is_not_there_yet_is_the_bases(models, update, monkeypatch):
    base, weights = updated(models, update)
    monkeypatch.setattr(update.available, "ready", lambda key: "layers.0" not in key)
    for name in (Q, DOWN, NORM):
        assert torch.equal(weights[name], base[name])
    assert not torch.equal(weights[HEAD], base[HEAD])


def test_a_block_is_made_once_until_it_is_forgotten(models, update, monkeypatch):
    _, weights = updated(models, update)
    made = weights[Q], weights[DOWN]
    assert weights[Q] is made[0]
    weights.forget(Q)
    assert weights[Q] is not made[0] and torch.equal(weights[Q], made[0]) and weights[DOWN] is made[1]
    weights.forget()
    assert weights[DOWN] is not made[1]


@pytest.mark.parametrize("alpha", [0.25, 2.0])
def test_another_strength_is_so_much_of_the_update(alpha, models, update):
    base, weights = updated(models, update)
    scaled = Scaled(base, weights, alpha)
    for name in (EMBEDDING, Q):
        torch.testing.assert_close(scaled[name], base[name] + alpha * update[name], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(scaled.take(name, SOME[:4]), scaled[name][SOME[:4]], rtol=0, atol=0)
        torch.testing.assert_close(scaled.rows(name, slice(2, 9)), scaled[name][2:9], rtol=0, atol=0)
    assert torch.equal(Scaled(base, weights, 1.0)[Q], weights[Q])
