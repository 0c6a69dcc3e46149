"""Cuts to a rank: the nearest product, the update itself where the rank suffices, the same in every run."""

from dataclasses import astuple

import pytest
import torch
from theseus_transport import InputRefused, NumericalError
from theseus_transport.linalg import leading
from theseus_transport.updates.adapter import Factors
from theseus_transport.updates.ranks import cut, low_rank_of
from torch import Tensor

ROUNDING = dict(rtol=1e-11, atol=1e-11)  # float64, products of a few hundred terms of order 1
WHOLE_OR_ITERATED = pytest.mark.parametrize("whole_up_to", [256, 8], ids=["whole", "iterated"])


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def lora(rank: int, dtype: torch.dtype = torch.float64) -> Factors:
    return Factors(draw(0, rank, 40).to(dtype), 1e-3 * draw(1, 30, rank).to(dtype), 2.0)


def product(f: Factors) -> Tensor:
    return f.b.double() @ f.a.double() * f.scaling


@pytest.mark.parametrize("rank", [1, 3, 7])
@pytest.mark.parametrize("own", [8, 35], ids=["few", "more than rows"])
def test_no_product_of_that_rank_is_nearer_than_a_cut(rank: int, own: int) -> None:
    whole = lora(own)
    found = cut(whole, rank)
    assert found.a.shape == (rank, 40) and found.b.shape == (30, rank) and found.scaling == 2
    u, s, vh = torch.linalg.svd(product(whole), full_matrices=False)
    torch.testing.assert_close(product(found), (u[:, :rank] * s[:rank]) @ vh[:rank], **ROUNDING)
    least = float((product(found) - product(whole)).norm())
    assert least == pytest.approx(float(s[rank:].norm()), rel=1e-9)
    for seed in range(100, 130):
        basis = torch.linalg.qr(draw(seed, 30, rank))[0]
        near = Factors(found.a + 0.1 * draw(seed, rank, 40), found.b + 1e-2 * draw(seed, 30, rank), 2.0)
        for other in (basis @ basis.T @ product(whole), product(near)):
            assert float((other - product(whole)).norm()) >= least


@pytest.mark.parametrize("rank", [4, 9])
def test_factors_that_fit_are_returned_themselves(rank: int) -> None:
    whole = lora(4, torch.bfloat16)
    assert cut(whole, rank) is whole


def test_factors_wider_than_the_rank_of_their_product_lose_nothing() -> None:
    """As of pieces stacked in a fused layer, or of copies; only two directions are there."""
    two = lora(2)
    stacked = Factors(torch.cat([two.a, two.a, two.a]), torch.cat([two.b, 0 * two.b, -3 * two.b], 1), two.scaling)
    for rank in (2, 3, 5):
        found = cut(stacked, rank)
        assert found.a.shape == (rank, 40)
        assert float((product(found) - product(stacked)).norm()) <= 1e-14 * float(product(stacked).norm())
    nothing = cut(Factors(two.a, 0 * two.b, 1.0), 1)
    assert not nothing.a.any() and not nothing.b.any()


@WHOLE_OR_ITERATED
def test_an_update_of_that_rank_comes_back(whole_up_to: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leading, "WHOLE_UP_TO", whole_up_to)
    dense = product(lora(5)) @ torch.diag(torch.logspace(-6, 0, 40).double())  # directions six orders apart
    for rank in (5, 7, 60):
        a, b, kept = low_rank_of(dense, rank)
        assert a.shape == (rank, 40) and b.shape == (30, rank) and kept == pytest.approx(1, rel=1e-12)
        assert float((b @ a - dense).norm()) <= 1e-14 * float(dense.norm())
    a, b, kept = low_rank_of(dense, 2)
    assert 0 < kept < 1 and float((b @ a - dense).square().sum()) == pytest.approx(
        (1 - kept) * float(dense.square().sum()), rel=1e-6
    )


def test_no_product_is_nearer_to_a_whole_update_and_its_share_is_kept() -> None:
    dense = draw(0, 30, 40)
    a, b, kept = low_rank_of(dense, 6)
    u, s, vh = torch.linalg.svd(dense, full_matrices=False)
    torch.testing.assert_close(b @ a, (u[:, :6] * s[:6]) @ vh[:6], **ROUNDING)
    assert kept == pytest.approx(float(s[:6].square().sum() / s.square().sum()), rel=1e-12)
    a, b, kept = low_rank_of(0 * dense, 3)
    assert a.shape == (3, 40) and b.shape == (30, 3) and not a.any() and not b.any() and kept == 1


@WHOLE_OR_ITERATED
@pytest.mark.parametrize("shape", [(120, 300), (300, 120)], ids=["wide", "tall"])
def test_iterated_or_not_it_is_nearly_the_best(
    whole_up_to: int, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of noise, whose values hardly fall: at least 0.99 of what the best product keeps."""
    dense = draw(0, *shape)
    best = low_rank_of(dense, 8)[2]
    monkeypatch.setattr(leading, "WHOLE_UP_TO", whole_up_to)
    a, b, kept = low_rank_of(dense, 8)
    assert 0.99 * best < kept <= best * (1 + 1e-12)
    assert float((dense - b @ a).square().sum()) == pytest.approx((1 - kept) * float(dense.square().sum()), rel=1e-9)


@WHOLE_OR_ITERATED
def test_the_same_in_every_run_whatever_was_drawn_before(whole_up_to: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leading, "WHOLE_UP_TO", whole_up_to)
    runs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        runs.append([*low_rank_of(draw(0, 30, 40), 6), *astuple(cut(lora(20), 3))])
    assert all(torch.equal(torch.as_tensor(one), torch.as_tensor(other)) for one, other in zip(*runs, strict=True))


def test_factors_share_the_norm_and_signs_are_fixed() -> None:
    """So that neither factor is lost to 16 bits, and two writings of one update have one cut."""
    whole = lora(8)
    mixed = draw(3, 8, 8)
    found, other = cut(whole, 3), cut(Factors(mixed @ whole.a, whole.b @ torch.linalg.inv(mixed), 2.0), 3)
    torch.testing.assert_close(found.a.norm(dim=1), found.b.norm(dim=0), **ROUNDING)
    torch.testing.assert_close(found.a, other.a, rtol=1e-9, atol=1e-9)  # the condition of what mixes them
    torch.testing.assert_close(found.b, other.b, rtol=1e-9, atol=1e-9)


def test_refused() -> None:
    for found in (lambda: cut(lora(3), 0), lambda: low_rank_of(draw(0, 3, 3), 0)):
        with pytest.raises(InputRefused, match="rank is 0; it must be at least 1"):
            found()
    broken = lora(3)
    broken.a[0, 0] = torch.nan
    with pytest.raises(NumericalError, match=r"factors \[30, 3\] and \[3, 40\] hold NaN"):
        cut(broken, 2)
    for value in (torch.nan, torch.inf):
        with pytest.raises(NumericalError, match=r"an update \[3, 3\] holds NaN"):
            low_rank_of(draw(0, 3, 3) * value, 2)
