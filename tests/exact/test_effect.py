"""Exact controls with the recipe `effect` behind `coherent`: nothing is missing there, fits leave all as it is."""

import pytest
import theseus_transport as tt
import torch
from theseus_transport.recipes.effect import writers
from theseus_transport.streaming import streams

from .controls import adapter_error, aligned, cases, error
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


FIRST = [next(case for case in DENSE if case.id.startswith(f"{family}-")) for family in TABLES]


@pytest.mark.parametrize("pair, kind", FIRST)
def test_every_writer_is_fitted_and_nothing_is_missing(pair, kind, monkeypatch):
    """Of an effect that is there: fits that did not run would leave all as it is, too."""
    asked, solve = {}, streams.solve

    def spied(update, layer, *rest, wanted):
        asked[layer.name] = wanted
        solve(update, layer, *rest, wanted=wanted)

    monkeypatch.setattr(streams, "solve", spied)
    source, tuned, target, _ = pair.sides(kind)
    models = source.build(), tuned.build(), target.build()
    update = tt.transport(aligned(pair, torch.float64, RECIPE), tt.Delta.between(*models[:2]), models[2])
    layers = writers(RECIPE, update.target.geometry.layers())
    expected = {layer.name for layer in layers if f"{layer.name}.weight" in update.target}
    assert expected and asked.keys() == expected and all(wanted > 0 for wanted in asked.values())
    assert expected <= update.fits.done and not update.fits.share.keys() & expected
