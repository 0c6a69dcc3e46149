"""Exact controls, ViT: the moved target computes what the tuned source computes, on images not used to calibrate.

Which control a planted bug turns red:

    gains and biases of norms not folded          vit-identity-new-gains-* (0.62)
    fc1 mapped by its own output                  every pair (0.26)
    heads paired by index                         vit-permuted-* (0.6)
    no scale                                      vit-widened-* (0.61)
    writers mapped by their own output            vit-rotated-* (0.39): the mean is free under LayerNorm
    writers scaled by energy with the mean        vit-rotated-* (2.3)
    bias of a reader without one dropped          vit-identity-no-qkv-bias-* (0.56)
    bias not scaled                               vit-widened-gains (0.27)
    rank-poor first space not completed           vit-rank-poor-patches-everything (0.34)
    final norm's gain left when nothing reads it  vit-no-head-gains
"""

import pytest
import torch

from .controls import cases, error
from .models import TOLERANCE
from .pairs_vit import EXACT


@pytest.mark.parametrize("pair, kind", cases("vit", EXACT, lora=False))
def test_exact(pair, kind):
    assert error(pair, kind) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("pair, kind", [c for c in cases("vit", EXACT, lora=False) if c.values[1] == "everything"])
def test_exact_in_float32(pair, kind):
    assert error(pair, kind, torch.float32) <= TOLERANCE[torch.float32]
