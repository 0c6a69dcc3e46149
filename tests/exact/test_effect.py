"""Exact controls with the recipe `effect` behind `coherent`: nothing is missing there, fits leave all as it is."""

import pytest
import theseus_transport as tt
import torch

from .controls import adapter_error, cases, error
from .models import LORA_RANK, TOLERANCE
from .pairs_llama import EXACT
from .pairs_text import TEXT
from .pairs_vision import VISION
from .test_families import home_made_family  # noqa: F401 - its fixture

TABLES = {"llama": EXACT, **TEXT, **VISION}
RECIPE = tt.Recipe("effect", prior="coherent")
DENSE = [case for family, table in TABLES.items() for case in cases(family, table, lora=False)]
LORA = [case for family, table in TABLES.items() for case in cases(family, table, lora=True)]


@pytest.mark.parametrize("pair, kind", DENSE)
def test_exact(pair, kind):
    assert error(pair, kind, recipe=RECIPE) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("pair, kind", LORA)
def test_adapter_is_exact(pair, kind, tmp_path):
    assert adapter_error(pair, tmp_path, recipe=RECIPE) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("pair, kind", LORA[::5])
def test_adapter_of_a_higher_rank_is_exact(pair, kind, tmp_path):
    assert adapter_error(pair, tmp_path, recipe=RECIPE, rank=2 * LORA_RANK + 1) <= TOLERANCE[torch.float64]
