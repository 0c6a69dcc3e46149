"""LAPACK's test ratios for the batched singular value decomposition and for the iterated polar factor.

Residuals are scaled by eps, size and norm, and stay under LAPACK's own threshold of 30 (LAPACK Working Note 41).
"""

import pytest
import torch
from test_procrustes import CONDITION, SHAPES, THRESHOLD, VALUES, draw, known, norm, ratios
from theseus_transport import NumericalError
from theseus_transport.linalg.certificate import certify
from theseus_transport.linalg.procrustes import FLOOR, _newton, procrustes
from torch import Tensor

import theseus_ext

SCALES = {torch.float64: (1.0, 1e300, 1e-300), torch.float32: (1.0, 1e36, 1e-36)}  # the norm still is a number


def svd_ratios(a: Tensor, u: Tensor, s: Tensor, vh: Tensor, values: Tensor) -> dict[str, float]:
    """Ratios of A = U diag(S) Vh; ``values`` are the exact singular values."""
    unit, k = torch.finfo(a.dtype).eps * max(a.shape), len(s)
    scale = float(a.abs().max()) or 1.0  # residuals are taken of A / scale, in float64: nothing under- or overflows
    a, s, u, vh = a.double() / scale, s.double() / scale, u.double(), vh.double()
    size, eye = float(norm(a)) or 1.0, torch.eye(k, dtype=torch.float64)
    return {
        "A - U S Vh": float(norm(a - (u * s) @ vh)) / size / unit,
        "U": float(norm(u.T @ u - eye)) / unit,
        "Vh": float(norm(vh @ vh.T - eye)) / unit,
        "S": float((s - values / scale).norm()) / size / unit,
        "order": 0.0 if bool((s.diff() <= 0).all() and (s >= 0).all()) else torch.inf,
    }


def exactly(dtype: torch.dtype, shape: tuple[int, int], values: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """A matrix of ``dtype`` and its singular values: those asked for, but for rounding to ``dtype``."""
    order = values.sort(descending=True)[0]
    return (known(shape, order)[2] * scale).to(dtype), order * scale


@pytest.mark.parametrize("dtype", SCALES, ids=str)
@pytest.mark.parametrize("name", VALUES)
def test_svd(name: str, dtype: torch.dtype, device: str) -> None:
    for shape in SHAPES:
        made = [exactly(dtype, shape, VALUES[name](min(shape)), scale) for scale in SCALES[dtype]]
        batch = torch.stack([a for a, _ in made]).to(device)  # of three scales at once: none may spoil another
        found = [part.cpu() for part in theseus_ext.svd(batch)]
        only = theseus_ext.svdvals(batch).cpu()
        for i, (a, values) in enumerate(made):
            worst = svd_ratios(a, *(part[i] for part in found), values)
            assert max(worst.values()) <= THRESHOLD, (shape, i, worst)
            unit = torch.finfo(dtype).eps * max(shape) * (float(values[0]) or 1.0)
            assert float((only[i].double() - values).abs().max()) <= THRESHOLD * unit, (shape, i)


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 4, 0), (0, 5), (5, 0), (2, 0, 3, 3)], ids=str)
def test_svd_of_nothing(shape: tuple[int, ...]) -> None:
    u, s, vh = theseus_ext.svd(torch.zeros(shape))
    *batch, m, n = shape
    k = min(m, n)
    assert u.shape == (*batch, m, k) and s.shape == (*batch, k) and vh.shape == (*batch, k, n)
    assert theseus_ext.svdvals(torch.zeros(shape)).shape == (*batch, k)


def test_svd_of_odd_batches() -> None:
    """Batches that no number of threads divides, views with any strides, repeated singular values."""
    for count in (1, 3, 7):
        whole = draw(9, count, 13, seed=count).movedim(1, 0)  # [count, 9, 13], not contiguous
        whole[count // 2] = torch.eye(9, 13, dtype=torch.float64)
        u, s, vh = theseus_ext.svd(whole)
        for i in range(count):
            worst = svd_ratios(whole[i], u[i], s[i], vh[i], torch.linalg.svdvals(whole[i]))
            assert max(worst.values()) <= THRESHOLD, (count, i, worst)


@pytest.mark.parametrize("scale", [1.0, 1e150, 1e-150, 1e300, 1e-300])
@pytest.mark.parametrize("name", [name for name in VALUES if name not in ("rank-deficient", "zero")])
def test_iterated_polar_factor(name: str, scale: float) -> None:
    for shape in SHAPES:
        values = VALUES[name](min(shape))
        u, v, c = known(shape, values)
        polar = _newton(c * scale, FLOOR)
        assert polar is not None and int(polar.rank) == len(values), shape
        gap = float(values.min() / values.max())
        assert float(polar.gap) == pytest.approx(gap, rel=0.02)  # two estimates, to a percent each
        worst = ratios(c / norm(c), polar.map, u @ v.T, gap)
        assert max(worst.values()) <= THRESHOLD, (shape, worst)


@pytest.mark.parametrize("scale", [1e300, 1e-300])
@pytest.mark.parametrize("name", VALUES)
def test_polar_factor_of_extreme_scales(name: str, scale: float) -> None:
    """The map of C is that of C times any number, and a wrong one is noticed there too: norms square their entries."""
    for shape in SHAPES:
        values = VALUES[name](min(shape))
        u, v, c = known(shape, values)
        polar, kept = procrustes(c * scale), values > 0
        assert int(polar.rank) == int(kept.sum()), shape
        gap = float(values[kept].min() / values.max()) if kept.any() else 0.0
        worst = ratios(c, polar.map, u[:, kept] @ v[:, kept].T, gap)
        assert max(worst.values()) <= THRESHOLD, (shape, worst)
        if min(shape) > 1 and kept.any():
            with pytest.raises(NumericalError, match="failed its certificate"):
                certify(polar.map @ torch.linalg.qr(draw(shape[1], shape[1]))[0], c * scale, polar.rank, floor=FLOOR)


@pytest.mark.parametrize("name", ["rank-deficient", "zero", "below the floor", "one silent feature"])
def test_iteration_leaves_to_lapack_what_the_floor_may_cut(name: str) -> None:
    if name in VALUES:
        _, _, c = known((33, 17), VALUES[name](17))
    elif name == "below the floor":
        _, _, c = known((33, 17), torch.cat([torch.ones(16), torch.tensor([FLOOR / 2])]).double())
    else:
        c = draw(33, 17)
        c[:, 3] = 0
    assert _newton(c, FLOOR) is None and _newton(c.T, FLOOR) is None


def test_iterated_and_decomposed_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [known(shape, VALUES["graded"](min(shape)))[2] for shape in SHAPES if min(shape) > 1]
    decomposed = [procrustes(c) for c in cases]
    monkeypatch.setattr("theseus_transport.linalg.procrustes.ITERATE_FROM", 2)
    for c, expected in zip(cases, decomposed, strict=True):
        found = procrustes(c)
        bound = THRESHOLD * torch.finfo(torch.float64).eps * max(c.shape) * CONDITION
        assert int(found.rank) == int(expected.rank) and float(norm(found.map - expected.map)) <= bound
