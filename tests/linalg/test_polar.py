"""The polar factor by iteration: the ratio tests of test_procrustes.py on every path."""

import re

import pytest
import torch
from helpers.no_waiting import NoHost
from test_procrustes import EPS, SHAPES, THRESHOLD, VALUES, draw, known, ratios
from theseus_transport import NumericalError
from theseus_transport.linalg import polar
from theseus_transport.linalg import procrustes as module
from theseus_transport.linalg.certificate import certify
from theseus_transport.linalg.polar import START, polar_factor
from theseus_transport.linalg.procrustes import FLOOR, procrustes

SINGLE = torch.finfo(torch.float32).eps
# both ways to lift small values, both ways to decide which count
PATHS = [(lift, decide) for lift in ("polynomials", "rational") for decide in ("eigenvectors", "sign")]
paths = pytest.mark.parametrize("path", PATHS, indirect=True, ids="-".join)


@pytest.fixture
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, bool]:
    """Arguments of polar_factor; it lifts by rational steps as if the small matrices of these tests were large."""
    lift, decide = request.param
    if lift == "rational":
        monkeypatch.setattr(polar, "POLYNOMIAL_UP_TO", 0)
    return {"eigh": decide == "eigenvectors"}


# --- ratios ----------------------------------------------------------------------------------------------------------


@paths
@pytest.mark.parametrize("scale", [1.0, 1e150, 1e-150])
@pytest.mark.parametrize("name", VALUES)
def test_scaled_residuals(name: str, scale: float, path: dict) -> None:
    for shape in SHAPES:
        values = VALUES[name](min(shape))
        u, v, c = known(shape, values)
        t, found, gap = polar_factor(c * scale, floor=FLOOR, **path)
        rank = int((values > 0).sum())
        assert int(found) == rank, shape
        certify(t, c * scale, found, floor=FLOOR)
        exact = float(values[rank - 1] / values[0]) if rank else 0.0
        assert float(gap) == pytest.approx(exact, rel=1e-9 if path["eigh"] else 0.01)  # eps * CONDITION, with room
        worst = ratios(c * scale, t, u[:, :rank] @ v[:, :rank].T, exact)
        assert max(worst.values()) <= THRESHOLD, (shape, worst)


@paths
@pytest.mark.parametrize("floor, rank", [(1e-6, 4), (1e-7 / 2, 5), (1e-9 / 2, 7)])
def test_tail_of_small_singular_values(floor: float, rank: int, path: dict) -> None:
    """Values from 1e-7 to 1e-10 lie on both sides of what the iteration lifts: the floor alone decides."""
    values = torch.tensor([1, 0.5, 1e-3, 1e-5, 1e-7, 1e-8, 1e-9, 1e-10, 0, 0], dtype=torch.float64)
    u, v, c = known((23, 10), values)
    t, found, gap = polar_factor(c, floor=floor, start=min(START, floor / 100), **path)
    share = float(values[rank - 1])
    assert int(found) == rank and float(gap) == pytest.approx(share, rel=0.01)
    worst = ratios(c, t, u[:, :rank] @ v[:, :rank].T, share)
    assert max(worst[name] for name in ("isometry", "symmetry", "semidefinite", "forward")) <= THRESHOLD, worst


@paths
def test_floor_is_not_moved_by_rounding(path: dict) -> None:
    for factor, rank in ((1.01, 3), (0.99, 2)):
        _, _, c = known((9, 7), torch.tensor([1, 0.1, FLOOR * factor, 0, 0, 0, 0], dtype=torch.float64))
        assert int(polar_factor(c, floor=FLOOR, **path)[1]) == rank


@paths
def test_batches_hold_any_ranks(path: dict) -> None:
    c = draw(2, 3, 7, 5)
    c[1, 2], c[0, 1, :, 2:], c[1, 0] = 0, 0, c[1, 0] * 1e-120
    t, rank, gap = polar_factor(c, floor=FLOOR, **path)
    certify(t, c, rank, floor=FLOOR)
    assert rank.tolist() == [[5, 2, 5], [5, 5, 0]] and gap[1, 2] == 0
    for i in range(2):
        for j in range(3):
            exact = procrustes(c[i, j], method="lapack")
            torch.testing.assert_close(t[i, j], exact.map, rtol=0, atol=1e-12)  # eps over gaps of 1e-2 and more
            assert float(gap[i, j]) == pytest.approx(float(exact.gap), rel=0.01)


@pytest.mark.parametrize("rank", [50, 130])
@pytest.mark.parametrize("eigh", [True, False])
def test_large_maps_take_rational_steps(rank: int, eigh: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(polar, "POLYNOMIAL_UP_TO", 129)
    monkeypatch.setattr(polar, "LIFT", None)  # so a polynomial step would fail
    u, v, c = known((130, 150), VALUES["graded"](130) * (torch.arange(130) < rank))
    t, found, _ = polar_factor(c, floor=FLOOR, eigh=eigh)
    assert int(found) == rank
    certify(t, c, found, floor=FLOOR)
    gap = float(VALUES["graded"](130)[rank - 1])
    assert ratios(c, t, u[:, :rank] @ v[:, :rank].T, gap)["forward"] <= THRESHOLD


def test_what_float32_steps_cost() -> None:
    """The mixed plan is an isometry to float64, and right to the rounding of float32, not better."""
    for name in VALUES:
        for shape in SHAPES:
            u, v, c = known(shape, VALUES[name](min(shape)))
            t, rank, _ = polar_factor(c, floor=FLOOR, eigh=True, mixed=True)
            assert int(rank) == int((VALUES[name](min(shape)) > 0).sum())
            certify(t, c, rank, floor=FLOOR, eps=SINGLE)
            assert ratios(c, t, t, 0)["isometry"] <= THRESHOLD
    with pytest.raises(NumericalError, match=r"\|H - H\^T\|"):  # of the last, 64 x 64 and graded to 1e-5
        c = known((64, 64), VALUES["graded"](64))[2]
        t, rank, _ = polar_factor(c, floor=FLOOR, eigh=True, mixed=True)
        certify(t, c, rank, floor=FLOOR)


@pytest.fixture
def afar(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if every tensor lay on a device that works while the host goes on."""
    for place in (polar, module):
        monkeypatch.setattr(place, "remote", lambda x: True)


@pytest.mark.parametrize("path", [("polynomials", "sign"), ("rational", "sign")], indirect=True, ids="-".join)
def test_no_value_is_read_on_the_host(path: dict, afar: None) -> None:
    c = draw(3, 9, 6)
    with NoHost():
        polar_factor(c, floor=FLOOR, **path)


@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (3, 9, 6)], ids=str)
@pytest.mark.parametrize("weighed", [False, True], ids=["", "with energies"])
def test_a_device_is_not_waited_for_before_the_certificate(
    shape: tuple[int, ...], weighed: bool, afar: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Certified(Exception):
        pass

    def certify(t: torch.Tensor, *_: object, **__: object) -> None:
        raise Certified

    monkeypatch.setattr(module, "certify", certify)
    energies = tuple(torch.ones(d).double() for d in shape[-2:]) if weighed else None
    with pytest.raises(Certified), NoHost():
        procrustes(draw(*shape), energies=energies)


@pytest.mark.parametrize(
    "wait",
    [
        lambda c: float(c.sum()),
        lambda c: bool((c > 0).all()),
        lambda c: c[c > 0],
        lambda c: torch.equal(c, c),
        lambda c: torch.linalg.matrix_norm(c, ord=2),
        lambda c: torch.linalg.eigh(c @ c.mT),
        lambda c: torch.linalg.inv(c @ c.mT),
        lambda c: torch.linalg.cholesky(c @ c.mT),
        lambda c: torch.cholesky_inverse(torch.linalg.cholesky_ex(c @ c.mT)[0]),
        lambda c: torch.linalg.qr(c),
    ],
    ids=["float", "bool", "mask", "equal", "spectral norm", "eigh", "inv", "cholesky", "cholesky_inverse", "qr"],
)
def test_what_waits_is_seen(wait) -> None:
    with pytest.raises(AssertionError), NoHost():
        wait(draw(3, 5, 6))


@pytest.mark.parametrize("name", VALUES)
def test_the_largest_eigenvalue_is_found_to_a_percent(name: str) -> None:
    for k in (1, 2, 5, 40, 130):
        values = VALUES[name](k)
        u = torch.linalg.qr(draw(k, k))[0]
        h = torch.stack([(u * values) @ u.T, torch.zeros(k, k).double()])
        with NoHost():
            found = polar.largest_eigenvalue(lambda v, h=h: h @ v, h)
        exact = float(values.max())
        assert 0.99 * exact <= float(found[0]) <= exact * (1 + THRESHOLD * EPS * k) and found[1] == 0, k


# --- as procrustes dispatches it -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape", [(1, 1), (7, 3), (3, 7), (2, 5, 5), (2, 3, 4, 6), (0, 5), (2, 0, 3), (0, 3, 3)], ids=str
)
def test_iterate_equals_lapack(shape: tuple[int, ...]) -> None:
    c = draw(*shape)
    found, exact = procrustes(c, method="iterate"), procrustes(c, method="lapack")
    assert torch.equal(found.rank, exact.rank) and found.map.shape == shape
    torch.testing.assert_close(found.map, exact.map, rtol=0, atol=1e-11)  # eps over gaps of 1e-3 and more
    torch.testing.assert_close(found.gap, exact.gap, rtol=0.01, atol=0)
    again = procrustes(c.clone(), method="iterate")
    assert found.map.contiguous().numpy().tobytes() == again.map.contiguous().numpy().tobytes()


@pytest.mark.parametrize("small", ["products", "rotations"])
@pytest.mark.parametrize("name", VALUES)
def test_a_device_finds_what_lapack_finds(name: str, small: str, afar: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its ways there, on the CPU, with the ratios of any other; energies change nothing where features are alike."""
    if small == "rotations":
        monkeypatch.setattr(module.theseus_ext, "cuda_problem", lambda device: None)
        monkeypatch.setattr(module, "polar_factor", None)  # so a call of it would fail
    for shape in SHAPES:
        values = VALUES[name](min(shape))
        u, v, c = known(shape, values)
        rank = int((values > 0).sum())
        exact = float(values[rank - 1] / values[0]) if rank else 0.0
        assert module.takes_jacobi(c) == (small == "rotations")
        for energies in (None, tuple(torch.ones(d).double() for d in shape))[: 1 if small == "rotations" else 2]:
            found = procrustes(c, energies=energies)
            assert int(found.rank) == rank and float(found.gap) == pytest.approx(exact, rel=0.01), shape
            worst = ratios(c, found.map, u[:, :rank] @ v[:, :rank].T, exact)
            assert max(worst.values()) <= THRESHOLD, (shape, worst)


def test_what_goes_to_rotations(afar: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small maps, where the kernel is there; what fails its certificate there goes on to products."""
    c, most = draw(2, 9, 7), module.JACOBI_UP_TO
    assert not module.takes_jacobi(c)  # no kernel was built for this device
    monkeypatch.setattr(module.theseus_ext, "cuda_problem", lambda device: None)
    assert module.takes_jacobi(torch.empty(3, most, 1)) and module.takes_jacobi(torch.empty(most, most))
    assert not module.takes_jacobi(torch.empty(3, most + 1, 2)) and not module.takes_jacobi(torch.empty(2, most + 1))
    exact, real = procrustes(c, method="lapack"), module.theseus_ext.polar
    monkeypatch.setattr(module.theseus_ext, "polar", lambda c, floor: (1.001 * real(c, floor)[0], real(c, floor)[1]))
    torch.testing.assert_close(procrustes(c).map, exact.map, rtol=0, atol=1e-11)  # eps over gaps of 1e-3 and more
    monkeypatch.setattr(module, "remote", lambda x: False)
    assert not module.takes_jacobi(c)


@pytest.mark.parametrize("shape", [(12, 9), (9, 12), (9, 9)], ids=str)
@pytest.mark.parametrize("name", ["rank-deficient", "graded", "zero"])
def test_a_device_completes_as_lapack_does(
    shape: tuple[int, int], name: str, afar: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Toward something new, something of rank 2 more, what the data said already, and nothing."""
    c = known(shape, VALUES[name](9))[2]
    low = draw(shape[0], 2, seed=3) @ draw(2, shape[1], seed=4)
    for toward in (draw(*shape, seed=5), low * 1e-30, c, torch.zeros(shape).double()):
        exact = procrustes(c, null="completed", toward=toward, method="lapack")
        with monkeypatch.context() as patch:
            patch.setattr(module, "_svd", None)  # so a call of it would fail
            found = procrustes(c, null="completed", toward=toward)
        assert torch.equal(found.rank, exact.rank) and float(found.gap) == pytest.approx(float(exact.gap), rel=0.01)
        torch.testing.assert_close(found.map, exact.map, rtol=0, atol=1e-8)  # eps over gaps of 1e-5, and of ``toward``


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("shape", [(4, 6), (3, 4, 6)], ids=str)
def test_a_device_says_what_is_not_finite(shape: tuple[int, ...], value: float, afar: None) -> None:
    c = draw(*shape)
    c[..., 2, 3] = value
    with pytest.raises(NumericalError, match=re.escape(f"the cross-moment {list(shape)} holds NaN or Inf")):
        procrustes(c)


def test_a_device_counts_comparable_features(afar: None) -> None:
    test_iterate_counts_comparable_features()


def test_iterate_counts_comparable_features() -> None:
    """One massive feature: the rank is that of the correlations, whichever way."""
    x = draw(60, 9)
    x[:, 0] *= 1e8
    cross, energies = x.T @ x, (x.square().sum(0),) * 2
    cross[:, 5:] = 0
    for method in ("auto", "iterate", "lapack"):
        assert int(procrustes(cross, method=method).rank) == 1
        assert int(procrustes(cross, method=method, energies=energies).rank) == 5


def test_a_failed_certificate_starts_lower_then_leaves_it_to_lapack(monkeypatch: pytest.MonkeyPatch) -> None:
    c = known((12, 9), VALUES["rank-deficient"](9))[2]
    exact, starts, real = procrustes(c, method="lapack"), [], module.polar_factor

    def wrong(c: torch.Tensor, *, start: float, **options) -> tuple:
        starts.append(start)
        t, rank, gap = real(c, start=start, **options)
        return (t if start < right_below else 1.001 * t), rank, gap

    monkeypatch.setattr(module, "polar_factor", wrong)
    right_below = START
    assert int(procrustes(c, method="iterate").rank) == 5 and starts == [START, START * 1e-3]
    right_below = 0
    assert torch.equal(procrustes(c, method="iterate").map, exact.map) and len(starts) == 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: procrustes on CUDA tensors has not run yet")
@pytest.mark.parametrize("shape", [(5, 64, 64), (40, 61), (1030, 1050)], ids=str)
def test_cuda_iterates(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    c = draw(*shape)
    c[..., 20:] = 0
    monkeypatch.setattr(torch.linalg, "svd", None)
    found = procrustes(c.cuda())
    monkeypatch.undo()
    exact = procrustes(c, method="lapack")
    assert found.map.is_cuda and torch.equal(found.rank.cpu(), exact.rank)
    torch.testing.assert_close(found.map.cpu(), exact.map, rtol=0, atol=1e-9)
