"""The weights of the polar iteration's steps are the best there are."""

import numpy as np
import pytest
from test_procrustes import EPS
from theseus_transport.linalg import polar
from theseus_transport.linalg.polar import ENTRY, LIFT, QUINTICS, qdwh_weights


def minimax(low: float, high: float) -> tuple[np.ndarray, float]:
    """Remez: odd quintic a, b, c nearest 1 on [low, high], and its error, which alternates in four points."""
    inner = low + (high - low) * np.array([0.25, 0.75])
    for _ in range(50):
        s = np.array([low, *inner, high])
        *weights, error = np.linalg.solve(np.stack([s, s**3, s**5, [1, -1, 1, -1]], 1), np.ones(4))
        a, b, c = weights
        inner = np.sqrt(np.sort(np.roots([5 * c, 3 * b, a]).real))
    return np.array(weights), float(error)


def quintic(weights: tuple, s: np.ndarray) -> np.ndarray:
    a, b, c = weights
    return s * (a + b * s**2 + c * s**4)


def test_quintics_are_optimal_where_values_lie() -> None:
    """Four points of equal error of alternating sign: by Chebyshev no odd quintic is nearer."""
    low, high = ENTRY, 1.0
    for found in QUINTICS[:2]:
        weights, error = minimax(low, high)
        np.testing.assert_allclose(found, weights, rtol=1e-12)  # eps times the condition of four equations, ~1e3
        s = np.linspace(low, high, 100_001)
        assert np.abs(1 - quintic(found, s)).max() == pytest.approx(error, rel=1e-9)
        low, high = 1 - error, 1 + error
    assert low / high > 0.99  # where Taylor's weights do: error 5/2 e^3 + O(e^4)
    error = 1 - low
    for found in (QUINTICS[2], polar.LAST):
        error = float(np.abs(1 - quintic(found, np.linspace(1 - error, 1 + error, 10_001))).max())
    assert error <= 4 * EPS  # rounding of the polynomial itself


def test_lift_is_optimal_and_never_lets_a_value_fall_back() -> None:
    weights, error = minimax(0.1, 1.0)
    np.testing.assert_allclose(LIFT, weights / (1 + error), rtol=1e-12)
    s = np.linspace(0, 1, 100_001)
    value = quintic(LIFT, s)
    assert value.max() <= 1 + 4 * EPS and value[s >= 0.1].min() >= ENTRY
    assert (np.diff(value[s <= 0.1]) > 0).all() and (value[s <= 0.1] >= s[s <= 0.1]).all()


@pytest.mark.parametrize("low", [1e-8, 1e-5, 1e-2, 0.3])
def test_rational_weights_are_optimal(low: float) -> None:
    """f(1) = 1 is the maximum, and the minimum inside [low, 1] equals f(low): three points alternate."""
    a, b, c = qdwh_weights(low)
    s = np.geomspace(low, 1, 200_001)
    value = s * (a + b * s**2) / (1 + c * s**2)
    tolerance = 1e-9  # of the grid
    assert value[-1] == pytest.approx(1, rel=1e-12) and value.max() <= 1 + 1e-12
    assert value[len(s) // 10 :].min() >= value[0] * (1 - tolerance)
    dip = value[np.flatnonzero(np.diff(value) < 0)[-1] + 1]  # the last point of the falling stretch
    assert dip == pytest.approx(value[0], rel=1e-6)
