"""Partial whitening: what it does to a cross-moment, and that only the recipe ``paper`` takes it."""

import pytest
import torch
from theseus_transport import InputRefused, NumericalError, Recipe
from theseus_transport.activations.moments import CrossMoment
from theseus_transport.linalg.whitening import whiten
from theseus_transport.recipes.paper import comparable, output_map
from torch import Tensor

ROUNDING = dict(rtol=1e-9, atol=1e-9)  # float64, Grams of condition up to 1e4


def rows(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments(s: Tensor, t: Tensor) -> list[CrossMoment]:
    out = []
    for x, y in ((s, t), (s, s), (t, t)):
        out.append(CrossMoment.zeros(x.shape[1], y.shape[1]))
        out[-1].update(x, y)
    return out


def test_no_power_changes_nothing() -> None:
    s, t = rows(0, 50, 4), rows(1, 50, 6)
    assert torch.allclose(whiten(s.T @ t, (s.T @ s, t.T @ t), power=0.0, eps=1e-6), s.T @ t, **ROUNDING)


def test_whole_whitening_leaves_correlations() -> None:
    """Singular values are then canonical correlations: at most one, and the same in every basis of the features."""
    s, t, other = rows(0, 50, 4), rows(1, 50, 6), rows(2, 4, 4)
    t[:, :2] += s[:, :2]

    def correlations(x: Tensor) -> Tensor:
        return torch.linalg.svdvals(whiten(x.T @ t, (x.T @ x, t.T @ t), power=0.5, eps=1e-12))

    assert torch.allclose(correlations(s), correlations(s @ other), **ROUNDING)
    assert 0.5 < float(correlations(s)[0]) <= 1 + 1e-9


def test_dead_features_do_not_explode() -> None:
    s, t = rows(0, 50, 4), rows(1, 50, 4)
    s[:, 2] = 0
    found = whiten(s.T @ t, (s.T @ s, t.T @ t), power=0.5, eps=1e-6)
    assert not found[2].any() and float(torch.linalg.svdvals(found)[0]) <= 1 + 1e-6


def test_gram_that_is_not_finite() -> None:
    with pytest.raises(NumericalError, match=r"Gram \[3, 3\] to whiten with holds NaN"):
        whiten(torch.eye(3), (torch.full((3, 3), torch.nan), torch.eye(3)), power=0.5, eps=1e-6)


def test_centring_is_of_the_rows_and_comes_first() -> None:
    s, t = rows(0, 80, 6) + 1, rows(1, 80, 7) - 1
    cross, *grams = moments(s, t)
    found = comparable(cross, dict(enumerate(grams)), Recipe(name="paper", center=True, whiten_power=0.25))
    s, t = s - s.mean(0), t - t.mean(0)
    assert torch.allclose(found, whiten(s.T @ t, (s.T @ s, t.T @ t), power=0.25, eps=Recipe().whiten_eps), **ROUNDING)


@pytest.mark.parametrize("center", [False, True])
def test_derived_outputs_whiten_like_observed_ones(center: bool) -> None:
    """Of a layer that does not expand, so no null space is weighed."""
    recipe = Recipe(name="paper", center=center, whiten_power=0.25)
    s, t = rows(0, 80, 6) + 1, rows(1, 80, 7) - 1
    w_s, w_t = rows(2, 5, 7), rows(3, 6, 8)
    observed = moments(s @ w_s[:, :-1].T + w_s[:, -1], t @ w_t[:, :-1].T + w_t[:, -1])
    seen = moments(s, t)
    polar, _ = output_map(seen[0], w_s, w_t, recipe=recipe, grams={0: seen[1], 1: seen[2]})
    u, _, vh = torch.linalg.svd(comparable(observed[0], {0: observed[1], 1: observed[2]}, recipe), full_matrices=False)
    assert torch.allclose(polar.map, u @ vh, **ROUNDING)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (dict(whiten_power=0.6), r"whiten_power is 0\.6; it must be between 0 \(none\) and 0\.5"),
        (dict(whiten_power=float("nan")), "whiten_power is nan"),
        (dict(whiten_eps=0.0), r"whiten_eps is 0\.0; it must be above 0"),
        (dict(name="coherent", whiten_power=0.5), "whiten_power belongs to the paper recipe"),
    ],
)
def test_refused(options: dict[str, object], text: str) -> None:
    with pytest.raises(InputRefused, match=text):
        Recipe.named("paper", **options)
