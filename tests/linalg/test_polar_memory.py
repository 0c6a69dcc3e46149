"""``polar_bytes`` bounds what one map takes, closely where the steps are ours: what torch allocates, byte by byte."""

import pytest
import torch
from helpers.allocated import peak_of
from theseus_transport.linalg.polar import BUFFERS, polar_bytes
from theseus_transport.linalg.procrustes import procrustes

SCALARS = 1.01  # numbers and vectors, which the formula leaves out
SHAPES = [(60, 1200), (1200, 60), (110, 100), (200, 200), (100, 182), (184, 100)]  # the last two on either side of QR


def test_a_peak_is_what_lives_at_one_time() -> None:
    def work() -> torch.Tensor:
        torch.zeros(3000, dtype=torch.uint8)  # gone before the next
        kept = torch.zeros(1000, dtype=torch.float64)
        return (kept + 1).sum()

    assert 16_000 <= peak_of(work) <= 16_100  # and a few numbers: the sum


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "method, predicted, full, least",
    [
        ("iterate", "newton", True, 0.85),
        ("iterate", "iterate", False, 0.75),
        ("lapack", "lapack", True, 1 / 3),  # a bound: what gesdd asks for differs between wide and tall
        ("auto", "auto", False, 1 / 3),
    ],
)
def test_peak_memory_is_as_predicted(
    shape: tuple[int, int], method: str, predicted: str, full: bool, least: float
) -> None:
    c = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    c[:, len(c.T) if full else min(shape) // 3 :] = 0
    used = peak_of(lambda: procrustes(c, floor=1e-4, method=method))  # type: ignore[arg-type]
    expected = polar_bytes(*shape, method=predicted) - BUFFERS
    assert least * expected <= used <= SCALARS * expected


def test_energies_take_a_copy_more_below_full_rank() -> None:
    c = torch.randn(60, 1200, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    c[:, 20:] = 0
    energies = c.square().sum(1), c.square().sum(0)
    used = peak_of(lambda: procrustes(c, floor=1e-4, method="iterate", energies=energies))
    assert used <= SCALARS * (polar_bytes(60, 1200, method="iterate") - BUFFERS + c.nbytes)
