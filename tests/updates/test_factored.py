"""Updates as factors of at most a rank: adapters cut, adapters made of full tunes; PEFT loads what the update says."""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from exact.families import CLIP, DINO_CLASSIFIER, GPT2, LLAMA_HEADLESS, LLAMA_SCORE, QWEN3, SIGLIP_CLASSIFIER
from exact.models import LLAMA, LLAMA_TIED, VIT, Spec, base, batches, tune
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from theseus_transport import Alignment, Delta, InputRefused, Recipe, Update, align, transport
from theseus_transport.updates.coverage import ADDED, BY_EFFECT, NO_FACTORS
from torch import Tensor, nn

ROUNDING = dict(rtol=1e-10, atol=1e-10)  # float64, sums of 40 products and a decomposition
FULL_RANK = 40  # of every matrix of the targets
FAMILIES = {
    "llama": base(LLAMA),
    "tied": base(LLAMA_TIED, tie_word_embeddings=True),
    "gpt2": base(GPT2),
    "vit": base(VIT),
    "headless": base(LLAMA_HEADLESS),
    "score": base(LLAMA_SCORE),
    "qwen3": base(QWEN3),
    "clip": base(CLIP),
    "dinov2": base(DINO_CLASSIFIER),
    "siglip": base(SIGLIP_CLASSIFIER),
}
TASKS = {"headless": None, "score": "SEQ_CLS"} | dict.fromkeys(("llama", "tied", "gpt2", "qwen3"), "CAUSAL_LM")
COHERENT, FITTED = Recipe("coherent"), Recipe("effect", prior="none")
BEHIND = Recipe("effect", prior="coherent")
RECIPES = pytest.mark.parametrize("recipe", [COHERENT, FITTED, BEHIND], ids=["coherent", "none", "behind coherent"])
EVERY, SOME = (pytest.mark.parametrize("family", list(FAMILIES)[:count]) for count in (None, 4))


def target(family: str) -> Spec:
    more = {"tie_word_embeddings": True} if family == "tied" else {}
    return base(FAMILIES[family].names, seed=5, width=48 if family == "dinov2" else 36, **more)


@cache
def aligned(family: str, recipe: Recipe) -> Alignment:
    specs = FAMILIES[family], target(family)
    return align(*(spec.build() for spec in specs), batches(specs[0], seed=3, count=4, shape=(8, 16)), recipe=recipe)


def moved(family: str, recipe: Recipe, kind: str = "everything", **options: object) -> Update:
    """Of a full tune."""
    source = FAMILIES[family]
    delta = Delta.between(source.state, tune(source, kind).state)
    return transport(aligned(family, recipe), delta, target(family).build(), **options)


def lora(folder: Path, family: str = "llama", rank: int = 3, **options: object) -> Delta:
    torch.manual_seed(0)
    source, names = FAMILIES[family].build(), {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn"]}
    config = LoraConfig(**{"r": rank, "lora_alpha": 6, "target_modules": names[family], **options})
    model = get_peft_model(source, config).double()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return Delta.from_adapter(folder, FAMILIES[family].build())


def merged(update: Update, into: Spec, folder: Path) -> dict[str, Tensor]:
    """The target's tensors once PEFT has merged the written adapter into it."""
    update.save_adapter(folder)
    return PeftModel.from_pretrained(into.build(), folder).merge_and_unload().state_dict()


def ranks(folder: Path) -> set[int]:
    tensors = load_file(folder / "adapter_model.safetensors").items()
    return {value.shape["lora_B" in name] for name, value in tensors if "lora_" in name}


def best(value: Tensor, rank: int) -> Tensor:
    u, s, vh = torch.linalg.svd(value, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def assert_is(update: Update, found: dict[str, Tensor], into: Spec) -> None:
    for name, value in into.state.items():
        torch.testing.assert_close(found[name], value + update[name] if name in update else value, **ROUNDING)


# --- PEFT loads the update -------------------------------------------------------------------------------------------


@RECIPES
@EVERY
def test_peft_loads_an_adapter_made_of_a_full_tune(family: str, recipe: Recipe, tmp_path: Path) -> None:
    update = moved(family, recipe, rank=3)
    assert_is(update, merged(update, target(family), tmp_path), target(family))
    assert ranks(tmp_path) == {3} and len(update) > 3
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (3, 3, {})
    assert config["task_type"] == TASKS.get(family)


@RECIPES
@pytest.mark.parametrize("rank", [1, 3, 5])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_peft_loads_an_adapter_at_any_rank(family: str, rank: int, recipe: Recipe, tmp_path: Path) -> None:
    patterns = {"alpha_pattern": {"down_proj": 2}, "rank_pattern": {"layers.1.*": 2}}
    delta = lora(tmp_path / "source", family, **patterns if family == "llama" else {})
    update = transport(aligned(family, recipe), delta, target(family).build(), rank=rank)
    assert_is(update, merged(update, target(family), tmp_path / "out"), target(family))
    assert max(ranks(tmp_path / "out")) <= rank


def test_an_adapter_of_one_rank_needs_no_patterns(tmp_path: Path) -> None:
    """Which other readers than PEFT do not have."""
    delta = lora(tmp_path, rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 4})
    update = transport(aligned("llama", COHERENT), delta, target("llama").build(), rank=2)
    update.save_adapter(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (2, 4, {}, {})


# --- what a cut keeps ------------------------------------------------------------------------------------------------


def test_no_product_is_nearer_to_what_maps_move_of_an_adapter(tmp_path: Path) -> None:
    delta, into = lora(tmp_path), target("llama").build()
    whole = transport(aligned("llama", COHERENT), delta, into)
    update = transport(aligned("llama", COHERENT), delta, into, rank=2)
    assert update.keys() == whole.keys()
    for name, value in whole.items():
        torch.testing.assert_close(update[name], best(value, 2), **ROUNDING)


@SOME
def test_no_product_is_nearer_to_what_maps_move_of_a_full_tune(family: str) -> None:
    whole, update = moved(family, COHERENT), moved(family, COHERENT, rank=4)
    heads = {"classifier.weight", "classifier.bias"}
    for name, value in update.items():
        torch.testing.assert_close(value, whole[name] if name in heads else best(whole[name], 4), **ROUNDING)
    changed = {name for name, value in whole.items() if ".weight" in name and min(value.shape) > 1}
    assert {n for n in changed if ".h." in n or ".layers." in n} == update.keys() - heads


@RECIPES
@SOME
def test_at_full_rank_it_is_the_checkpoints_update(family: str, recipe: Recipe) -> None:
    """Of a tune of matrices in blocks alone, where no bias is fitted."""
    source, into = FAMILIES[family], target(family).build()
    changed = tune(source, "everything").state
    inside = {n for n, v in changed.items() if v.ndim == 2 and (".layers." in n or ".h." in n)}
    delta = Delta.between(source.state, {n: v if n in inside else source.state[n] for n, v in changed.items()})
    whole = transport(aligned(family, recipe), delta, into)
    update = transport(aligned(family, recipe), delta, into, rank=FULL_RANK)
    weights = {name for name in whole if not name.endswith(".bias")}
    assert weights == update.keys()
    if not (recipe.fits and family in ("gpt2", "vit")):  # whose writers have biases, which fits use
        for name in weights:
            torch.testing.assert_close(update[name], whole[name], rtol=1e-8, atol=1e-8)  # a solve, and carry


def test_the_more_directions_the_more_arrives() -> None:
    whole = moved("llama", FITTED, "linear", rank=FULL_RANK)
    lost = []
    for rank in (1, 4, 16, 36):
        update = moved("llama", FITTED, "linear", rank=rank)
        assert all(int(torch.linalg.matrix_rank(value, rtol=1e-9)) <= rank for value in update.values())
        assert all(0 < share <= 1 for share in update.fits.kept.values()) and len(update.fits.kept) == 4
        lost.append(sum(float((update[name] - value).norm()) for name, value in whole.items()))
    assert lost == sorted(lost, reverse=True) and lost[-1] <= 1e-8 < lost[-2]


def test_where_nothing_is_missing_the_prior_is_cut_in_the_metric_of_the_fit(tmp_path: Path) -> None:
    """Onto the model itself, which lacks nothing before the first cut: another product than the nearest, and later
    writers make up for some of what is lost.
    """
    source, layer = FAMILIES["llama"], "layers.0.self_attn.o_proj"
    name, data = f"model.{layer}.weight", batches(FAMILIES["llama"], seed=3, count=4, shape=(8, 16))
    alignment = align(source.build(), source.build(), data, recipe=BEHIND)
    delta = Delta.between(source.state, source.state | {name: tune(source, "linear").state[name]})
    whole, update = (transport(alignment, delta, source.build(), rank=rank) for rank in (None, 3))
    assert not whole.fits.share and whole.keys() == {name}
    assert update.fits.share[layer] == 0 and all(share > 0 for n, share in update.fits.share.items() if n != layer)
    assert len(update.fits.share) == 4 and 0 < update.fits.kept[layer] < 1
    assert int(torch.linalg.matrix_rank(update[name], rtol=1e-9)) == 3
    lost = float((update[name] - whole[name]).norm())
    assert lost > 1.001 * float((best(whole[name], 3) - whole[name]).norm())
    assert_is(update, merged(update, source, tmp_path), source)


def test_coverage_says_what_was_fitted_and_what_a_rank_keeps() -> None:
    update = moved("llama", BEHIND, "linear", rank=4)
    fits, told = update.fits, {row.tensor: row for row in update.coverage}
    row = told["layers.1.mlp.down_proj.weight"]
    share, kept = fits.share["layers.1.mlp.down_proj"], fits.kept["layers.1.mlp.down_proj"]
    assert row.note == f"{share:.0%} of it fitted; its rank keeps {kept:.0%}" and row.fate == "transported"
    assert told["layers.1.self_attn.q_proj.weight"].note.startswith("its rank keeps ")
    again = [*update.coverage]
    assert update.settled() == again  # told once
    told = {row.tensor: row for row in moved("llama", FITTED, "linear").coverage}
    assert {row.fate for row in told.values()} >= {"fitted"} and told["layers.0.mlp.down_proj.weight"].note == BY_EFFECT


def test_a_layer_behind_which_nothing_is_missing_is_unchanged(tmp_path: Path) -> None:
    """Onto the model itself, a LoRA on down_proj: the fits of o_proj are there and find nothing."""
    source, delta = FAMILIES["llama"], lora(tmp_path, target_modules=["down_proj"])
    alignment = align(source.build(), source.build(), batches(source, seed=3, count=4, shape=(8, 16)), recipe=BEHIND)
    update = transport(alignment, delta, source.build())
    told = {row.tensor: row for row in update.coverage}
    for block in range(2):
        assert told[f"layers.{block}.self_attn.o_proj"].fate == "unchanged"
        assert told[f"layers.{block}.mlp.down_proj"].note == "as factors"
        assert not update.factors[f"model.layers.{block}.self_attn.o_proj"].compute().b.any()


# --- fates -----------------------------------------------------------------------------------------------------------


def test_what_no_factors_hold_stays_and_is_told() -> None:
    told = {row.tensor: row for row in moved("gpt2", COHERENT, rank=4).coverage}
    for name in ("wte.weight", "h.0.mlp.c_proj.bias", "h.1.ln_1.bias", "ln_f.bias"):
        assert (told[name].fate, told[name].note) == ("left", NO_FACTORS), name
    assert told["h.0.ln_1.weight"].fate == "folded" and told["h.0.attn.c_attn.q.weight"].fate == "transported"
    told = {row.tensor: row for row in moved("gpt2", FITTED, rank=4).coverage}
    for name in ("wte.weight", "h.0.mlp.c_proj.bias", "h.1.ln_1.bias"):
        assert told[name].fate == "fitted", name
    assert told["ln_f.bias"].fate == "left"  # behind all that is fitted


def test_a_head_over_classes_goes_along_whole(tmp_path: Path) -> None:
    update = moved("vit", COHERENT, rank=4)
    update.save_adapter(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["classifier"] and "classifier" not in config["target_modules"]


def test_only_layers_that_the_adapter_has_no_factors_of_are_told_as_added(tmp_path: Path) -> None:
    delta, into = lora(tmp_path), target("llama").build()
    for only in (False, True):
        update = transport(aligned("llama", FITTED), delta, into, only_targeted=only)
        added = {row.tensor.rpartition(".")[2] for row in update.coverage if row.note.startswith(ADDED)}
        kinds = {name.rpartition(".")[2] for name in update.factors}
        assert kinds == ({"down_proj"} if only else {"down_proj", "o_proj"})
        assert added == (set() if only else {"o_proj"})


def test_refused() -> None:
    for rank in (0, True, 1.5):
        with pytest.raises(InputRefused, match=f"rank is {rank}; give a whole number from 1"):
            moved("llama", COHERENT, rank=rank)
