"""Leading singular directions: iterated ones near those of LAPACK; factors balanced, their product unchanged."""

import pytest
import torch
from theseus_transport import NumericalError
from theseus_transport.linalg import leading as module
from theseus_transport.linalg.leading import balanced, leading
from torch import Tensor

ROUNDING = dict(rtol=1e-12, atol=1e-12)  # float64, products of a few hundred terms of order 1


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_iterated_directions_are_nearly_the_leading_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of values that fall slowly, as those of a tune do: within a percent of the best directions' energy."""
    u, v = (torch.linalg.qr(draw(seed, size, 200))[0] for seed, size in enumerate((300, 200)))
    y = (u * (1 / torch.arange(1, 201).double().sqrt())) @ v.T
    whole = leading(y, 8)
    monkeypatch.setattr(module, "WHOLE_UP_TO", 100)
    found = leading(y, 8)
    assert all(torch.equal(one, other) for one, other in zip(found, leading(y, 8), strict=True))
    assert [t.shape for t in found] == [t.shape for t in whole] and not torch.equal(found[2], whole[2])
    share = float((y @ found[2]).square().sum() / whole[1].square().sum())
    assert 0.99 < share <= 1 + 1e-12
    torch.testing.assert_close(found[1], whole[1], rtol=1e-2, atol=0)
    torch.testing.assert_close(found[2].T @ found[2], torch.eye(8).double(), **ROUNDING)


@pytest.mark.parametrize("whole_up_to", [256, 8], ids=["whole", "iterated"])
@pytest.mark.parametrize("shape", [(90, 60), (60, 90)], ids=["tall", "wide"])
def test_a_matrix_of_that_rank_is_its_leading_directions(
    whole_up_to: int, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WHOLE_UP_TO", whole_up_to)
    y = draw(0, shape[0], 4) @ torch.logspace(-7, 0, 4).double().diag() @ draw(1, 4, shape[1])
    for rank in (4, 6):
        u, s, v = leading(y, rank)
        assert float(((u * s) @ v.T - y).norm()) <= 1e-14 * float(y.norm())
    assert [x.shape[-1] for x in leading(y, 100)] == [60, 60, 60]


@pytest.mark.parametrize("whole_up_to", [256, 8], ids=["whole", "iterated"])
def test_what_is_not_finite_is_refused(whole_up_to: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WHOLE_UP_TO", whole_up_to)
    with pytest.raises(NumericalError, match=r"singular values of a matrix \[40, 30\] were not found"):
        leading(draw(0, 40, 30) * torch.nan, 2)


def test_balanced_factors_have_the_same_product_and_one_norm() -> None:
    a, b = draw(0, 4, 9) * torch.tensor([[1e-5], [-1.0], [1e4], [0.0]]).double(), draw(1, 7, 4)
    left, right = balanced(a, b, 6)
    torch.testing.assert_close(right @ left, b @ a, **ROUNDING)
    torch.testing.assert_close(left.norm(dim=1), right.norm(dim=0), **ROUNDING)
    assert left.shape == (6, 9) and right.shape == (7, 6) and not left[3:].any() and not right[:, 3:].any()
    assert (right[:, :3].gather(0, right[:, :3].abs().argmax(0, keepdim=True)) > 0).all()
