"""Moments of effects: they add, and what they say is missing is what rows say."""

from dataclasses import fields

import pytest
import torch
from theseus_transport import InputRefused
from theseus_transport.activations import row_mixing
from theseus_transport.activations.effects import EffectMoment
from theseus_transport.activations.pairing_tokens import of_samples
from theseus_transport.activations.row_mixing import RowMixing
from theseus_transport.models.pair import Pair
from torch import Tensor

ROUNDING = dict(rtol=1e-11, atol=1e-11)  # float64 sums of up to 50 products of order 1
WIDTHS = dict(inputs=6, source=4, target=5)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.3


def given(count: int = 50, others: int | None = None) -> list[Tensor]:
    """Inputs, states of the source after and before, and of the target."""
    rows = (count, others or count, others or count, count, count)
    return [draw(i, n, w) for i, (n, w) in enumerate(zip(rows, (6, 4, 4, 5, 5), strict=True))]


def moment(rows: list[Tensor], source: RowMixing | None = None, target: RowMixing | None = None) -> EffectMoment:
    found = EffectMoment.zeros(**WIDTHS)
    found.update(*rows, source, target)
    return found


def assert_same(one: EffectMoment, other: EffectMoment) -> None:
    for f in fields(EffectMoment):
        torch.testing.assert_close(
            torch.as_tensor(getattr(one, f.name)), torch.as_tensor(getattr(other, f.name)), **ROUNDING
        )


def test_a_moment_is_its_sums() -> None:
    x, s1, s0, t1, t0 = given()
    e, c = s1 - s0, t1 - t0
    squares = (v.square().sum(0) for v in (x, e, c))
    assert_same(
        moment([x, s1, s0, t1, t0]), EffectMoment(x.T @ x, x.T @ e, x.T @ c, x.sum(0), e.sum(0), c.sum(0), *squares, 50)
    )


def test_splits_add() -> None:
    rows = given()
    first, second = (moment([x[part] for x in rows]) for part in (slice(20), slice(20, None)))
    assert_same(first + second, moment(rows))
    assert_same(first + EffectMoment.zeros(**WIDTHS).to("cpu"), first)
    with pytest.raises(InputRefused, match=r"widths \[6, 4, 5\] and \[6, 5, 4\]"):
        first + EffectMoment.zeros(6, 5, 4)


def test_mixing_is_of_differences_and_counts_its_rows() -> None:
    x, s1, s0, t1, t0 = given(count=9, others=20)
    mixing = row_mixing.linear(20, 9)
    assert_same(moment([x, s1, s0, t1, t0], mixing), moment([x, mixing(s1), mixing(s0), t1, t0]))
    last = row_mixing.select(torch.tensor([8, 2]))
    picked = moment([x, s1[:2], s0[:2], t1, t0], None, last)
    assert picked.count == 2
    assert_same(picked, moment([last(x), s1[:2], s0[:2], last(t1), last(t0)]))


SAMPLES = {  # mixings of source and target of four samples of 5 tokens each, the source's of 4 where it is mixed
    "plain": (None, None),
    "masked": (row_mixing.select(torch.arange(20) % 3 > 0),) * 2,
    "grids": (row_mixing.linear(4, 5).batched(4), None),
    "tokenizers": (row_mixing.linear(4, 3).batched(4), row_mixing.select(torch.arange(20) % 5 > 1)),
}


@pytest.mark.parametrize("kind", SAMPLES)
def test_rows_of_samples_are_those_of_these_samples(kind: str) -> None:
    rows = Pair(*SAMPLES[kind])
    own = 20 if rows.source is None else rows.source.tokens
    x, s1, s0, t1, t0 = given(20, own)
    chosen = torch.tensor([False, True, True, False])
    parts = [moment([x, s1, s0, t1, t0], *of_samples(rows, 5, samples)) for samples in (chosen, ~chosen)]
    assert_same(parts[0] + parts[1], moment([x, s1, s0, t1, t0], *rows))
    x, t1 = (v.index_fill(0, torch.arange(5), 7.0) for v in (x, t1))  # of the first sample, which is none of them
    s1 = s1.index_fill(0, torch.arange(own // 4), 7.0)
    assert_same(moment([x, s1, s0, t1, t0], *of_samples(rows, 5, chosen)), parts[0])


@pytest.mark.parametrize("centred", [False, True])
def test_what_is_missing_is_what_rows_say(centred: bool) -> None:
    x, s1, s0, t1, t0 = given()
    q, scale = draw(9, 4, 5), 1.7
    e, c = s1 - s0, t1 - t0
    if centred:
        e = e - e.mean(1, keepdim=True)
    m = scale * e @ q - c
    if centred:
        m = m - m.mean(1, keepdim=True)
    found = moment([x, s1, s0, t1, t0]).missing(scale, q, centred=centred)
    for ours, rows in (
        (found.gram, x.T @ x),
        (found.cross, x.T @ m),
        (found.input_sum, x.sum(0)),
        (found.output_sum, m.sum(0)),
    ):
        torch.testing.assert_close(ours, rows, **ROUNDING)
    assert found.count == 50


@pytest.mark.parametrize("centred", [False, True])
def test_nothing_is_missing_where_the_target_moved_as_the_source_did(centred: bool) -> None:
    x, s1, s0, _, t0 = given()
    q = torch.linalg.qr(draw(9, 5, 4))[0].T
    if centred:  # a map of what LayerNorm sees
        q = q - q.mean(1, keepdim=True)
    moved = moment([x, s1, s0, t0 + (s1 - s0 - centred * (s1 - s0).mean(1, keepdim=True)) @ q, t0])
    found = moved.missing(1.0, q, centred=centred)
    scale = float(moved.target_cross.abs().max())
    assert float(found.cross.abs().max()) < 1e-12 * scale and float(found.output_sum.abs().max()) < 1e-12 * scale
    assert float(moved.missing(0.5, q, centred=centred).cross.abs().max()) > 1e-3 * scale


def test_what_all_features_share_is_no_effect_behind_a_layer_norm() -> None:
    x, s1, s0, t1, t0 = given()
    shifted = [x, s1 + draw(7, 50, 1), s0, t1 + draw(8, 50, 1), t0]
    plain, other = (moment(rows).missing(1.0, draw(9, 4, 5), centred=True) for rows in ([x, s1, s0, t1, t0], shifted))
    torch.testing.assert_close(plain.cross, other.cross, **ROUNDING)
    uncentred = moment(shifted).missing(1.0, draw(9, 4, 5), centred=False)
    assert not torch.allclose(plain.cross, uncentred.cross, rtol=1e-3)
