"""Exact controls, Llama: the moved target computes what the tuned source computes, on tokens not used to calibrate.

Which control a planted bug turns red:

    gains of norms not folded                     llama-identity-new-gains-* (0.33), every pair with new gains
    gate, up mapped by their own outputs          every pair (0.36)
    heads paired by index                         llama-permuted-* (0.95)
    no scale                                      llama-widened-* (0.21), llama-up-times-3-* (0.73)
    dense map for q and k                         every pair, as heads x head size > width (0.15)
    silent neurons counted in the scale           llama-silent-gate-*, llama-silent-up-* (0.02)
    copies of a head not divided                  llama-one-head-copied-* (0.29)
    copies weighted alike, fit or not             llama-own-heads-*, llama-own-queries-* (0.1 to 0.3)
    bias not scaled                               llama-rotated-biased-layers-gains (0.25)
    rank-poor first space not completed           llama-rank-poor-vocabulary-* (0.39 to 0.58)
"""

import pytest
import torch

from .controls import cases, error
from .models import TOLERANCE
from .pairs_llama import EXACT


@pytest.mark.parametrize("pair, kind", cases("llama", EXACT, lora=False))
def test_exact(pair, kind):
    assert error(pair, kind) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("pair, kind", [c for c in cases("llama", EXACT, lora=False) if c.values[1] == "everything"])
def test_exact_in_float32(pair, kind):
    assert error(pair, kind, torch.float32) <= TOLERANCE[torch.float32]
