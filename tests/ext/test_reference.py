"""Every op has a plain twin in ``theseus_ext.reference`` with its arguments, and decompositions agree with theirs."""

import inspect

import pytest
import torch

import theseus_ext
from theseus_ext import ops, reference

OPS = [name for name in ops.__all__ if inspect.isfunction(getattr(ops, name))]
EPS = torch.finfo(torch.float64).eps


@pytest.mark.parametrize("name", OPS)
def test_a_twin_takes_what_its_op_takes(name):
    own, twin = (list(inspect.signature(getattr(module, name)).parameters) for module in (ops, reference))
    assert twin == own or twin == [*own[:2], "source_mixing", "target_mixing", "masters"]


@pytest.mark.parametrize("shape", [(5, 9, 4), (2, 3, 6, 6), (1, 1, 1), (0, 3, 2)])
def test_decompositions_are_their_twins(shape):
    torch.manual_seed(0)
    matrices = torch.randn(*shape, dtype=torch.float64)
    matrices[..., :, -1:] *= 1e-9  # below the floor where there is more than one column
    u, s, vh = theseus_ext.svd(matrices)
    twin = reference.svd(matrices)
    size = max(shape[-2:])
    within = {"rtol": 0, "atol": 50 * size * EPS * float(s.max()) if s.numel() else 0}  # of backward stable ones
    torch.testing.assert_close((u * s[..., None, :]) @ vh, (twin[0] * twin[1][..., None, :]) @ twin[2], **within)
    for values in (s, theseus_ext.svdvals(matrices), theseus_ext.polar(matrices, 1e-6)[1]):
        torch.testing.assert_close(values, reference.svdvals(matrices), **within)
    # perturbed by eps |A| a polar factor moves by eps |A| / gap; the gap of these is above a thousandth
    gap = {"rtol": 0, "atol": 1000 * within["atol"]}
    torch.testing.assert_close(theseus_ext.polar(matrices, 1e-6)[0], reference.polar(matrices, 1e-6)[0], **gap)
