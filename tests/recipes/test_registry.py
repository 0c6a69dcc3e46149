"""A recipe is one class and one line of the registry: here one that is in no module of ours, through whole jobs."""

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from helpers.command import call, identical
from theseus_transport import Alignment, InputRefused, Recipe
from theseus_transport.activations.links import Pairs
from theseus_transport.files.checkpoint import Checkpoint
from theseus_transport.jobs.align_job import AlignSession
from theseus_transport.jobs.settings import AlignJob, Job
from theseus_transport.jobs.transport_job import Session
from theseus_transport.models.geometry import Layer
from theseus_transport.recipes.choices import RecipeChoices
from theseus_transport.recipes.maps import Dense, PlannedMap, doubles
from theseus_transport.recipes.registry import DEFAULT, SOLVERS
from theseus_transport.recipes.ruleset import Rule
from theseus_transport.recipes.solver import Solver, Widths
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]


class ByNumber(Solver):
    """Feature i of the source is feature i of the target, in every space; the wider side's others are zero."""

    @classmethod
    def planned_maps(cls, pairs: Pairs, recipe: RecipeChoices) -> list[PlannedMap]:
        return doubles((f"{name}/matrix", size) for name, size in cls.between(pairs))

    @classmethod
    def decompositions(cls, pairs: Pairs, recipe: RecipeChoices) -> list[tuple[str, Widths]]:
        return []

    @staticmethod
    def between(pairs: Pairs) -> Iterator[tuple[str, Widths]]:
        """What every link and the output of every layer in a block is between."""
        yield from ((name, link.widths) for name, link in pairs.moments.items())
        for b in pairs.places[:-1]:
            for own, layer in pairs.layers(b):
                yield layer.name, (pairs.source.weights()[own.role][0], pairs.target.weights()[layer.role][0])

    def needs(self, layers: Iterable[Layer], vectors: Iterable[str]) -> set[str]:
        return {layer.reads for layer in layers if layer.reads in self.links}

    def _held(self, name: str) -> bool:
        return False

    def _arrived(self, names: Sequence[str]) -> None:
        for name in names:
            self.ruleset.put(name, Dense(torch.eye(*self.links[name].widths, dtype=torch.float64)))

    def _block(self, b: int) -> None:
        sizes = dict(self.between(self.pairs))
        for own, layer in self.pairs.layers(b):
            if layer.reads in self.seen:
                self.ruleset.put(layer.name, Dense(torch.eye(*sizes[layer.name], dtype=torch.float64)))
                self.ruleset.rules[layer.name] = Rule(own.name, layer.reads, layer.name, fold=False)

    def _finish(self) -> None:
        for own, layer in self.pairs.layers(None):
            if "final" in self.seen:
                self.ruleset.rules[layer.name] = Rule(own.name, "final", "identity", fold=False)


@pytest.fixture
def by_number(monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.setitem(SOLVERS, "by-number", ByNumber)
    return Recipe("by-number")


def cut(matrix: Tensor, shape: tuple[int, ...]) -> Tensor:
    """What of a matrix fits into a shape, and zeros around it."""
    found = matrix.new_zeros(shape)
    rows, columns = (min(own, into) for own, into in zip(matrix.shape, shape, strict=True))
    found[:rows, :columns] = matrix[:rows, :columns]
    return found


def test_a_recipe_of_ones_own_moves_a_lora(by_number: Recipe, models: Path, tmp_path: Path) -> None:
    """Q and v of every block; the maps know no more than which features there are."""
    sides = [str(models / "causal" / side) for side in ("source", "target")]
    lora, ids = str(models / "lora"), str(models / "ids.safetensors")
    outcome = Session(Job(sides[0], lora, sides[1], tmp_path / "out", calibration=ids, recipe=by_number)).run()
    assert outcome.job["recipe"]["name"] == "by-number" and outcome.quality
    moved, source = Checkpoint.open(tmp_path / "out"), Checkpoint.open(lora)
    assert len(source) == 8
    for name in source:
        assert torch.equal(moved[name], cut(source[name], moved.shapes[name]).to(moved[name].dtype)), name


@pytest.mark.parametrize("name", ["paper", "by-number"])
def test_a_job_and_a_stored_alignment_move_the_same(name: str, by_number: Recipe, models: Path, tmp_path: Path) -> None:
    """A job for q and v alone leaves the last block out; an alignment visits all."""
    sides = [str(models / "causal" / side) for side in ("source", "target")]
    lora, ids, recipe = str(models / "lora"), str(models / "ids.safetensors"), Recipe(name)
    outcome = Session(Job(sides[0], lora, sides[1], tmp_path / "job", calibration=ids, recipe=recipe)).run()
    assert outcome.skipped.startswith("1 of 2 blocks were not run")
    AlignSession(AlignJob(*sides, tmp_path / "maps", calibration=ids, recipe=recipe, tokens=outcome.tokens)).run()
    assert Alignment.load(tmp_path / "maps").recipe == recipe
    Session(Job.of_maps(str(tmp_path / "maps"), lora, tmp_path / "applied")).run()
    assert identical(tmp_path / "job", tmp_path / "applied")


def test_the_names_are_those_of_the_registry(by_number: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputRefused, match="recipe name is 'best'; choose one of effect, coherent, paper, by-number"):
        Recipe("best")
    with pytest.raises(InputRefused, match="center belongs to the paper recipe; by-number aligns uncentred"):
        Recipe("by-number", center=True)
    monkeypatch.setattr(ByNumber, "whitens", True)
    assert Recipe("by-number", center=True).center and Recipe().name == DEFAULT
    with pytest.raises(InputRefused, match="center belongs to the paper or by-number recipe"):
        Recipe(center=True)


def test_the_command_offers_the_registry() -> None:
    said = call("transport", "a", "b", "c", "d", "--recipe", "best").stderr
    assert [f"'{name}'" in said for name in SOLVERS] == [True] * len(SOLVERS)


def test_no_other_file_asks_for_a_recipe_by_name() -> None:
    """What differs between recipes is a fact that the solver gives."""
    names = "|".join(SOLVERS)
    asks = re.compile(rf"""(\.name|\brecipe)\s*(==|!=|(not )?in)\s*[(\[{{]?["'](?:{names})["']""")
    files = (ROOT / "python/theseus_transport").rglob("*.py")
    assert not [str(file) for file in files if asks.search(file.read_text())]
