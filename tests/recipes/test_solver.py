"""Solvers: block by block, interrupted anywhere or with part of the evidence, they decide what a whole run decides."""

from pathlib import Path

import pytest
import torch
from exact.models import batches
from helpers.solved import (
    CASES,
    RECIPES,
    assert_same,
    evidence,
    give,
    in_another_process,
    opened,
    portions,
    same_bits,
    same_map,
    whole,
)
from theseus_transport import Alignment, Recipe, align
from theseus_transport.alignment.alignment import outline
from theseus_transport.files.checkpoint import Checkpoint
from theseus_transport.recipes.behind_norms import normalised, together
from theseus_transport.recipes.ruleset import Ruleset

# --- interrupted anywhere --------------------------------------------------------------------------------------------


STOPPED = {
    "coherent": ["llama", "llama-few", "llama-heads", "clip", "tied"],
    "regression": CASES,
    "completed": ["llama-few", "clip-shallower"],
    "paper": ["llama-later", "qwen3", "clip", "vit"],
    "whitened": ["llama", "vit-deeper", "tied"],
}


@pytest.mark.parametrize("name, recipe", [(name, recipe) for recipe, names in STOPPED.items() for name in names])
def test_a_run_that_stops_after_every_block_plans_the_same_bits(name: str, recipe: str, tmp_path: Path) -> None:
    """Maps nobody keeps are deleted meanwhile; the last stop is behind the end."""
    seen, solver, maps = evidence(name, recipe), opened(name, recipe), {}
    for place, names in portions(name):
        give(solver, seen, names)
        if place is not None:
            solver.block(place)
        maps |= solver.ruleset.maps
        for gone in solver.ruleset.maps.keys() - solver.keep - {"identity"}:
            del solver.ruleset.maps[gone]
        solver = in_another_process(solver, opened(name, recipe), tmp_path)
    solver.finish()
    solver = in_another_process(solver, opened(name, recipe), tmp_path)
    assert_same(solver.ruleset, maps | solver.ruleset.maps, whole(name, recipe))
    assert not solver.keep and not solver.moments


def test_align_plans_the_same(tmp_path: Path) -> None:
    """By position, where depths agree."""
    for name in ("llama-few", "clip"):
        case = CASES[name]
        pairs = [(case.source.seen(b), case.target.seen(b)) for b in batches(case.source, seed=3, **case.data)]
        for recipe in ("regression", "completed", "whitened"):
            made = align(case.source.build(), case.target.build(), pairs, recipe=RECIPES[recipe])
            expected = whole(name, recipe)
            assert made.rules == expected.rules and made.vectors == expected.vectors
            assert all(same_map(t, expected.maps[n]) for n, t in made.maps.items())


# --- with part of the evidence ---------------------------------------------------------------------------------------


def alone(name: str, recipe: str, needed: set[str]) -> Ruleset:
    """The ruleset where only these links arrive, and those behind norms where the first map asks for them."""
    solver, seen = opened(name, recipe), evidence(name, recipe)
    for place, names in portions(name):
        given = [n for n in names if n in needed or (solver.wants_together and n in seen.moments)]
        give(solver, seen, given)
        if place is not None:
            solver.block(place)
    solver.finish()
    return solver.ruleset


@pytest.mark.parametrize(
    "name, recipe",
    [
        *(
            (name, recipe)
            for name in ("llama-few", "llama-later", "qwen3", "clip")
            for recipe in ("regression", "paper")
        ),
        *(("clip-few", "coherent"), ("tied", "dense"), ("tied", "whitened")),
    ],
)
def test_a_layer_by_itself_needs_what_it_says_and_no_less(name: str, recipe: str) -> None:
    """Given what it needs a layer, or a vector, has the rule and maps of a whole run; without any of it, no rule."""
    expected, solver = whole(name, recipe), opened(name, recipe)
    layers = {layer.name: layer for layer in solver.target.geometry.layers()}
    asked = {n: solver.needs([layers[n]], []) for n in expected.rules}
    asked |= {n: solver.needs([], [n]) for n in expected.vectors}
    assert set().union(*asked.values()) <= solver.every
    every = {**expected.rules, **expected.vectors}
    for target, needed in asked.items():
        made = alone(name, recipe, needed)
        rule = {**made.rules, **made.vectors}[target]
        assert rule == every[target], target
        assert all(same_map(made.maps[n], expected.maps[n]) for n in {rule.input, rule.output}), target
        for link in needed if ".1." in target or "." not in target else ():
            assert target not in {**(less := alone(name, recipe, needed - {link})).rules, **less.vectors}, link


def test_blocks_without_a_partner_need_nothing() -> None:
    solver = opened("llama-deeper", "coherent")
    unfed = [layer for layer in solver.target.geometry.layers() if layer.block in (1, 3)]
    assert len(unfed) == 14 and solver.needs(unfed, [layer.name for layer in unfed]) == set()


def test_nothing_seen_is_nothing_planned() -> None:
    for recipe in ("coherent", "paper"):
        made = alone("clip", recipe, set())
        assert list(made.maps) == ["identity"] and not made.rules and not made.vectors and not made.reports


# --- what is held ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["coherent", "regression", "paper", "whitened"])
@pytest.mark.parametrize("name", ["llama", "llama-few", "clip-shallower"])
def test_moments_go_with_their_block(name: str, recipe: str) -> None:
    solver, seen = opened(name, recipe), evidence(name, recipe)
    for place, names in portions(name):
        give(solver, seen, names)
        if place is None:
            continue
        assert {f"{place}.{part}" for part in ("attention", "context", "middle")} <= solver.moments.keys()
        solver.block(place)
        late = {"0.attention"} if solver.wants_together else set()
        late |= {"final", "final.class"} if recipe == "regression" else set()
        assert solver.moments.keys() <= {f"{place + 1}.attention", *late}
        assert solver.grams.keys() <= solver.moments.keys()
        assert not any(f".{place}." in energy for energy in solver.energies)


def test_the_first_map_asks_for_deeper_spaces_where_it_is_rank_poor() -> None:
    for name, poor in (("llama", False), ("llama-few", True)):
        solver, seen = opened(name, "coherent"), evidence(name, "coherent")
        assert not solver.wants_together
        give(solver, seen, portions(name)[0][1])
        assert solver.wants_together == poor
    with pytest.raises(ValueError, match=r"the first map is completed from all spaces .* 0\.mlp did not arrive"):
        solver.finish()
    assert not opened("llama-few", "paper").wants_together


def test_maps_completed_toward_nothing_are_refused() -> None:
    bases, seen = CASES["llama"].bases, evidence("llama", "completed")
    solver = RECIPES["completed"].solver(*bases, (0, 1), RECIPES["completed"])
    with pytest.raises(ValueError, match=r"give toward=together"):
        give(solver, seen, portions("llama")[0][1])


def test_an_input_that_waits_for_its_map_is_fitted() -> None:
    """Of q, k and v of the first block, whose map is completed at the end: as any input, by its cosine."""
    by_energy, by_fit = (whole("llama-few", recipe) for recipe in ("coherent", "regression"))
    seen, link = evidence("llama-few", "coherent"), "0.attention"
    z = normalised(*CASES["llama-few"].bases, seen.links[link], seen.moments[link])
    t = by_fit.maps["0.attention.completed"]
    fit = float(t(z.cross.T).trace() / (z.source_energy.sum() * z.target_energy.sum()).sqrt())
    for role in "qkv":
        rule, before = (made.rules[f"layers.0.self_attn.{role}_proj"] for made in (by_fit, by_energy))
        assert rule.input == "0.attention.completed" and 0.01 < fit < 0.99
        assert rule.scale_in == pytest.approx(before.scale_in / fit, rel=1e-12)  # the same sums, in another order


def test_the_sum_over_depth_may_be_made_in_portions() -> None:
    for name in CASES:
        seen, bases, found = evidence(name, "coherent"), CASES[name].bases, None
        for _, names in portions(name):
            moments = {n: seen.moments[n] for n in names if n in seen.moments}
            found = together(*bases, seen.links, moments, found)
        at_once = together(*bases, seen.links, seen.moments)
        assert found is not None and at_once is not None and same_bits(found, at_once)


# --- in which order --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_every_link_arrives_once_and_moments_in_the_order_of_a_pass(name: str) -> None:
    pairs = CASES[name].pairs
    found = [link for _, names in portions(name) for link in names]
    assert sorted(found) == sorted([*pairs.moments, *pairs.class_rows, *pairs.energies])
    assert [link for link in found if link in pairs.moments] == list(pairs.moments)


def test_what_a_block_shows() -> None:
    found = portions("llama-later")
    moments = [(place, [n for n in names if not n.startswith("layers")]) for place, names in found]
    parts = "attention", "context", "mlp", "middle", "after"
    assert moments == [
        (None, ["embedding", "embedding.output"]),
        (1, [f"1.{part}" for part in parts]),
        (2, [f"2.{part}" for part in parts]),
        (None, ["final"]),
    ]
    assert [len(names) for _, names in found] == [2, 12, 12, 1]  # 7 layers a block
    last = ["1.context", "1.mlp", "1.middle", "final"]
    alone = [f"{name}.class" for name in last]
    assert portions("clip")[2][1][: 2 * len(last)] == [*last, *alone] and not CASES["clip"].pairs.reads_one_token(0)
    assert portions("clip")[0] == (None, ["embedding", "0.attention", "embedding.output", "embedding.norm"])
    assert "final" in portions("llama")[2][1] and portions("llama")[3] == (None, [])


# --- on disk ---------------------------------------------------------------------------------------------------------


def saved(name: str, recipe: str, folder: Path) -> Alignment:
    made, case = whole(name, recipe), CASES[name]
    draft = outline(*case.geometries, RECIPES[recipe], case.blocks)
    fields = {n: getattr(made, n) for n in ("maps", "rules", "vectors", "reports")}
    alignment = Alignment(**{**vars(draft), **fields})
    alignment.save(folder)
    return alignment


@pytest.mark.parametrize(
    "name, recipe",
    [
        *((name, recipe) for name in CASES for recipe in ("coherent", "paper")),
        *(("vit", "dense"), ("clip-shallower", "dense"), ("tied", "dense")),
    ],
)
def test_maps_are_known_before_they_are_made(name: str, recipe: str, tmp_path: Path) -> None:
    """All names, shapes and dtypes; of the planned only completed maps may not come to be."""
    alignment = saved(name, recipe, tmp_path / "maps")
    written = Checkpoint.open(tmp_path / "maps" / "maps.safetensors")
    planned = {n: (shape, dtype) for n, shape, dtype in alignment.planned_maps}
    found = {n: (written.shapes[n], written.dtypes[n]) for n in written}
    assert {n: planned.get(n) for n in found} == found
    completed = {n for n in planned if ".completed/" in n}
    assert planned.keys() - found.keys() in (set(), completed) and bool(completed) == (recipe != "paper")


def test_maps_are_read_when_they_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, read = saved("clip", "coherent", tmp_path / "maps"), []
    plain = Checkpoint.__getitem__
    monkeypatch.setattr(Checkpoint, "__getitem__", lambda self, name: read.append(name) or plain(self, name))
    loaded = Alignment.load(tmp_path / "maps")
    assert not read and list(loaded.maps) == list(kept.maps) and "0.query" in loaded.maps and not read
    assert same_map(loaded.maps["0.query"], kept.maps["0.query"]) and same_map(loaded.maps["final"], kept.maps["final"])
    assert loaded.maps["0.query"] is loaded.maps["0.query"] and len(read) == 4
    for name in ("0.mlp", "1.mlp", "1.middle"):
        assert same_map(loaded.maps[name], kept.maps[name])
    read.clear()
    assert loaded.maps["1.middle"] and loaded.maps["0.query"] and not read
    assert loaded.maps["final"] and read == ["final/matrix"]  # four others were asked for since
    with pytest.raises(KeyError):
        loaded.maps["9.mlp"]


def test_an_outline_takes_a_pairing() -> None:
    geometries = CASES["llama-deeper"].geometries
    guessed, told = (outline(*geometries, Recipe("coherent"), blocks) for blocks in (None, [None, 0, 1, None]))
    assert guessed.blocks == [0, None, 1, None] and guessed.draft
    assert told.blocks == [None, 0, 1, None] and not told.draft
    assert told.rules["layers.2.mlp.up_proj"].source == "layers.1.mlp.up_proj"
    assert {name.split(".")[1] for name in told.rules if name.startswith("layers")} == {"1", "2"}


def test_evidence_of_two_blocks_at_once_is_that_of_one_after_the_other() -> None:
    """What arrives early waits."""
    seen, solver = evidence("llama-few", "regression"), opened("llama-few", "regression")
    give(solver, seen, [n for _, names in portions("llama-few") for n in names])
    for place, _ in portions("llama-few"):
        if place is not None:
            solver.block(place)
    solver.finish()
    expected = whole("llama-few", "regression")
    assert solver.ruleset.rules == expected.rules and solver.ruleset.vectors == expected.vectors
    assert all(same_map(t, expected.maps[name]) for name, t in solver.ruleset.maps.items())
    assert torch.equal(expected.pairings[0].query, solver.ruleset.pairings[0].query)
