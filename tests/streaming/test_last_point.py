"""What is wanted behind the last block, where both models have one head: corrected until predictions change alike."""

import pytest
import theseus_transport as tt
import torch
from helpers import tiny_models
from theseus_transport.models.base import Base
from theseus_transport.models.pair import Pair
from theseus_transport.models.tensors import tensors_of
from theseus_transport.streaming.last_point import UNSEEN, Heads, agreement, frequencies
from theseus_transport.streaming.resident import Resident
from theseus_transport.streaming.verdict import Head, Prediction
from theseus_transport.streaming.window import Window

WIDE = {"source": 24, "target": 40}  # of tiny llamas


def draw(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def isometry(own, other, seed=0):
    """A map [own, other] that keeps lengths."""
    return torch.linalg.qr(draw(seed, other, own))[0].T


@pytest.fixture
def llamas():
    torch.manual_seed(2)
    return Pair(*(tiny_models.llama(side).double() for side in WIDE))


@pytest.fixture
def vits():
    torch.manual_seed(2)
    return Pair(*(tiny_models.vit(side).double() for side in WIDE))


def heads_of(models, head, weight=None):
    weight = frequencies(None, head.outputs) if weight is None else weight
    windows = models.map(lambda model: Window(Resident(tensors_of(model), model)))
    return Heads.of(models.map(Base.of), windows, head, weight)


def folded(model):
    """The weight of a head as it reads the final norm's output without gain, about its mean over outputs."""
    head = model.lm_head.weight if hasattr(model, "lm_head") else model.classifier.weight
    norm = model.model.norm if hasattr(model, "lm_head") else model.vit.layernorm
    read = (head * norm.weight).detach()
    return read - read.mean(0)


VOCABULARY, CLASSES = Head("vocabulary", tiny_models.VOCABULARY), Head("classes", 5)


def test_one_network_in_two_writings_is_left_alone(llamas):
    q = isometry(24, 40)
    norms = llamas.map(lambda model: model.model.norm.weight.detach())
    llamas.target.lm_head.weight.data = llamas.source.lm_head.weight * norms.source @ q / norms.target
    found = heads_of(llamas, VOCABULARY).corrected(q)
    torch.testing.assert_close(found, q, rtol=0, atol=1e-12)


def test_few_outputs_change_as_the_sources_and_all_else_stays(vits):
    """Five classes read four of 24 directions: a penalty of 1e-3 leaves a hundredth of what was missing, about."""
    q, effect = isometry(16, 24), draw(4, 50, 16)
    effect -= effect.mean(1, keepdim=True)  # what LayerNorm lets through
    own, other = vits.map(folded)
    q -= q.mean(1, keepdim=True)
    found = heads_of(vits, CLASSES).corrected(q)
    before, after = (effect @ (m @ other.T) - effect @ own.T for m in (q, found))
    assert after.norm() < 0.05 * before.norm()
    read = torch.linalg.svd(other - other.mean(1, keepdim=True)).Vh[4:]  # directions that no class reads
    torch.testing.assert_close(found @ read.T, q @ read.T, rtol=0, atol=1e-9)


def test_many_outputs_change_as_nearly_as_least_squares_has_it(llamas):
    """Weighed by how often they occur."""
    q, weight = isometry(24, 40), frequencies(torch.tensor([3] * 50 + [7] * 30 + [*range(20, 40)]), 300)
    own, other = ((w.lm_head.weight * w.model.norm.weight).detach() for w in llamas)
    own, other = (w - (weight[:, None] * w).sum(0) for w in (own, other))
    found = heads_of(llamas, VOCABULARY, weight).corrected(q)
    root = weight.sqrt()[:, None]
    best = torch.linalg.lstsq(root * other, root * own).solution.T
    errors = [float((root * (other @ m.T - own)).norm()) for m in (best, found, q)]
    assert errors[1] < 1.1 * errors[0] + 0.05 * errors[2] and errors[1] < 0.7 * errors[2], errors


def test_heads_that_read_nothing_correct_nothing():
    q = isometry(4, 6)
    assert Heads(torch.zeros(4, 6).double(), torch.zeros(6, 6).double()).corrected(q) is q


class Weights(dict):
    def rows(self, name, rows):
        return self[name][rows]


def prediction(seed, *, turned=1.0, shift=0.0, outputs=30, rows=200):
    weight = draw(seed, outputs, 8) * turned
    bias = shift + torch.zeros(outputs).double()
    return Prediction(draw(9, rows, 8), Weights(head=weight, bias=bias), "head", "bias")


def test_heads_agree_as_their_logits_correlate():
    head, own = Head("vocabulary", 30), prediction(1)
    assert agreement(head, own, prediction(1, turned=3.0, shift=5.0)) == pytest.approx(1, abs=1e-9)
    assert agreement(head, own, prediction(1, turned=-1.0)) == pytest.approx(-1, abs=1e-9)
    assert agreement(head, own, prediction(1, turned=0.0)) == 0
    a, b = (each.logits(slice(None)) for each in (own, prediction(2)))
    a, b = ((x - x.mean(0)) - (x - x.mean(0)).mean(1, keepdim=True) for x in (a, b))
    expected = float((a * b).sum() / (a.norm() * b.norm()))
    assert agreement(head, own, prediction(2)) == pytest.approx(expected, abs=1e-9)


def test_agreement_is_that_of_all_tiles_together(monkeypatch):
    head, pair = Head("vocabulary", 30), (prediction(1), prediction(2))
    once = agreement(head, *pair)
    monkeypatch.setattr(Head, "tiles", lambda *_: (slice(0, 7), slice(7, 29), slice(29, 30)))
    assert agreement(head, *pair) == pytest.approx(once, abs=1e-12)


def test_outputs_count_by_how_often_they_occur_and_none_for_nothing():
    found = frequencies(torch.tensor([[0, 0, 1], [0, 9, 9]]), 4)
    expected = torch.tensor([3, 1, 0, 0]).double() / 4 * (1 - UNSEEN) + UNSEEN / 4
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)  # 9 is no output they share
    torch.testing.assert_close(frequencies(None, 4), torch.full((4,), 0.25).double())
    torch.testing.assert_close(frequencies(torch.tensor([9]), 4), torch.full((4,), 0.25).double())


# --- where a tune is moved ------------------------------------------------------------------------------------------
IDS = torch.randint(1, tiny_models.VOCABULARY, (24, 32), generator=torch.Generator().manual_seed(5))
BATCHES = [{"input_ids": rows} for rows in IDS.split(8)]


def moved(source, target, last):
    """What a tune of the source's blocks becomes, without a prior."""
    torch.manual_seed(6)
    tuned = tiny_models.tuned(source)
    for (name, value), base in zip(tuned.named_parameters(), source.parameters(), strict=True):
        if ".layers." not in name:
            value.data.copy_(base.data)
    alignment = tt.align(source, target, BATCHES, recipe=tt.Recipe("effect", prior="none", ridge=1e-2, last=last))
    return tt.transport(alignment, tt.Delta.between(source, tuned), target)


def test_where_heads_agree_they_say_what_is_wanted_behind_the_last_block(llamas):
    near = tiny_models.tuned(llamas.source)
    by_heads, by_map = (moved(llamas.source, near, last) for last in ("heads", "residual"))
    last = "model.layers.1.mlp.down_proj.weight"
    assert by_heads.keys() == by_map.keys() and last in by_map
    assert all(torch.equal(by_heads[name], by_map[name]) for name in by_map if name != last)
    assert (by_heads[last] - by_map[last]).norm() > 1e-3 * by_map[last].norm()


def test_heads_that_disagree_leave_the_map_as_it_is(llamas):
    """As heads of random numbers do: of 300 outputs, correlations are a few hundredths."""
    by_heads, by_map = (moved(*llamas, last) for last in ("heads", "residual"))
    assert all(torch.equal(by_heads[name], by_map[name]) for name in by_map)
