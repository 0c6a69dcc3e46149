"""How much of a tune arrived, from the heads' weights tile by tile: the divergence that all logits at once have."""

import pytest
import torch
from helpers.allocated import peak_of
from theseus_transport.models import tensors
from theseus_transport.models.pair import Pair
from theseus_transport.streaming.last_point import agreement
from theseus_transport.streaming.verdict import Head, Prediction, removed

ROWS, WIDTHS = 7, Pair(12, 20)


class Table(dict):
    """Weights of a head, read by rows."""

    def rows(self, name, rows):
        return self[name][rows]


def predictions(outputs, *, bias=False):
    """Source and its tune, target, and the target as updated: twice the tune's effect apart, and on the way there."""
    torch.manual_seed(0)
    base, tuned = (torch.randn(outputs, WIDTHS.source).double() for _ in range(2))
    read, into = torch.randn(ROWS, WIDTHS.source).double(), torch.randn(ROWS, WIDTHS.target).double()
    target, moved = (torch.randn(outputs, WIDTHS.target).double() for _ in range(2))
    shift = {"b": torch.randn(outputs)} if bias else {}

    def of(read, weight):
        return Prediction(read, Table(w=weight, **shift), "w", "b" if bias else None)

    updated = {alpha: of(into, target + alpha * moved) for alpha in (0.5, 1.0)}
    return of(into, target), Pair(of(read, base), of(read, tuned)), updated


def divergence(wanted, found):
    p, q = (torch.log_softmax(x, -1) for x in (wanted, found))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tile", [1, 20, 300, 1 << 20])
def test_shares_by_tiles_are_those_of_all_logits(tile, bias, monkeypatch):
    """Tiles of one row, of a few, and of all."""
    monkeypatch.setattr(tensors, "TILE", 8 * WIDTHS.target * tile)
    target, source, updated = predictions(301, bias=bias)
    every = slice(0, 301)
    before = target.logits(every)
    wanted = before + source.target.logits(every) - source.source.logits(every)
    found = removed(Head("vocabulary", 301), target, source, updated)
    assert list(found) == [0.5, 1.0]
    for alpha, share in found.items():
        expected = 1 - divergence(wanted, updated[alpha].logits(every)) / divergence(wanted, before)
        assert share == pytest.approx(expected, rel=1e-9)


def test_a_target_that_predicts_what_is_wanted_has_it_all_and_no_effect_has_no_share():
    target, source, _ = predictions(50)
    every = slice(0, 50)
    effect = source.target.logits(every) - source.source.logits(every)
    there = torch.linalg.lstsq(target.read, effect).solution.T + target.weights["w"]
    arrived = Prediction(target.read, Table(w=there), "w", None)
    assert removed(Head("vocabulary", 50), target, source, {1.0: arrived})[1.0] == pytest.approx(1, abs=1e-9)
    assert removed(Head("vocabulary", 50), target, Pair(source.source, source.source), {1.0: arrived}) == {}


def test_memory_does_not_grow_with_the_vocabulary(monkeypatch):
    """Logits of all rows over the vocabulary would take 0.9 MiB for 16000 outputs in float64, and several of them."""
    monkeypatch.setattr(tensors, "TILE", 8 * WIDTHS.target * 100)

    def peak(outputs):
        given = predictions(outputs)
        return peak_of(lambda: removed(Head("vocabulary", outputs), *given))

    few, many = peak(1000), peak(16_000)
    assert many <= 1.1 * few


@pytest.mark.parametrize("tile", [7, 1 << 20])
def test_agreement_by_tiles_is_the_correlation_of_all_logits(tile, monkeypatch):
    """About the means over rows and outputs; of a model with itself it is 1."""
    monkeypatch.setattr(tensors, "TILE", 8 * WIDTHS.target * tile)
    target, source, updated = predictions(50)
    head, every = Head("vocabulary", 50), slice(0, 50)
    a, b = (x.logits(every) for x in (target, updated[0.5]))
    a, b = (x - x.mean(0) - x.mean(1, keepdim=True) + x.mean() for x in (a, b))
    assert agreement(head, target, updated[0.5]) == pytest.approx(float((a * b).sum() / a.norm() / b.norm()), rel=1e-9)
    assert agreement(head, target, target) == pytest.approx(1, rel=1e-9)
    assert abs(agreement(head, source.source, target)) < 0.3
