"""On a device the maps of a portion that have one shape are made by one call."""

import pytest
from helpers.solved import CASES, RECIPES, evidence, opened, portions
from theseus_transport.recipes import coherent
from theseus_transport.recipes.solver import Solver


@pytest.mark.parametrize("name", ["llama", "llama-few", "vit"])
def test_maps_of_one_shape_are_made_together(name, monkeypatch):
    """The same maps and reports, to the bit: LAPACK takes the matrices of a batch one after the other."""
    polar, shapes = Solver.polar, []

    def noted(self, cross, **options):
        shapes.append(tuple(cross.shape))
        return polar(self, cross, **options)

    seen, plans = evidence(name, "coherent"), []
    for remote in (False, True):
        monkeypatch.setattr(coherent, "remote", lambda x, remote=remote: remote)
        with monkeypatch.context() as patched:
            if remote:
                patched.setattr(Solver, "polar", noted)
            solver = opened(name, "coherent")
            plans.append(solver.whole(dict(seen.moments), dict(seen.energies), dict(seen.grams)))
    (one, other), width = plans, (CASES[name].geometries[0].width, CASES[name].geometries[1].width)
    assert one.maps.keys() == other.maps.keys() and one.reports == other.reports
    for space, t in one.maps.items():
        assert all(part.equal(other.maps[space].tensors()[n]) for n, part in t.tensors().items()), space
    links = solver.pairs.moments
    most = max(sum(n in links and links[n].target.norm is not None for n in names)
               for _, names in portions(name))  # fmt: skip
    assert most > 1 and max(len(shape) for shape in shapes if shape[-2:] == width) == 3
    assert max(shape[0] for shape in shapes if len(shape) == 3 and shape[-2:] == width) == most
    assert RECIPES["coherent"].null == "partial"
