"""Every field of a recipe does what it says: on exact pairs, where the right answer is known."""

import pytest
import theseus_transport as tt
import torch
from theseus_transport.recipes.maps import Dense, cosine

from . import pairs as p
from .controls import moved_error
from .families import GPT2, LLAMA, VIT
from .models import TOLERANCE, base, batches
from .pairs_text import PERMUTED, TURNED

EXACT = TOLERANCE[torch.float64]
ROTATED = (p.residual(p.rotated, 1.7), *PERMUTED)


def error(names, moves, **options) -> float:
    """Relative error of an `everything` update under a recipe."""
    source, tuned, target, _ = p.Pair("option", lambda: base(names), moves).sides("everything")
    recipe = tt.Recipe("coherent", **options)
    alignment = tt.align(source.build(), target.build(), batches(source, seed=3), recipe=recipe)
    return moved_error(alignment, source, tuned, target, torch.float64)


def fates(names, **options) -> dict[str, tuple[str, str]]:
    source, tuned, target, _ = p.Pair("option", lambda: base(names), ROTATED).sides("everything")
    models = source.build(), target.build()
    alignment = tt.align(*models, batches(source, seed=3), recipe=tt.Recipe("coherent", **options))
    update = tt.transport(alignment, tt.Delta.between(models[0], tuned.build()), models[1])
    return {row.tensor: (row.fate, row.note) for row in update.coverage}


@pytest.mark.parametrize("names", [LLAMA, VIT, GPT2], ids=["llama", "vit", "gpt2"])
def test_regression_is_the_norm_where_maps_predict_perfectly(names):
    assert error(names, ROTATED, scale="regression") <= EXACT


def test_regression_passes_over_heads_that_take_nothing():
    assert error(LLAMA, (p.residual(p.widened(32)), p.beside_live(1, 1), *PERMUTED), scale="regression") <= EXACT


def test_regression_moves_less_where_maps_predict_badly():
    """Each cosine is below 1 between unrelated models, so every update shrinks."""
    source, target = base(LLAMA), base(LLAMA, seed=5)
    tuned, data = p.tune(source, "linear").build(), batches(source, seed=3)
    sizes = {}
    for scale in ("norm", "regression"):
        alignment = tt.align(source.build(), target.build(), data, recipe=tt.Recipe("coherent", scale=scale))
        update = tt.transport(alignment, tt.Delta.between(source.build(), tuned), target.build())
        sizes[scale] = {name: float(value.norm()) for name, value in update.items()}
    assert sizes["norm"].keys() == sizes["regression"].keys()
    assert all(sizes["regression"][name] < 0.9 * size for name, size in sizes["norm"].items())


def test_a_cosine_is_what_it_says():
    x, y = torch.randn(2, 50, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = Dense(torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1)).double()).Q)
    energies = x.square().sum(0), y.square().sum(0)
    expected = float((t(x) * y).sum() / (x.norm() * y.norm()))
    assert abs(cosine(t, lambda t: float((t(x) * y).sum()), energies) - expected) < 1e-14
    assert abs(cosine(t, lambda t: float(t(x).square().sum()), (energies[0], t(x).square().sum(0))) - 1) < 1e-14


def test_no_scale_is_wrong_where_one_is_needed():
    assert error(LLAMA, (p.residual(p.widened(36)),), scale="none") > 0.1


def test_one_dense_map_of_the_context_is_exact_for_plain_heads():
    """But not where heads have scales of their own: RECIPE says 0.18."""
    assert error(VIT, ROTATED, heads="dense") <= EXACT
    assert 0.02 < error(VIT, (p.heads(scaled=True),), heads="dense") < 0.5


def test_dense_heads_need_plain_ones():
    source = base(LLAMA)
    with pytest.raises(tt.InputRefused, match="heads=dense needs plain heads, but the llama shares keys among heads"):
        tt.align(source.build(), source.build(), batches(source, seed=3), recipe=tt.Recipe("coherent", heads="dense"))


def test_embeddings_and_head_can_be_left():
    found = fates(GPT2, embeddings="leave", head="leave")
    left = {name: note for name, (fate, note) in found.items() if fate == "left"}
    assert left == {
        "wte.weight": "the coherent recipe leaves embeddings",
        "wpe.weight": "the coherent recipe leaves embeddings",
        "lm_head.weight": "the recipe leaves heads",
    }
    assert found["ln_f.weight"][0] == "transported"  # nothing takes it up any more
    assert {fate for fate, _ in fates(GPT2).values()} == {"transported", "folded"}


def test_completion_is_what_makes_few_token_types_exact():
    moves, few = (p.residual(p.rotated), TURNED), {"tokens": (3, 7, 11, 19, 23, 31, 42, 48, 55, 59)}
    source, tuned, target, _ = p.Pair("few", lambda: base(LLAMA), moves).sides("everything")
    errors = {}
    for completion in ("deeper", "none"):
        recipe = tt.Recipe("coherent", completion=completion)
        alignment = tt.align(source.build(), target.build(), batches(source, seed=3, **few), recipe=recipe)
        errors[completion] = moved_error(alignment, source, tuned, target, torch.float64)
    assert errors["deeper"] <= EXACT and errors["none"] > 0.1


@pytest.mark.parametrize("field", ["scale", "heads", "embeddings", "head", "completion", "null", "name"])
def test_a_choice_that_does_not_exist_is_named(field):
    with pytest.raises(tt.InputRefused, match=f"recipe {field} is 'best'; choose one of "):
        tt.Recipe(**{field: "best"})
