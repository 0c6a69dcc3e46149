"""Blocks paired as told: exact where that is the right pairing, and only there."""

import pytest
import torch

from . import pairs as p
from .controls import aligned, moved_error
from .models import TOLERANCE
from .pairs_llama import BIASED, GROUPED
from .pairs_text import UNTIED
from .test_effect import RECIPE

PAIRS = {  # and the blocks of the source behind those that were put in between
    "in front of both": (p.Pair("told", GROUPED, (p.residual(p.rotated), p.deeper(0, 1))), (None, 0, None, 1)),
    "at the end": (p.Pair("told-end", BIASED, (p.deeper(1, 2),)), (0, None, 1, None)),
    "gpt2": (p.Pair("told-gpt2", UNTIED, (p.residual(p.rotated), p.deeper(0, 2))), (None, 0, 1, None)),
}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("recipe", ["coherent", RECIPE], ids=["coherent", "effect"])
def test_the_right_pairing_is_exact_and_a_wrong_one_is_not(name, recipe):
    pair, right = PAIRS[name]
    source, tuned, target, _ = pair.sides("linear")
    told = aligned(pair, torch.float64, recipe, depth=right)
    assert moved_error(told, source, tuned, target, torch.float64) <= TOLERANCE[torch.float64]
    wrong = aligned(pair, torch.float64, recipe, depth=(0, 1, None, None))
    assert moved_error(wrong, source, tuned, target, torch.float64) > 1e-3


@pytest.mark.parametrize("recipe", ["coherent", RECIPE], ids=["coherent", "effect"])
def test_evenly_spread_is_exact_where_blocks_lie_so(recipe):
    pair, right = PAIRS["at the end"]
    source, tuned, target, _ = pair.sides("linear")
    spread = aligned(pair, torch.float64, recipe, depth="relative")
    assert tuple(spread.blocks) == right
    assert moved_error(spread, source, tuned, target, torch.float64) <= TOLERANCE[torch.float64]
