"""The polar factor, tested as LAPACK tests its drivers: known factors, residuals scaled by eps, size and norm."""

import pytest
import torch
from theseus_transport import InputRefused, NumericalError
from theseus_transport.linalg import procrustes as module
from theseus_transport.linalg.certificate import certify
from theseus_transport.linalg.procrustes import FLOOR, ITERATE_FROM, LEAN, leaning, procrustes

import theseus_ext

EPS = torch.finfo(torch.float64).eps
THRESHOLD = 30.0  # of LAPACK's own test ratios
CONDITION = 1e5  # largest over smallest non-zero singular value, inside FLOOR
SHAPES = [(1, 1), (1, 7), (7, 1), (2, 2), (5, 5), (17, 33), (33, 17), (40, 61), (64, 64)]
norm = torch.linalg.matrix_norm


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def steps(k: int) -> torch.Tensor:
    return torch.linspace(0, 1, k, dtype=torch.float64)


def first(k: int, value: float, rest: float) -> torch.Tensor:
    return torch.where(torch.arange(k) == 0, value, rest).double()


# Singular values of k directions, largest first: the modes of LAPACK's matrix generator (xLATMS), and ours.
VALUES = {
    "one large": lambda k: first(k, 1.0, 1 / CONDITION),
    "one small": lambda k: first(k, 1.0 if k == 1 else 1 / CONDITION, 1.0).flip(0),
    "graded": lambda k: CONDITION ** -steps(k),
    "arithmetic": lambda k: 1 - steps(k) * (1 - 1 / CONDITION),
    "log-uniform": lambda k: CONDITION ** -torch.rand(k, generator=torch.Generator().manual_seed(k)).double().sort()[0],
    "equal": lambda k: torch.ones(k, dtype=torch.float64),
    "clustered": lambda k: (
        first(k, 1.0, 1.0) * 10 ** -(4 * torch.arange(k) // k).double() * (1 - EPS * torch.arange(k))
    ),
    "rank-deficient": lambda k: CONDITION ** -steps(k) * (torch.arange(k) < (k + 1) // 2),
    "zero": lambda k: torch.zeros(k, dtype=torch.float64),
}


def known(
    shape: tuple[int, int], values: torch.Tensor, seed: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U [m, k], V [n, k] with orthonormal columns and C = U diag(values) V^T."""
    u, v = (torch.linalg.qr(draw(d, min(shape), seed=seed + i))[0] for i, d in enumerate(shape))
    return u, v, (u * values) @ v.T


def ratios(c: torch.Tensor, t: torch.Tensor, exact: torch.Tensor, gap: float) -> dict[str, float]:
    """Residuals that backward stable arithmetic keeps near 1; ``gap`` is the smallest kept share of the largest."""
    unit = EPS * max(c.shape)
    scale = norm(c).clamp(min=torch.finfo(torch.float64).tiny)
    h = t.T @ c / scale
    return {
        "isometry": float(norm(t @ t.T @ t - t)) / unit,
        "symmetry": float(norm(h - h.T)) / unit,
        "semidefinite": float(-torch.linalg.eigvalsh((h + h.T) / 2)[0]) / unit,
        "left of C": float(norm(c / scale - t @ h)) / unit,
        "right of C": float(norm(c / scale - (c / scale @ t.T) @ t)) / unit,
        "forward": float(norm(t - exact)) * gap / unit,  # a polar factor has condition 1 / gap
    }


@pytest.mark.parametrize("iterate_from", [1, ITERATE_FROM], ids=["iterated", "LAPACK"])
@pytest.mark.parametrize("scale", [1.0, 1e150, 1e-150])
@pytest.mark.parametrize("name", VALUES)
def test_scaled_residuals(name: str, scale: float, iterate_from: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ITERATE_FROM", iterate_from)
    for shape in SHAPES:
        values = VALUES[name](min(shape))
        u, v, c = known(shape, values)
        polar = procrustes(c * scale)
        rank = int((values > 0).sum())
        assert int(polar.rank) == rank, shape
        gap = float(values[rank - 1] / values[0]) if rank else 0.0
        iterated = iterate_from == 1 and rank == min(shape)
        assert bool(module._newton(c * scale, FLOOR)) == (rank == min(shape))  # else LAPACK decides
        assert float(polar.gap) == pytest.approx(gap, rel=0.01 if iterated else 1e-9)  # eps * CONDITION, with room
        worst = ratios(c * scale, polar.map, u[:, :rank] @ v[:, :rank].T, gap)
        assert max(worst.values()) <= THRESHOLD, (shape, worst)


@pytest.mark.parametrize("floor, rank", [(1e-6, 4), (1e-7 / 2, 5), (1e-9 / 2, 7), (1e-11, 8)])
def test_tail_of_small_singular_values(floor: float, rank: int) -> None:
    """Values from 1e-7 to 1e-10: the floor decides which count, and those kept are right to eps over their share."""
    values = torch.tensor([1, 0.5, 1e-3, 1e-5, 1e-7, 1e-8, 1e-9, 1e-10, 0, 0], dtype=torch.float64)
    u, v, c = known((23, 10), values)
    polar = procrustes(c, floor=floor)
    gap = float(values[rank - 1])
    assert int(polar.rank) == rank and float(polar.gap) == pytest.approx(gap, rel=1e-4)  # eps / 1e-10, with room
    worst = ratios(c, polar.map, u[:, :rank] @ v[:, :rank].T, gap)
    assert max(worst[name] for name in ("isometry", "symmetry", "semidefinite", "forward")) <= THRESHOLD, worst


def test_default_floor_is_not_moved_by_rounding() -> None:
    """Either side of the floor by one percent, the decision stands."""
    for factor, rank in ((1.01, 3), (0.99, 2)):
        _, _, c = known((9, 7), torch.tensor([1, 0.1, FLOOR * factor, 0, 0, 0, 0], dtype=torch.float64))
        assert int(procrustes(c).rank) == rank
    low = (draw(40, 3) @ draw(3, 20, seed=1)).float()  # rounded to float32: noise at 6e-8 of the largest
    assert int(procrustes(low).rank) == 3


def test_large_maps_are_iterated_and_equal_lapacks(monkeypatch: pytest.MonkeyPatch) -> None:
    values = VALUES["graded"](ITERATE_FROM)
    for shape in ((ITERATE_FROM, ITERATE_FROM + 40), (ITERATE_FROM + 40, ITERATE_FROM)):
        _, _, c = known(shape, values)
        with monkeypatch.context() as patch:
            patch.setattr(torch.linalg, "svd", None)  # so a call of it would fail
            iterated = procrustes(c)
        monkeypatch.setattr(module, "ITERATE_FROM", 10**9)
        lapack = procrustes(c)
        monkeypatch.undo()
        assert torch.equal(iterated.rank, lapack.rank)
        bound = THRESHOLD * EPS * max(shape) * CONDITION  # what each may be off, see "forward"
        assert float(norm(iterated.map - lapack.map)) <= 2 * bound


def test_where_the_iteration_goes_wrong_lapack_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    c, solve = draw(30, 20), torch.linalg.lu_solve
    expected = procrustes(c)
    monkeypatch.setattr(module, "ITERATE_FROM", 1)
    for wrong in (lambda x: x.add_(1e-6), lambda x: x.mul_(torch.nan), lambda x: x.zero_()):
        with monkeypatch.context() as patch:
            patch.setattr(torch.linalg, "lu_solve", lambda *a, out, wrong=wrong: wrong(solve(*a, out=out)))
            assert module._newton(c, FLOOR) is None
            assert torch.equal(procrustes(c).map, expected.map)
    near = known((30, 20), torch.where(torch.arange(20) < 19, 1.0, 1.05 * FLOOR).double())[2]
    assert module._newton(near, FLOOR) is None and int(procrustes(near).rank) == 20  # too near the floor to iterate


def test_best_alignment() -> None:
    """No other isometry aligns better: tr(T^T C) is the nuclear norm; unit rotations of x_S undo themselves."""
    x, turn = draw(50, 6), torch.linalg.qr(draw(6, 6, seed=1))[0]
    torch.testing.assert_close(procrustes(x.T @ (x @ turn)).map, turn, rtol=0, atol=1e-13)
    c = draw(6, 9, seed=2)
    assert float((procrustes(c).map * c).sum()) == pytest.approx(float(norm(c, ord="nuc")), rel=1e-14)


def test_batches_are_the_single_results() -> None:
    c = draw(2, 3, 5, 4)
    c[1, 2] = 0
    c[0, 1, :, 2:] = 0
    polar = procrustes(c)
    assert polar.rank.tolist() == [[4, 2, 4], [4, 4, 0]] and polar.gap[1, 2] == 0
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(polar.map[i, j], procrustes(c[i, j]).map, rtol=0, atol=1e-13)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (2, 0, 3), (0, 3, 3)], ids=str)
def test_empty(shape: tuple[int, ...]) -> None:
    polar = procrustes(torch.zeros(shape))
    assert polar.map.shape == shape and polar.rank.shape == polar.gap.shape == shape[:-2]
    assert not polar.rank.any() and not polar.gap.any()


def test_same_input_same_bytes() -> None:
    for c in (draw(33, 17), draw(4, 8, 8), known((40, 61), VALUES["clustered"](40))[2]):
        once, again = procrustes(c), procrustes(c.clone())
        assert once.map.numpy().tobytes() == again.map.numpy().tobytes()


def test_lower_precision_is_read_exactly() -> None:
    c = draw(9, 5).bfloat16()
    assert torch.equal(procrustes(c).map, procrustes(c.double()).map)


# --- null ------------------------------------------------------------------------------------------------------------


def test_partial_leaves_undetermined_directions_out_and_svd_keeps_them() -> None:
    u, v, c = known((12, 9), VALUES["rank-deficient"](9))
    partial, svd = procrustes(c), procrustes(c, null="svd")
    assert int(partial.rank) == 5 and int(svd.rank) == 9
    torch.testing.assert_close(partial.map @ v[:, 5:], torch.zeros(12, 4).double(), rtol=0, atol=1e-9)  # eps CONDITION
    torch.testing.assert_close(svd.map.T @ svd.map, torch.eye(9).double(), rtol=0, atol=1e-13)
    torch.testing.assert_close(svd.map @ v[:, :5], partial.map @ v[:, :5], rtol=0, atol=1e-9)


def test_completed_fills_only_what_is_undetermined() -> None:
    u, v, c = known((12, 9), VALUES["rank-deficient"](9))
    toward = draw(12, 9, seed=5)
    partial, completed = procrustes(c), procrustes(c, null="completed", toward=toward)
    assert int(completed.rank) == 9 and float(completed.gap) == float(partial.gap)
    torch.testing.assert_close(completed.map @ v[:, :5], partial.map @ v[:, :5], rtol=0, atol=1e-9)
    torch.testing.assert_close(completed.map.T @ completed.map, torch.eye(9).double(), rtol=0, atol=1e-9)
    rest = torch.eye(12).double() - u[:, :5] @ u[:, :5].T, torch.eye(9).double() - v[:, :5] @ v[:, :5].T
    added = procrustes(rest[0] @ toward @ rest[1]).map
    torch.testing.assert_close(completed.map - partial.map, added, rtol=0, atol=1e-8)
    without = procrustes(c, null="completed")
    assert torch.equal(without.map, partial.map) and int(without.rank) == 5


def test_completed_in_a_batch_is_completed_one_by_one() -> None:
    c, toward = draw(3, 6, 5), draw(3, 6, 5, seed=1)
    c[..., 3:] = 0
    whole = procrustes(c, null="completed", toward=toward)
    assert whole.rank.tolist() == [5, 5, 5]
    for i in range(3):
        one = procrustes(c[i], null="completed", toward=toward[i])
        torch.testing.assert_close(whole.map[i], one.map, rtol=0, atol=1e-12)


def test_leaning_leaves_to_the_other_map_what_a_cross_leaves_open_and_no_more() -> None:
    """Five rows of twelve features: where they lie the map is theirs, else the nearest to the other one."""
    rows, right, other = draw(5, 12), *(torch.linalg.qr(draw(12, 12, seed=seed))[0] for seed in (1, 2))
    c = rows.T @ (rows @ right)
    t = procrustes(leaning(c, other)).map
    # The lean moves the map of rows by its weight over their least singular value.
    moved = LEAN * norm(c) / torch.linalg.svdvals(c)[4]
    assert float(norm(rows @ (t - right))) <= moved * norm(rows) < 0.05 * norm(rows)
    basis = torch.linalg.qr(rows.T)[0]
    rest = torch.eye(12).double() - basis @ basis.T
    open_to = rest, right.T @ rest @ right  # on either side
    expected = procrustes(open_to[0] @ other @ open_to[1]).map
    assert float(norm(open_to[0] @ t @ open_to[1] - expected)) <= moved * norm(expected)
    torch.testing.assert_close(procrustes(leaning(c, right)).map, right, rtol=0, atol=EPS / LEAN * 12)


# --- certificate -----------------------------------------------------------------------------------------------------


def wrong_maps() -> list:
    u, v, c = known((8, 6), VALUES["graded"](6))
    right = u @ v.T
    flipped = u * torch.tensor([1, 1, 1, 1, 1, -1.0], dtype=torch.float64) @ v.T
    turn = torch.linalg.matrix_exp(1e-3 * (draw(6, 6) - draw(6, 6).T))
    cases = {
        "zero": (0 * right, "T T"),
        "scaled": (1.001 * right, "T T"),
        "one direction lost": (u[:, :5] @ v[:, :5].T, r"T T\^T - 1"),
        "reflected": (flipped, "not positive semidefinite"),
        "turned": (right @ turn, r"H - H\^T"),
        "not a number": (right * torch.nan, "is nan"),
        "infinite": (right * torch.inf, "is nan"),
    }
    return [pytest.param(t, c, text, id=name) for name, (t, text) in cases.items()]


@pytest.mark.parametrize("t, c, text", wrong_maps())
def test_certificate_rejects(t: torch.Tensor, c: torch.Tensor, text: str) -> None:
    for scale in (1.0, 1e150, 1e-150):
        with pytest.raises(NumericalError, match=rf"a map \[8, 6\] failed its certificate: .*{text}"):
            certify(t, c * scale, torch.tensor(6), floor=FLOOR)
    batch = torch.stack([procrustes(c).map, t])  # one bad map among good ones
    with pytest.raises(NumericalError, match="failed its certificate"):
        certify(batch, torch.stack([c, c]), torch.tensor([6, 6]), floor=FLOOR)


def test_certificate_rejects_zero_whatever_rank_it_claims() -> None:
    with pytest.raises(NumericalError, match="failed its certificate"):
        certify(torch.zeros(8, 6).double(), draw(8, 6), torch.tensor(0), floor=FLOOR)


# --- failures --------------------------------------------------------------------------------------------------------


def test_where_divide_and_conquer_fails_qr_iteration_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    matrices = [draw(9, 5), draw(3, 4, 6), known((20, 12), VALUES["clustered"](12))[2], torch.zeros(3, 3)]
    expected = [procrustes(c) for c in matrices]

    def no_convergence(*_: object, **__: object) -> None:
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "svd", no_convergence)
    monkeypatch.setattr(theseus_ext, "svd", no_convergence)
    for c, polar in zip(matrices, expected, strict=True):
        found = procrustes(c)
        assert torch.equal(found.rank, polar.rank)
        torch.testing.assert_close(found.map, polar.map, rtol=0, atol=1e-11)  # eps over gaps of 1e-3 and more


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_refuses_what_is_not_finite(value: float) -> None:
    c = draw(4, 6)
    c[2, 3] = value
    with pytest.raises(NumericalError, match=r"the cross-moment \[4, 6\] holds NaN or Inf"):
        procrustes(c)


def test_refuses_unknown_choices() -> None:
    with pytest.raises(InputRefused, match="null is 'nearest'; choose one of partial, completed, svd"):
        procrustes(draw(2, 2), null="nearest")  # type: ignore[arg-type]
    with pytest.raises(InputRefused, match="method is 'qr'; choose one of auto, iterate, lapack"):
        procrustes(draw(2, 2), method="qr")  # type: ignore[arg-type]
    for floor in (-1e-3, 1.0, float("nan")):
        with pytest.raises(InputRefused, match=r"it must be at least 0 and below 1 \(default 1e-06\)"):
            procrustes(draw(2, 2), floor=floor)
