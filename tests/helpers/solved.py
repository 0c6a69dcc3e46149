"""Pairs of models, what is seen of them, and what solvers make of it: whole, in portions, in another process."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

from exact.families import CLIP, GPT2_TIED, LLAMA, QWEN3, VIT
from exact.models import Spec, base, batches
from safetensors.torch import load_file, save_file
from theseus_transport import Recipe
from theseus_transport.activations.capture import Capture, capture
from theseus_transport.activations.links import Pairs, Place
from theseus_transport.models.base import Base
from theseus_transport.models.geometry import Geometry
from theseus_transport.recipes.behind_norms import together
from theseus_transport.recipes.maps import Map
from theseus_transport.recipes.ruleset import Ruleset
from theseus_transport.recipes.solver import Solver
from torch import Tensor

FEW = {"tokens": (3, 7, 11, 19, 23, 31, 42, 48, 55, 59)}  # 10 of 60: the first map is rank-poor
FLOOR = 1e-12  # of models in float64
RECIPES = {
    "coherent": Recipe("coherent", floor=FLOOR),
    "regression": Recipe("coherent", scale="regression", floor=FLOOR),
    "dense": Recipe("coherent", heads="dense", scale="regression", floor=FLOOR),
    "completed": Recipe("coherent", null="completed", floor=FLOOR),
    "paper": Recipe("paper", floor=FLOOR),
    "whitened": Recipe("paper", center=True, whiten_power=0.25, floor=FLOOR),
}


@dataclass(frozen=True)
class Case:
    """Two unrelated models, what they are aligned on, and which source block feeds which target block."""

    source: Spec
    target: Spec
    data: dict
    blocks: tuple[int | None, ...]

    @cached_property
    def bases(self) -> tuple[Base, Base]:
        return Base.of(self.source.build()), Base.of(self.target.build())

    @property
    def geometries(self) -> tuple[Geometry, Geometry]:
        return self.bases[0].geometry, self.bases[1].geometry

    @property
    def pairs(self) -> Pairs:
        return Pairs(*self.geometries, self.blocks)

    def seen(self, recipe: Recipe) -> Capture:
        models = self.source.build(), self.target.build()
        grams = recipe.solver.gram_sides(self.pairs, recipe, self.pairs.moments)
        with capture(*models, self.pairs, energies=recipe.solver.reads_energies, grams=grams) as found:
            for batch in batches(self.source, seed=3, **self.data):
                found.run(self.source.seen(batch), self.target.seen(batch))
        return found


def case(
    names, blocks: tuple[int | None, ...], depth: int = 2, data: dict | None = None, more: dict | None = None, **options
) -> Case:
    """``options`` are of both models, ``more`` of the target."""
    target = base(names, seed=5, width=36, num_hidden_layers=len(blocks), **options, **(more or {}))
    return Case(base(names, num_hidden_layers=depth, **options), target, data or {}, blocks)


CASES = {
    "llama": case(LLAMA, (0, 1)),
    "llama-few": case(LLAMA, (0, 1), data=FEW),
    "llama-deeper": case(LLAMA, (0, None, 1, None)),
    "llama-later": case(LLAMA, (None, 0, 2, None), depth=3, data=FEW),
    "llama-second": case(LLAMA, (1, 2), depth=3),
    "llama-heads": case(LLAMA, (0, 1), more={"num_attention_heads": 9, "num_key_value_heads": 3}),  # of 4 in 2 groups
    "qwen3": case(QWEN3, (0, 1)),
    "vit": case(VIT, (0, 1)),
    "vit-deeper": case(VIT, (None, 0, 1)),
    "clip": case(CLIP, (0, 1)),
    "clip-few": case(CLIP, (0, 1), data={"shape": (1, 1), "count": 1}),  # 17 tokens, 24 features
    "clip-shallower": case(CLIP, (0, 2), depth=3),
    "tied": case(GPT2_TIED, (0, 1), data=FEW, tie_word_embeddings=True),
}


@cache
def evidence(name: str, recipe: str) -> Capture:
    return CASES[name].seen(RECIPES[recipe])


def opened(name: str, recipe: str) -> Solver:
    """A solver as any process would make it."""
    case, chosen = CASES[name], RECIPES[recipe]
    bases, seen = case.bases, evidence(name, recipe)
    toward = together(*bases, seen.links, seen.moments) if chosen.null == "completed" else None
    return chosen.solver(*bases, case.blocks, chosen, toward=toward)


@cache
def whole(name: str, recipe: str) -> Ruleset:
    seen = evidence(name, recipe)
    return opened(name, recipe).whole(dict(seen.moments), dict(seen.energies), dict(seen.grams))


def portions(name: str) -> Sequence[tuple[Place, Sequence[str]]]:
    return CASES[name].pairs.arrivals


def give(solver: Solver, seen: Capture, names: Iterable[str]) -> None:
    kept = ({n: store[n] for n in names if n in store} for store in (seen.moments, seen.energies, seen.grams))
    solver.add(*kept)


def in_another_process(solver: Solver, fresh: Solver, folder: Path) -> Solver:
    """The fresh one, from what a file and a line of JSON keep of the other."""
    state, tensors = solver.state()
    save_file({name: t.contiguous().clone() for name, t in tensors.items()}, folder / "state.safetensors")
    fresh.restore(json.loads(json.dumps(state)), load_file(folder / "state.safetensors"))
    return fresh


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()


def same_map(a: Map, b: Map) -> bool:
    ours, theirs = a.tensors(), b.tensors()
    same = (same_bits(t.contiguous(), theirs[part].contiguous()) for part, t in ours.items())
    return type(a) is type(b) and ours.keys() == theirs.keys() and all(same)


def assert_same(made: Ruleset, maps: dict[str, Map], expected: Ruleset) -> None:
    assert maps.keys() == expected.maps.keys() and made.kinds == expected.kinds
    assert not [name for name, t in maps.items() if not same_map(t, expected.maps[name])]
    for field in ("rules", "vectors", "reports"):
        assert getattr(made, field) == getattr(expected, field), field
    assert {b: p.plain() for b, p in made.pairings.items()} == {b: p.plain() for b, p in expected.pairings.items()}
