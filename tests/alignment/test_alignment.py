"""Alignments: kept in a folder without loss, refused where they cannot hold, warned about where data is thin."""

import json
import logging
from functools import cache
from pathlib import Path

import pytest
import torch
from exact import pairs
from exact.models import LLAMA, VIT, Spec, base, batches, tune
from theseus_transport import Alignment, Delta, InputRefused, NumericalError, Recipe, align, transport
from theseus_transport.recipes.maps import Dense, Factored, Heads, Identity

SPECS: dict[str, tuple[Spec, Spec]] = {
    "llama": (base(LLAMA), base(LLAMA, seed=5, width=36, num_attention_heads=6, num_key_value_heads=3)),
    "vit": (base(VIT), base(VIT, seed=5, width=36, image_size=12, num_attention_heads=2)),
}


@cache
def aligned(name: str, recipe: str | Recipe = "coherent") -> Alignment:
    source, target = SPECS[name]
    data = zip(*(batches(spec, seed=3, count=2, shape=(8, 12)) for spec in SPECS[name]), strict=True)
    each = list(data) if name == "vit" else batches(source, seed=3)
    return align(source.build(), target.build(), each, recipe=recipe, provenance={"source": "some/model"})


def few(spec: Spec, *shape: int) -> list[dict]:
    return batches(spec, seed=3, count=1, shape=shape)


# --- kept in a folder ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize(
    "recipe", ["coherent", "paper", Recipe("paper", center=True, floor=1e-5)], ids=["coherent", "paper", "centred"]
)
def test_a_loaded_alignment_moves_the_same_bytes(tmp_path: Path, name: str, recipe: str | Recipe) -> None:
    kept = aligned(name, recipe)
    folder = kept.save(tmp_path / "maps")
    assert sorted(p.name for p in folder.iterdir()) == ["alignment.json", "maps.safetensors", "theseus.json"]
    loaded = Alignment.load(folder)
    for field in ("source", "target", "recipe", "rules", "vectors", "reports", "heads", "lost", "provenance"):
        assert getattr(loaded, field) == getattr(kept, field), field
    assert {n: type(m) for n, m in loaded.maps.items()} == {n: type(m) for n, m in kept.maps.items()}
    kinds = {Identity, Dense, Heads if kept.recipe.name == "coherent" else Factored}
    assert {type(m) for m in kept.maps.values()} == kinds
    source, target = SPECS[name]
    delta = Delta.between(source.state, tune(source, "everything").state)
    leave = [] if kept.recipe.name == "coherent" else ["embed*"]
    first, again = (transport(a, delta, target.state, leave=leave) for a in (kept, loaded))
    assert first.coverage == again.coverage and list(first) == list(again)
    assert all(first[n].numpy().tobytes() == again[n].numpy().tobytes() for n in first)


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputRefused, match="is not empty; name another folder, or --overwrite"):
        aligned("llama", "paper").save(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_what_is_no_alignment(tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match="absent holds no readable alignment"):
        Alignment.load(tmp_path / "absent")
    folder = aligned("llama", "paper").save(tmp_path / "maps")
    record = json.loads((folder / "alignment.json").read_text())
    for number in (99, None):
        (folder / "alignment.json").write_text(json.dumps({**record, "format": number}))
        with pytest.raises(
            InputRefused, match=f"maps has alignment format {number}, this version reads 3; align again"
        ):
            Alignment.load(folder)
    (folder / "alignment.json").write_text("{")
    with pytest.raises(InputRefused, match="maps holds no readable alignment"):
        Alignment.load(folder)


# --- what is refused -------------------------------------------------------------------------------------------------


def test_pairs_that_cannot_be_aligned() -> None:
    llama, vit = (SPECS[name][0].build() for name in SPECS)
    with pytest.raises(InputRefused, match="source is llama, which reads text, target is vit, which reads vi"):
        align(llama, vit, [])
    with pytest.raises(InputRefused, match="no calibration batches were given; a few unlabelled ones are needed"):
        align(llama, llama, [])
    with pytest.raises(InputRefused, match="model_type is None; supported families are .*llama.*vit"):
        align(torch.nn.Linear(2, 2), llama, [])


def test_recipes_that_do_not_exist() -> None:
    for wrong, message in (
        ({"name": "best"}, "recipe name is 'best'; choose one of effect, coherent, paper"),
        ({"scale": "sum"}, "recipe scale is 'sum'; choose one of norm, regression, none"),
        (
            {"name": "coherent", "center": True},
            "center belongs to the paper recipe; coherent aligns uncentred activations",
        ),
    ):
        with pytest.raises(InputRefused, match=message):
            Recipe(**wrong)
    assert Recipe.named("paper", floor=1e-4) == Recipe("paper", floor=1e-4)
    assert Recipe.named(Recipe("paper", center=True), null="svd") == Recipe("paper", null="svd", center=True)
    models = SPECS["llama"][0].build(), SPECS["llama"][1].build()
    with pytest.raises(InputRefused, match="null is 'best'; choose one of partial, completed, svd"):
        align(*models, few(SPECS["llama"][0], 2, 4), null="best")


def test_bases_that_compute_no_numbers() -> None:
    source, target = (spec.build() for spec in SPECS["llama"])
    target.model.layers[1].mlp.up_proj.weight.data[3] = torch.nan
    with pytest.raises(NumericalError, match=r"activations of space 1\.middle held NaN or Inf"):
        align(source, target, few(SPECS["llama"][0], 2, 4))


@pytest.mark.parametrize("side", ["source", "target"])
def test_a_zero_gain_is_named(side: str) -> None:
    models = {"source": SPECS["llama"][0].build(), "target": SPECS["llama"][1].build()}
    models[side].model.layers[0].post_attention_layernorm.weight.data[5] = 0
    with pytest.raises(
        InputRefused, match=rf"layers\.0\.post_attention_layernorm of the {side} has gain 0 at feature 5"
    ):
        align(*models.values(), few(SPECS["llama"][0], 2, 4))


# --- what is said ----------------------------------------------------------------------------------------------------


def test_few_tokens_and_low_ranks_are_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    source = SPECS["llama"][0]
    with caplog.at_level(logging.WARNING):
        made = align(source.build(), source.build(), few(source, 1, 10))
    assert caplog.messages[0] == "10 calibration tokens for a widest space of 40: give at least 160"
    weak = [r.space for r in made.reports if r.rank < min(r.source, r.target) / 2]
    assert weak[0] == "0.attention" and weak == [r.space for r in made.reports if r.weak]
    all_maps = len(made.reports)
    said = f"{len(weak)} of {all_maps} maps have less than half their rank, first 0.attention"
    assert caplog.messages[1:] == [f"{said}: give more, and more varied, calibration"]


def test_enough_tokens_are_no_news(caplog: pytest.LogCaptureFixture) -> None:
    source = SPECS["llama"][0]
    with caplog.at_level(logging.WARNING):
        made = align(source.build(), source.build(), few(source, 12, 20))
    assert not caplog.messages
    ranks = {r.space: (r.rank, r.tokens) for r in made.reports}
    assert ranks["0.attention"] == (24, 240) and ranks["1.middle"] == (40, 240) and ranks["1.context"] == (32, 240)
    assert all(0 < r.gap <= 1 and not r.weak for r in made.reports)


@pytest.mark.parametrize("counts", [((4, 2), (4, 2)), ((4, 2), (8, 8)), ((8, 8), (4, 2))])
def test_maps_by_heads_are_told_in_the_widths_of_the_models(counts: tuple[tuple[int, int], ...]) -> None:
    sides = [base(LLAMA, seed=s, num_attention_heads=n, num_key_value_heads=kv) for s, (n, kv) in enumerate(counts)]
    made = align(*(side.build() for side in sides), batches(sides[0], seed=3), recipe="coherent")
    widths = [8 * heads for heads, _ in counts]  # heads of 8 features
    told = [r for r in made.reports if r.space.endswith((".context", ".query"))]
    assert len(told) == 4 and all([r.source, r.target] == widths for r in told)
    assert all(r.rank == r.most <= min(widths) for r in told)


def test_the_rank_of_heads_counts_each_source_head_once_per_group() -> None:
    blocks = torch.zeros(4, 3, 2)
    for source_head, ranks, expected in (
        ([0, 1, 2, 3], [2, 1], 6),  # both of a group have its rank
        ([0, 0, 1, 1], [2, 1], 3),  # a copy in the same group adds nothing
        ([0, 1, 0, 1], [2, 1], 6),  # one in another group does, up to the 3 features there are
        ([0, 1, 0, 1], [2, 2], 6),
    ):
        assert Heads(torch.tensor(source_head), blocks, 4).rank(torch.tensor(ranks)) == expected


def test_heads_are_told() -> None:
    """Widened by copies every source head feeds someone; narrowed, the heads that feed nobody are named."""
    small, step = base(LLAMA), pairs.heads(pairs.all_groups_copied)
    wide = step(small, 1)
    models, data = (small.build(), wide.build()), batches(small, seed=3)
    made = align(*models, data)
    assert not made.lost and all(len(heads) == 8 and set(heads) == {0, 1, 2, 3} for heads in made.heads.values())
    narrow = align(models[1], models[0], data)
    for block, heads in narrow.heads.items():
        assert narrow.lost[block] == sorted(set(range(8)) - set(heads)) and len(narrow.lost[block]) == 4


def test_progress_comes_after_every_batch_and_models_stay_as_they_were() -> None:
    source, calls = SPECS["llama"][0], []
    models = source.build().train(), source.build()
    align(*models, batches(source, seed=3, count=3, shape=(2, 4)), progress=lambda: calls.append(1), device="cpu")
    assert len(calls) == 3 and models[0].training and not models[1].training
