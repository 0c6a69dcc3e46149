"""Transport: linear, the same through factors as through products, and no tensor without a fate."""

from collections.abc import Callable, Mapping
from functools import cache, partial

import pytest
import torch
from exact.models import LLAMA, LLAMA_HEADLESS, LLAMA_SCORE, LLAMA_TIED, VIT, VIT_HEADLESS, Spec, base, batches, tune
from hypothesis import given, settings
from hypothesis import strategies as st
from theseus_transport import Alignment, Delta, Update, align, transport
from theseus_transport.updates.adapter import PREFIX
from torch import Tensor

ROUNDING = dict(rtol=1e-10, atol=1e-10)  # float64, sums of 40 products, divided by gains down to 0.4 and by scales
BIASED = partial(base, LLAMA, attention_bias=True, mlp_bias=True)
TIED = partial(base, LLAMA_TIED, tie_word_embeddings=True)
BASES: dict[str, Callable[..., Spec]] = {
    "biased": BIASED,
    "tied": TIED,
    **{
        name: partial(base, names)
        for name, names in {
            "llama": LLAMA,
            "headless": LLAMA_HEADLESS,
            "score": LLAMA_SCORE,
            "vit": VIT,
            "vit-headless": VIT_HEADLESS,
        }.items()
    },
}
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q_proj"]}
TENTHS = st.integers(-20, 20).filter(bool).map(lambda n: n / 10)
NO_TENSOR = "the target has no such tensor"
LAYER = "model.layers.0.self_attn.q_proj"


@cache
def source(name: str) -> Spec:
    return BASES[name]()


@cache
def target(name: str, **config: object) -> Spec:
    return BASES[name](seed=5, **{"width": 36, "intermediate_size": 44, **config})


@cache
def aligned(own: str, other: str, recipe: str = "coherent", **config: object) -> Alignment:
    specs = source(own), target(other, **config)
    data = [batches(spec, seed=3, count=1, shape=(8, 16))[0] for spec in specs]
    models = (spec.build() for spec in specs)
    return align(*models, [tuple(data) if specs[0].names.layer_norm else data[0]], recipe=recipe)


def moved(own: str, other: str, tuned: Mapping[str, Tensor], recipe: str = "coherent", **options: object) -> Update:
    delta = Delta.between(source(own).build(), tuned)
    return transport(aligned(own, other, recipe), delta, target(other).state, **options)


def added(spec: Spec, *changes: tuple[float, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {n: v + sum(by * change[n] for by, change in changes if n in change) for n, v in spec.state.items()}


@cache
def random_change(spec_name: str, seed: int) -> dict[str, Tensor]:
    """Of all but the norms, in whose gains and readers a product is not linear."""
    spec = source(spec_name)
    tuned = tune(spec, "everything", seed).state
    return {n: tuned[n] - v for n, v in spec.state.items() if "norm" not in n}


def factors(layer: str = LAYER, width: int = 24, out: int = 32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(*s, dtype=torch.float64, generator=generator) for s in ((2, width), (out, 2)))
    return {f"{PREFIX}{layer}.lora_A.weight": a, f"{PREFIX}{layer}.lora_B.weight": b}


def moved_factors(own: str, other: str, tensors: Mapping[str, Tensor], **options: object) -> Update:
    delta = Delta.from_lora(CONFIG, tensors, source(own).state)
    return transport(aligned(own, other), delta, target(other).state, **options)


def fates(update: Update) -> dict[str, tuple[str, str]]:
    return {row.tensor: (row.fate, row.note) for row in update.coverage}


def assert_same(ours: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert ours.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(ours[name], expected[name], **ROUNDING)


# --- the arithmetic --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["biased", "vit"])
@pytest.mark.parametrize("recipe", ["coherent", "paper"])
@settings(max_examples=5, deadline=None, derandomize=True, database=None)
@given(by=st.tuples(TENTHS, TENTHS), seed=st.integers(1, 3))
def test_transport_is_linear(name: str, recipe: str, by: tuple[float, float], seed: int) -> None:
    changes = random_change(name, seed), random_change(name, seed + 1)
    each = [moved(name, name, added(source(name), (1.0, change)), recipe) for change in changes]
    both = moved(name, name, added(source(name), *zip(by, changes, strict=True)), recipe)
    assert_same(both, {n: by[0] * each[0][n] + by[1] * each[1][n] for n in both})
    stronger = moved(name, name, added(source(name), (1.0, changes[0])), recipe, alpha=by[0])
    assert_same(stronger, {n: by[0] * v for n, v in each[0].items()})


@pytest.mark.parametrize("layer", [LAYER, "model.layers.1.self_attn.v_proj", "model.layers.0.mlp.down_proj", "lm_head"])
def test_factors_and_their_product_move_alike(layer: str) -> None:
    """RMSNorm has no bias, so nothing of an update goes elsewhere: the moved factors multiply to the moved product."""
    out, width = source("llama").state[f"{layer}.weight"].shape
    a, b = factors(layer, width, out).values()
    dense = moved("llama", "llama", added(source("llama"), (1.0, {f"{layer}.weight": 3 * b @ a})), alpha=0.7)
    lora = moved_factors("llama", "llama", factors(layer, width, out), alpha=0.7)
    assert list(lora) == [f"{layer}.weight"]
    assert_same(lora, dense)
    ((spelled, moved_lora),) = lora.factors.items()
    f = moved_lora.compute()
    assert spelled == layer and f.a.shape[0] == f.b.shape[1] == 2 and f.scaling == 3
    torch.testing.assert_close(0.7 * 3 * f.b @ f.a, lora[f"{layer}.weight"], **ROUNDING)


# --- fates -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "gains", "everything"])
@pytest.mark.parametrize(
    "own, other, config, left",
    [
        ("llama", "llama", {}, {}),
        ("biased", "biased", {}, {}),
        ("llama", "headless", {}, {"lm_head.weight": NO_TENSOR}),
        ("headless", "llama", {}, {}),
        ("llama", "score", {}, {"lm_head.weight": NO_TENSOR}),
        ("score", "score", {}, {}),
        ("score", "score", {"num_labels": 3}, {"score.weight": "the source has 7 outputs, the target 3"}),
        ("llama", "tied", {}, {"lm_head.weight": "the target ties its head to the embedding"}),
        ("tied", "tied", {}, {}),
        (
            "llama",
            "llama",
            {"vocab_size": 70},
            {
                "lm_head.weight": "the source has 60 outputs, the target 70",
                "embed_tokens.weight": "the source's is [60, 24], the target's [70, 24]: rows do not correspond",
            },
        ),
        ("vit", "vit", {}, {}),
        ("vit", "vit-headless", {}, dict.fromkeys(["classifier.weight", "classifier.bias"], NO_TENSOR)),
        ("vit-headless", "vit", {}, {}),
        (
            "vit",
            "vit",
            {"image_size": 12},
            {},
        ),
    ],
)
def test_every_tensor_has_one_fate(own: str, other: str, config: dict, left: dict, kind: str) -> None:
    config = {"width": 24, **config}
    tuned = tune(source(own), kind).state
    delta = Delta.between(source(own).state, tuned)
    update = transport(aligned(own, other, **config), delta, target(other, **config).state)
    names = [row.tensor for row in update.coverage]
    assert sorted(names) == sorted(update.family.canonical(n) for n in tuned)
    changed = {update.family.canonical(n) for n, v in tuned.items() if not torch.equal(v, source(own).state[n])}
    found = fates(update)
    assert {n for n, (fate, _) in found.items() if fate != "unchanged"} == changed
    assert {n: note for n, (fate, note) in found.items() if fate == "left"} == {
        n: left[n] for n in left if n in changed
    }
    last = f"{update.family.final_norm}.weight"
    if last in changed:  # where a head reads the final norm and moves, it takes the norm's change up
        reads = own == other != "tied" and "num_labels" not in config and "vocab_size" not in config
        assert found[last][0] == ("folded" if reads else "transported")
    assert all(value.shape == target(other, **config).state[n].shape for n, value in update.items())


def test_only_what_changed_moves() -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    update = moved("llama", "llama", added(source("llama"), (1.0, {name: torch.ones(40, 24)})))
    assert list(update) == [name]
    assert {n: f for n, (f, _) in fates(update).items() if f != "unchanged"} == {name[6:]: "transported"}


def test_a_norms_change_moves_with_its_readers() -> None:
    name = "model.layers.1.post_attention_layernorm.weight"
    update = moved("llama", "llama", added(source("llama"), (1.0, {name: torch.full((24,), 0.1)})))
    assert list(update) == [f"model.layers.1.mlp.{p}_proj.weight" for p in ("gate", "up")]
    assert fates(update)[name[6:]] == ("folded", "into its readers")


def test_what_is_left_on_request() -> None:
    tuned = tune(source("llama"), "everything").state
    update = moved("llama", "llama", tuned, leave=["layers.0.*[qp]_proj.weight", "lm_head.*", "embed_tokens.weight"])
    left = {n for n, fate in fates(update).items() if fate == ("left", "left on request")}
    assert left == {
        "layers.0.self_attn.q_proj.weight",
        "layers.0.mlp.up_proj.weight",
        "lm_head.weight",
        "embed_tokens.weight",
    }
    assert left.isdisjoint(n.removeprefix("model.") for n in update) and len(update) == 16 - 4 + 1  # norm.weight
    two = factors() | factors(LAYER.replace("0", "1"))
    for pattern in ("layers.0.*", "layers.0.self_attn.q_proj", "layers.0.self_attn.q_proj.weight"):
        adapter = moved_factors("llama", "llama", two, leave=[pattern])
        assert list(adapter) == [f"{LAYER.replace('0', '1')}.weight"]
        assert fates(adapter)[LAYER[6:]] == ("left", "left on request")
