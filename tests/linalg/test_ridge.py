"""Ridge regression from sums: against rows, with and without a bias; strength by held-out error; cuts to a rank."""

import pytest
import torch
from theseus_transport import InputRefused, NumericalError
from theseus_transport.linalg import leading
from theseus_transport.linalg.ridge import GRID, SKETCHED, Normal, chosen_ridge, low_rank, ridge
from torch import Tensor

ROUNDING = dict(rtol=1e-9, atol=1e-9)  # float64; normal equations of condition up to 1e4 square what rows have
BIAS = pytest.mark.parametrize("bias", [False, True])


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sums(x: Tensor, m: Tensor) -> Normal:
    return Normal(x.T @ x, x.T @ m, x.sum(0), m.sum(0), len(x))


def about(x: Tensor, *, bias: bool) -> Tensor:
    return x - x.mean(0) if bias else x


def penalty(x: Tensor, rho: float, *, bias: bool) -> float:
    return rho * float(about(x, bias=bias).square().sum()) / x.shape[1]


def problem(rows: int = 60, wide: int = 7, out: int = 5) -> tuple[Tensor, Tensor]:
    """Features of unequal energy, away from zero; outputs that depend on them, a constant and noise."""
    x = draw(0, rows, wide) * torch.logspace(-1, 1, wide).double() + 1
    return x, x @ draw(1, wide, out) + draw(2, out) + 0.3 * draw(3, rows, out)


@BIAS
@pytest.mark.parametrize("rho", [1e-4, 1e-2, 10.0])
def test_a_fit_is_least_squares_of_rows_with_the_penalty_below_them(bias: bool, rho: float) -> None:
    x, m = problem()
    eye = penalty(x, rho, bias=bias) ** 0.5 * torch.eye(7).double()
    rows, below = [x], [eye]
    if bias:  # one more feature, which is not penalised
        rows, below = [x, x.new_ones(len(x), 1)], [eye, x.new_zeros(7, 1)]
    augmented = torch.cat([torch.cat(rows, 1), torch.cat(below, 1)])
    exact = torch.linalg.lstsq(augmented, torch.cat([m, m.new_zeros(7, 5)])).solution
    found = ridge(sums(x, m), rho, bias=bias)
    torch.testing.assert_close(found.weight, exact[:7].T, **ROUNDING)
    assert (found.bias is None) != bias
    if found.bias is not None:
        torch.testing.assert_close(found.bias, exact[7], **ROUNDING)


def test_sums_of_splits_add() -> None:
    x, m = problem()
    one, other = ridge(sums(x[:20], m[:20]) + sums(x[20:], m[20:]), 0.1, bias=True), ridge(sums(x, m), 0.1, bias=True)
    torch.testing.assert_close(one.weight, other.weight, **ROUNDING)
    with pytest.raises(InputRefused, match=r"cannot add the sums of a fit \[7, 5\] and \[7, 4\]"):
        sums(x, m) + sums(x, m[:, :4])


@BIAS
def test_a_penalty_follows_the_units_of_the_inputs(bias: bool) -> None:
    """The same rho at inputs a thousand times as large: the same outputs."""
    x, m = problem()
    small, large = (ridge(sums(c * x, m), 1e-2, bias=bias).weight * c for c in (1.0, 1e3))
    torch.testing.assert_close(small, large, **ROUNDING)


@BIAS
def test_fewer_rows_than_features(bias: bool) -> None:
    """G is singular; what no row shows stays as it is."""
    x, m = problem(rows=5, wide=12)
    found = ridge(sums(x, m), 1e-8, bias=bias).weight
    own = about(x, bias=bias)
    torch.testing.assert_close(own @ found.T, about(m, bias=bias), rtol=1e-4, atol=1e-4)  # of rho
    unseen = torch.linalg.svd(own)[2][5:]
    assert float((found @ unseen.T).abs().max()) < 1e-6 * float(found.abs().max())  # rounding over rho


def test_nothing_active_is_no_update() -> None:
    x, m = problem()
    found = ridge(sums(0 * x, m), 1e-2, bias=False)
    assert found.weight.shape == (5, 7) and not found.weight.any()
    constant = ridge(sums(0 * x + 3.7, m), 1e-2, bias=True)  # rounding of means is left of the Gram about them
    assert constant.bias is not None and not constant.weight.any()
    torch.testing.assert_close(constant.bias, m.mean(0), **ROUNDING)
    assert chosen_ridge(sums(0 * x, m), sums(x, m), bias=False) is None
    a, b, kept = low_rank(found.weight, sums(0 * x, m), 1e-2, 3, bias=False)
    assert a.shape == (3, 7) and b.shape == (5, 3) and not a.any() and not b.any() and kept == 1


def test_a_gram_that_rounding_made_indefinite_is_fitted_more_gently() -> None:
    """An eigenvalue of -1e-6 of the largest, as float32 sums have it, and a rho below that."""
    basis = torch.linalg.qr(draw(4, 6, 6))[0]
    values = torch.tensor([1, 1, 1, 1, 1, -1e-6], dtype=torch.float64)
    cross = draw(5, 6, 2)
    normal = Normal((basis * values) @ basis.T, cross, 0 * cross[:, 0], 0 * cross[0], 9)
    for rho in (1e-9, 1e-12):
        assert float(ridge(normal, rho, bias=False).weight.norm()) < 1e6 * float(cross.norm())  # 1 / smallest pivot
    broken = Normal(-basis @ torch.diag(values - 0.9) @ basis.T + 0, cross, cross[:, 0], cross[0], 9)
    assert float(broken.gram.trace()) > 0
    torch.testing.assert_close(
        ridge(broken, 1e-3, bias=False).weight, ridge(broken, 10.0, bias=False).weight, **ROUNDING
    )


def test_sums_that_are_not_finite() -> None:
    x, m = problem()
    with pytest.raises(NumericalError, match=r"the Gram \[7, 7\] of a fit, trace nan of 60 rows.* rho 1000"):
        ridge(sums(x * torch.nan, m), 1e-2, bias=False)
    with pytest.raises(NumericalError, match=r"the sums of a fit \[7, 5\] hold NaN"):
        ridge(sums(x, m * torch.inf), 1e-2, bias=False)


@pytest.mark.parametrize("rho", [0.0, -1.0, float("nan")])
def test_rho_is_positive(rho: float) -> None:
    with pytest.raises(InputRefused, match="it must be above 0"):
        ridge(sums(*problem()), rho, bias=False)


def errors(fit: tuple[Tensor, Tensor], held: tuple[Tensor, Tensor], *, bias: bool) -> dict[float | None, float]:
    """Of every value of the grid and of no update, from rows."""
    found: dict[float | None, float] = {None: float(held[1].square().sum())}
    for rho in GRID:
        f = ridge(sums(*fit), rho, bias=bias)
        shown = held[0] @ f.weight.T + (0 if f.bias is None else f.bias)
        found[rho] = float((shown - held[1]).square().sum())
    return found


@BIAS
@pytest.mark.parametrize("noise", [0.0, 1.0, 10.0, 100.0])
def test_the_chosen_strength_has_the_least_error_on_held_out_rows(bias: bool, noise: float) -> None:
    x = draw(0, 90, 30) + 0.5
    m = x @ draw(1, 30, 6) / 30**0.5 + draw(2, 6) + noise * draw(3, 90, 6)
    fit, held = (x[:60], m[:60]), (x[60:], m[60:])
    by_rows = errors(fit, held, bias=bias)
    chosen = chosen_ridge(sums(*fit), sums(*held), bias=bias)
    assert by_rows[chosen] == min(by_rows.values())


def test_more_noise_is_fitted_more_gently_until_not_at_all() -> None:
    chosen = []
    for noise in (0.0, 3.0, 1000.0):
        x = draw(0, 600, 30)
        m = x @ draw(1, 30, 6) / 30**0.5 + noise * draw(3, 600, 6)
        chosen.append(chosen_ridge(sums(x[:60], m[:60]), sums(x[60:], m[60:]), bias=False))
    assert chosen[0] == GRID[0] and chosen[1] in GRID[2:] and chosen[2] is None


@BIAS
def test_no_update_where_held_out_rows_want_the_opposite(bias: bool) -> None:
    x, m = problem()
    assert chosen_ridge(sums(x, m), sums(x, -m), bias=bias) is None
    assert chosen_ridge(sums(x, m), sums(x, m), bias=bias) == GRID[0]
    assert chosen_ridge(sums(x, 0 * m), sums(x, m), bias=bias) is None  # nothing is missing


@BIAS
def test_wide_outputs_are_judged_by_a_few_random_combinations(bias: bool) -> None:
    """Within a tenth of the least error by all outputs, and alike in every run."""
    x = draw(0, 90, 30) + 0.5
    m = x @ draw(1, 30, 4 * SKETCHED) / 30**0.5 + 3 * draw(3, 90, 4 * SKETCHED)
    fit, held = (x[:60], m[:60]), (x[60:], m[60:])
    by_rows = errors(fit, held, bias=bias)
    chosen = {chosen_ridge(sums(*fit), sums(*held), bias=bias) for _ in range(2)}
    assert len(chosen) == 1
    gain = by_rows[None] - by_rows[chosen.pop()]
    assert gain >= 0.9 * (by_rows[None] - min(by_rows.values())) > 0


def loss(x: Tensor, away: Tensor, rho: float, *, bias: bool) -> float:
    """|X E^T|^2 + lambda |E|^2, X about its mean with a bias."""
    return float((about(x, bias=bias) @ away.T).square().sum() + penalty(x, rho, bias=bias) * away.square().sum())


@BIAS
@pytest.mark.parametrize("rank", [1, 3, 4])
def test_a_cut_is_the_whitened_svd_and_no_other_product_is_nearer(bias: bool, rank: int) -> None:
    x, m = problem()
    normal, rho = sums(x, m), 1e-2
    weight = ridge(normal, rho, bias=bias).weight
    a, b, kept = low_rank(weight, normal, rho, rank, bias=bias)
    assert a.shape == (rank, 7) and b.shape == (5, rank)
    own = about(x, bias=bias)
    values, vectors = torch.linalg.eigh(own.T @ own + penalty(x, rho, bias=bias) * torch.eye(7).double())
    root = (vectors * values.sqrt()) @ vectors.T
    u, s, vh = torch.linalg.svd(weight @ root, full_matrices=False)
    expected = (u[:, :rank] * s[:rank]) @ vh[:rank] @ torch.linalg.inv(root)
    torch.testing.assert_close(b @ a, expected, **ROUNDING)
    assert kept == pytest.approx(float(s[:rank].square().sum() / s.square().sum()), rel=1e-9)
    least, whole = loss(x, weight - b @ a, rho, bias=bias), loss(x, weight, rho, bias=bias)
    assert least == pytest.approx((1 - kept) * whole, rel=1e-6)
    for seed in range(100, 150):  # best A of a random B, and a step away from the best of all
        basis = torch.linalg.qr(draw(seed, 5, rank))[0]
        for other in (basis @ (basis.T @ weight), (b + 0.1 * draw(seed, 5, rank)) @ (a + 0.1 * draw(seed, rank, 7))):
            assert loss(x, weight - other, rho, bias=bias) >= least * (1 - 1e-9)


def test_the_metric_decides_what_is_cut() -> None:
    """The larger of two updates reads a feature that is never active: plain truncation would keep it."""
    x = draw(0, 40, 2) * torch.tensor([1e-4, 1.0]).double()
    weight = torch.tensor([[100.0, 0.0], [0.0, 1.0]]).double()
    a, b, kept = low_rank(weight, sums(x, x), 1e-9, 1, bias=False)
    assert kept > 0.99
    torch.testing.assert_close(b @ a, torch.tensor([[0.0, 0.0], [0.0, 1.0]]).double(), rtol=1e-2, atol=1e-2)


@BIAS
@pytest.mark.parametrize("whole_up_to", [1024, 4])
def test_an_update_of_that_rank_comes_back(bias: bool, whole_up_to: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of an exact pair, where energies span eight orders and G is singular; decomposed whole and iterated."""
    monkeypatch.setattr(leading, "WHOLE_UP_TO", whole_up_to)
    x = draw(0, 50, 80) * torch.logspace(-4, 0, 80).double()
    weight = draw(1, 40, 3) @ draw(2, 3, 80)
    for rank in (3, 8):
        a, b, kept = low_rank(weight, sums(x, x @ weight.T), 1e-4, rank, bias=bias)
        assert float((b @ a - weight).norm()) <= 1e-12 * float(weight.norm()) and kept == pytest.approx(1, rel=1e-12)
        assert a.shape == (rank, 80) and b.shape == (40, rank)


def test_factors_are_of_one_norm_of_fixed_signs_and_padded_with_zeros() -> None:
    x, m = problem()
    weight = ridge(sums(x, m), 1e-2, bias=False).weight
    a, b, kept = low_rank(weight, sums(x, m), 1e-2, 9, bias=False)
    assert (
        a.shape == (9, 7) and b.shape == (5, 9) and not a[5:].any() and not b[:, 5:].any() and kept == pytest.approx(1)
    )
    torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0), **ROUNDING)
    assert (b[:, :5].gather(0, b[:, :5].abs().argmax(0, keepdim=True)) > 0).all()
    minus = low_rank(-weight, sums(x, m), 1e-2, 9, bias=False)
    torch.testing.assert_close(minus[1], b, **ROUNDING)
    torch.testing.assert_close(minus[0], -a, **ROUNDING)
    with pytest.raises(InputRefused, match="rank is 0"):
        low_rank(weight, sums(x, m), 1e-2, 0, bias=False)
