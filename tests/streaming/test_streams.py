"""The recipe `effect` as it streams: what it fits is what is said by hand, and a file and a module give one result."""

import pytest
import theseus_transport as tt
import torch
from helpers import tiny_models
from helpers.effect_by_hand import effect_by_hand
from transformers import GPT2Config, GPT2LMHeadModel

IDS = torch.randint(1, tiny_models.VOCABULARY, (24, 32), generator=torch.Generator().manual_seed(5))
BATCHES = [{"input_ids": rows} for rows in IDS.split(8)]


def gpt2(side):
    width, heads, *_ = tiny_models.SIZES[side]
    config = GPT2Config(
        n_embd=width, n_head=heads, n_layer=2, vocab_size=tiny_models.VOCABULARY, n_positions=64, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    return tiny_models.randomised(GPT2LMHeadModel(config))


@pytest.fixture(params=[tiny_models.llama, gpt2], ids=["llama", "gpt2"])
def models(request):
    """Source, a tune of its blocks, and target, in float64."""
    torch.manual_seed(4)
    source, target = (request.param(side).double() for side in ("source", "target"))
    tuned = tiny_models.tuned(source)
    for (name, moved), base in zip(tuned.named_parameters(), source.parameters(), strict=True):
        if ".layers." not in name and ".h." not in name:
            moved.data.copy_(base.data)
    return source, tuned, target


def moved(source, tuned, target, **choices):
    alignment = tt.align(source, target, BATCHES, recipe=tt.Recipe("effect", **choices))
    return tt.transport(alignment, tt.Delta.between(source, tuned), target)


def test_fits_are_those_said_by_hand(models):
    """Through different code, which runs whole models again after every fit; Llama's norm rounds to float32 inside."""
    update = moved(*models, prior="none", ridge=1e-2)
    expected = effect_by_hand(*models, BATCHES, prior_update=None, rho=1e-2)
    assert update.keys() == expected.keys()
    for name, value in expected.items():
        assert (update[name] - value).norm() <= 1e-6 * value.norm(), name


def test_a_fit_behind_a_prior_sees_what_the_prior_moved(models):
    prior = moved(*models, prior="coherent", fit=False)
    update = moved(*models, prior="coherent", ridge=1e-2)
    expected = effect_by_hand(*models, BATCHES, prior_update=dict(prior), rho=1e-2)
    for name, value in expected.items():
        assert (update[name] - prior[name] - value).norm() <= 1e-5 * value.norm(), name
    for name in update.keys() - expected.keys():
        assert torch.equal(update[name], prior[name])


def test_what_follows_a_fit_sees_it_as_it_was_cut(models):
    """To rank 2, as factors: from a full tune, and behind the biases that stay."""
    source, tuned, target = models
    alignment = tt.align(source, target, BATCHES, recipe=tt.Recipe("effect", prior="none", ridge=1e-2))
    update = tt.transport(alignment, tt.Delta.between(source, tuned), target, rank=2)
    expected = effect_by_hand(*models, BATCHES, rho=1e-2, rank=2, bias=False)
    assert update.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.linalg.matrix_rank(update[name], rtol=1e-4) == 2
        assert (update[name] - value).norm() <= 1e-5 * value.norm(), name


def test_behind_the_last_block_fits_are_of_the_token_that_is_read():
    torch.manual_seed(4)
    source, target = (tiny_models.vit(side).double() for side in ("source", "target"))
    tuned = tiny_models.tuned(source)
    for (name, value), base in zip(tuned.named_parameters(), source.parameters(), strict=True):
        if ".layers." not in name:
            value.data.copy_(base.data)
    images = torch.randn(90, 3, 8, 8, generator=torch.Generator().manual_seed(6)).double()
    batches = [{"pixel_values": part} for part in images.split(30)]
    recipe = tt.Recipe("effect", prior="none", ridge=1e-2, last="residual")
    update = tt.transport(tt.align(source, target, batches, recipe=recipe), tt.Delta.between(source, tuned), target)
    expected = effect_by_hand(source, tuned, target, batches, rho=1e-2, tokens=5)
    every = effect_by_hand(source, tuned, target, batches, rho=1e-2)
    assert update.keys() == expected.keys()
    for name, value in expected.items():
        assert (update[name] - value).norm() <= 1e-5 * value.norm(), name
        assert ("1." in name and (every[name] - value).norm() > 0.1 * value.norm()) or "0." in name


def test_without_fits_it_is_its_prior(models):
    source, tuned, target = models
    plain = tt.transport(tt.align(source, target, BATCHES, recipe="coherent"), tt.Delta.between(source, tuned), target)
    update = moved(*models, prior="coherent", fit=False)
    assert update.keys() == plain.keys() and all(torch.equal(update[name], plain[name]) for name in plain)
