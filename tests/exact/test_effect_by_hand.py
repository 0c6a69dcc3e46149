"""The oracle of the recipe `effect` does what its page says, where the answer is known."""

from dataclasses import replace
from functools import partial

import pytest
import theseus_transport as tt
import torch
from helpers.effect_by_hand import add, effect_by_hand
from torch import Tensor

from . import pairs as p
from . import pairs_llama, pairs_text, pairs_vit
from .controls import aligned
from .models import Spec, batches, relative_error

FAMILIES = {"llama": pairs_llama.GROUPED, "llama-biases": pairs_llama.BIASED, "gpt2": pairs_text.UNTIED,
            "vit": pairs_vit.BASE}  # fmt: skip
MOVES = {
    "copy": (),
    "rotated": (p.residual(p.rotated, 1.7),),
    "permuted": (p.residual(), p.heads(p.heads_permuted), p.neurons(p.permuted_neurons)),
}
WRITERS = ".o.weight", ".o.bias", ".down.weight", ".down.bias"
calibration = partial(batches, seed=3, count=3)


def sides(family: str, moves: str | tuple, kind: str) -> tuple[Spec, Spec, Spec]:
    """Source base and tuned, target base; `writers` is a tune of the writers alone, which a fit of them can reach."""
    pair = p.Pair("", FAMILIES[family], MOVES[moves] if isinstance(moves, str) else moves)
    source, tuned, target, _ = pair.sides("everything" if kind == "writers" else kind)
    if kind == "writers":
        parts = {name: value for name, value in tuned.parts.items() if name.endswith(WRITERS)}
        tuned = replace(source, parts=source.parts | parts)
    return source, tuned, target


def fitted(specs: tuple[Spec, Spec, Spec], data: list[dict] | None = None, **options) -> dict[str, Tensor]:
    return effect_by_hand(*(spec.build() for spec in specs), data or calibration(specs[0]), **options)


def left(specs: tuple[Spec, Spec, Spec], update: dict[str, Tensor]) -> float:
    """|f(target + update) - f(tuned source)| / |f(tuned source) - f(source)| on the calibration; 1 for no update."""
    source, tuned, target = specs
    data, moved = calibration(source), target.build()
    add(moved, update)
    return relative_error(target.outputs(moved, data), *(spec.outputs(spec.build(), data) for spec in (tuned, source)))


@pytest.mark.parametrize("moves", MOVES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_tune_of_the_writers_comes_over_whole(family, moves):
    specs = sides(family, moves, "writers")
    assert left(specs, fitted(specs, rho=1e-13)) < 1e-9
    assert 1e-4 < left(specs, fitted(specs)) < 0.05  # with the ridge


@pytest.mark.parametrize("kind", ["linear", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_left_does_not_depend_on_how_the_target_is_written(family, kind):
    """Readers that moved too leave something: random ones are further from any input the writers have than trained."""
    copied, *written = (left(specs, fitted(specs)) for specs in (sides(family, moves, kind) for moves in MOVES))
    assert written == pytest.approx([copied] * 2, rel=1e-6)
    assert copied < 0.65


@pytest.mark.parametrize("moves", MOVES)
@pytest.mark.parametrize("family", FAMILIES)
def test_after_an_exact_prior_nothing_is_missing(family, moves):
    specs = sides(family, moves, "everything")
    source, tuned, target = (spec.build() for spec in specs)
    alignment = aligned(p.Pair(moves, FAMILIES[family], MOVES[moves]), torch.float64)
    prior = dict(tt.transport(alignment, tt.Delta.between(source, tuned), target))
    missing, whole = fitted(specs, prior_update=prior), fitted(specs)
    assert missing.keys() == whole.keys()
    for name in whole:
        assert missing[name].norm() < 1e-9 * whole[name].norm(), name


def test_a_block_without_a_source_holds_what_is_there():
    """Its own writers write nothing here, so that holding is to change nothing."""
    specs = sides("llama", (p.residual(), p.deeper(1)), "writers")
    update = fitted(specs, blocks=(0, None, 1), rho=1e-13)
    assert left(specs, update) < 1e-9
    sizes = {name: float(value.norm()) for name, value in update.items()}
    assert all((size < 1e-9) == name.startswith("model.layers.1.") for name, size in sizes.items()), sizes


def test_a_first_block_without_a_source_wants_the_change_of_the_embeddings():
    specs = sides("llama", (p.residual(p.rotated), p.deeper(0)), "everything")
    source, tuned, _ = specs
    only = replace(source, parts=source.parts | {"embed.weight": tuned.parts["embed.weight"]})
    update = fitted((source, only, specs[2]), blocks=(None, 0, 1), writers=("contract",))
    assert all(value.norm() > 0.01 for value in update.values())
    assert "model.layers.0.mlp.down_proj.weight" in update and len(update) == 3


def test_masked_tokens_are_no_rows():
    specs = sides("llama", "rotated", "linear")
    data = calibration(specs[0], padded=True)
    other = [batch | {"input_ids": torch.where(batch["attention_mask"] > 0, batch["input_ids"], 5)} for batch in data]
    one, two = fitted(specs, data), fitted(specs, other)
    assert all(torch.allclose(one[name], two[name], rtol=0, atol=1e-9) for name in one)


def test_the_models_stay_as_they_are():
    models = [spec.build() for spec in sides("gpt2", "rotated", "linear")]
    before = [{name: value.clone() for name, value in model.state_dict().items()} for model in models]
    effect_by_hand(
        *models, calibration(FAMILIES["gpt2"]()), prior_update={"transformer.wte.weight": torch.ones(60, 24)}
    )
    for model, state in zip(models, before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
