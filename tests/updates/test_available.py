"""What moves look up while a solver is at work: its own maps, no longer than it keeps them."""

import weakref

import pytest
import torch
from theseus_transport.recipes.maps import Dense
from theseus_transport.recipes.ruleset import Rule, Ruleset
from theseus_transport.updates.available import Available


def made() -> Ruleset:
    ruleset = Ruleset(rules={"layer": Rule("own", "in", "out")}, vectors={"gain": Rule("gain", "identity", "in")})
    for name in ("in", "out"):
        ruleset.put(name, Dense(torch.eye(2)))
    return ruleset


def test_maps_live_as_long_as_the_solver_keeps_them():
    available, ruleset = Available(), made()
    kept = weakref.ref(ruleset.maps["out"])
    with available.showing(ruleset):
        assert available.maps["out"] is kept() and available.ready("layer") and available.ready("gain")
    assert not available.ready("layer") and available.rule("layer") == ruleset.rules["layer"]
    del ruleset.maps["out"]
    assert kept() is None


def test_a_rule_is_ready_with_both_its_maps():
    available, ruleset = Available(), made()
    del ruleset.maps["out"]
    with available.showing(ruleset):
        assert available.ready("gain") and not available.ready("layer") and not available.ready("other")


def test_an_error_leaves_no_maps():
    available = Available()
    with pytest.raises(ZeroDivisionError), available.showing(made()):
        raise ZeroDivisionError
    assert not available.maps
