"""An update of the target: computed when asked for, added in place, written as an adapter; what is refused or lost."""

import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import pytest
import torch
from exact.families import GPT2
from exact.models import LLAMA, LLAMA_HEADLESS, VIT, Spec, base, batches, tune
from peft import LoraConfig, PeftModel, get_peft_model
from theseus_transport import Alignment, Delta, InputRefused, Update, align, transport
from theseus_transport.updates.adapter import PREFIX
from theseus_transport.updates.fates import TensorFate
from theseus_transport.updates.layer_moves import Move
from torch import Tensor, nn

ROUNDING = dict(rtol=1e-12, atol=1e-12)  # float64, sums of 40 products
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q_proj"]}
LAYER, UP = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj.weight"

SOURCE = base(LLAMA)
TARGET = base(LLAMA, seed=5, width=36, intermediate_size=44)
HEADLESS = base(LLAMA_HEADLESS, seed=5, width=36, intermediate_size=44)
TUNED = tune(SOURCE, "everything").state


@cache
def aligned(source: str = "llama", **target: object) -> Alignment:
    specs = SPECS[source], base(SPECS[source].names, seed=5, width=36, **target)
    return align(
        *(spec.build() for spec in specs), batches(specs[0], seed=3, count=1, shape=(8, 16)), recipe="coherent"
    )


SPECS: dict[str, Spec] = {
    "llama": SOURCE,
    "biased": base(LLAMA, attention_bias=True),
    "gpt2": base(GPT2),
    "vit": base(VIT),
    "vit-no-qkv-bias": base(VIT, qkv_bias=False),
}


def moved(tuned: Mapping[str, Tensor] = TUNED, target: object = None, **options: object) -> Update:
    into = TARGET.state if target is None else target
    return transport(aligned(intermediate_size=44), Delta.between(SOURCE.state, tuned), into, **options)


def factors(layer: str = LAYER, width: int = 24, out: int = 32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(*s, dtype=torch.float64, generator=generator) for s in ((2, width), (out, 2)))
    return {f"{PREFIX}{layer}.lora_A.weight": a, f"{PREFIX}{layer}.lora_B.weight": b}


def moved_factors(tensors: Mapping[str, Tensor], **options: object) -> Update:
    delta = Delta.from_lora(CONFIG, tensors, SOURCE.state)
    return transport(aligned(intermediate_size=44), delta, TARGET.state, **options)


# --- a lazy mapping --------------------------------------------------------------------------------------------------


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the layers computed so far."""
    calls: list[str] = []

    def counting(compute: Callable) -> Callable:
        return lambda move, *args: (calls.append(move.into.name), compute(move, *args))[1]

    for name in ("dense", "factors"):
        monkeypatch.setattr(Move, name, counting(getattr(Move, name)))
    return calls


def test_reading_one_value_computes_no_other(computed: list[str]) -> None:
    for update in (moved(), moved_factors(factors())):
        assert len(update) == len(list(update)) and update.coverage and not computed
    update = moved()
    assert update[UP].shape == (44, 36) and computed == ["layers.1.mlp.up_proj"]
    with pytest.raises(KeyError):
        update["model.layers.9.mlp.up_proj.weight"]
    moved_factors(factors())[f"{LAYER}.weight"]
    assert computed == ["layers.1.mlp.up_proj", LAYER[6:]]


def test_weight_and_bias_of_a_layer_are_computed_together(computed: list[str]) -> None:
    source, target = SPECS["biased"], base(LLAMA, seed=5, width=36, attention_bias=True)
    delta = Delta.between(source.state, tune(source, "everything").state)
    update = transport(aligned("biased", attention_bias=True), delta, target.state)
    assert len(list(update.items())) == 14 + 8 + 2 and len(computed) == 15


def test_dtypes_and_spelling_are_the_targets() -> None:
    for dtype, expected in (
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
    ):
        update = moved(target={k: v.to(dtype) for k, v in TARGET.state.items()})
        assert update[UP].dtype == expected
        torch.testing.assert_close(update[UP].double(), moved()[UP], rtol=0.05, atol=0.05)  # gains rounded to bfloat16
    bare = moved(target={k.removeprefix("model."): v for k, v in TARGET.state.items()})
    assert [f"model.{n}".replace("model.lm_head", "lm_head") for n in bare] == list(moved())
    assert torch.equal(bare[UP.removeprefix("model.")], moved()[UP])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_adding_in_place(dtype: torch.dtype) -> None:
    model = TARGET.build(dtype)
    parameters = dict(model.named_parameters())
    update = moved(target=model, alpha=0.5)
    values = {name: value.clone() for name, value in moved(target=TARGET.build(dtype), alpha=0.5).items()}
    update.add_to(model)
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name] and parameter.grad is None and parameter.dtype == dtype
        start = TARGET.state[name].to(dtype)
        assert torch.equal(parameter, start + values[name] if name in values else start), name


# --- adapters out ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, into",
    [
        ({}, TARGET),
        ({"r": 3, "use_rslora": True, "target_modules": ["q_proj", "lm_head"]}, TARGET),
        ({"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"layers.1.self_attn.v_proj": 1}}, TARGET),
        ({"modules_to_save": ["lm_head"]}, TARGET),
        ({"rank_pattern": {LAYER: 4}, "alpha_pattern": {"model.layers.1.*": 40}}, HEADLESS),
        ({"target_modules": r"model\.layers\.\d\.mlp\.\w+_proj"}, HEADLESS),
    ],
    ids=["plain", "rslora-and-head", "patterns", "saved-whole", "patterns-without-head", "regex-without-head"],
)
def test_peft_loads_the_moved_adapter(tmp_path: Path, options: dict, into: Spec) -> None:
    """What PEFT merges into the target is the update's product, alpha and scale included."""
    torch.manual_seed(0)
    config = LoraConfig(**{"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"], **options})
    model = get_peft_model(SOURCE.build(), config).double()
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "source")
    delta = Delta.from_adapter(tmp_path / "source", SOURCE.build())
    update = transport(aligned(intermediate_size=44), delta, into.build(), alpha=0.7)
    update.save_adapter(tmp_path / "target", base_name="some/target")
    loaded = PeftModel.from_pretrained(into.build(), tmp_path / "target")
    assert loaded.peft_config["default"].base_model_name_or_path == "some/target"
    merged = loaded.merge_and_unload().state_dict()
    assert len(update) == sum(not torch.equal(merged[n], v) for n, v in into.state.items()) > 0
    for name, value in update.items():
        torch.testing.assert_close(merged[name], into.state[name] + value, **ROUNDING)


def test_an_adapter_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(InputRefused, match="overwrite"):
        moved_factors(factors()).save_adapter(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


# --- refusals --------------------------------------------------------------------------------------------------------


def without(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    return {k: v for k, v in state.items() if k != name}


@pytest.mark.parametrize(
    "change, options, message",
    [
        (lambda: SOURCE.state, {}, "nothing to transport: no tensor differs from the base; was the right base given"),
        (lambda: TUNED, {"leave": ["*"]}, "nothing to transport: every changed tensor was left behind"),
        (
            lambda: without(TUNED, UP),
            {},
            r"no tensor layers\.1\.mlp\.up_proj\.weight; is it complete, and is it a tune",
        ),
        (
            lambda: {**TUNED, "model.adapter.scale": torch.ones(3)},
            {},
            r"adapter\.scale changed but has no rule; --leave 'adapter\.scale\*' leaves it behind",
        ),
        (
            lambda: {**TUNED, UP: torch.ones(44, 24)},
            {},
            r"up_proj\.weight is \[44, 24\] in the tuned model and \[40, 24\] in the base; was the right base given",
        ),
    ],
)
def test_tuned_models_that_do_not_fit(change: Callable, options: dict, message: str) -> None:
    with pytest.raises(InputRefused, match=message):
        moved(change(), **options)


def test_what_has_no_rule_can_be_left() -> None:
    update = moved({**TUNED, "model.adapter.scale": torch.ones(3)}, leave=["adapter.*"])
    assert ("adapter.scale", "left") in {(row.tensor, row.fate) for row in update.coverage}
    assert moved(without(TUNED, UP), leave=[UP.removeprefix("model.")])


def test_bases_of_another_width_are_refused() -> None:
    with pytest.raises(InputRefused, match=r"q_proj\.weight is \[32, 24\], the alignment's target asks for \[32, 36\]"):
        moved(target=SOURCE.state)
    delta = Delta.between(TARGET.state, TARGET.state)
    with pytest.raises(
        InputRefused, match=r"is \[32, 36\], the alignment's source asks for \[32, 24\]; was the right base"
    ):
        transport(aligned(intermediate_size=44), delta, TARGET.state)
    other = base(LLAMA, seed=5, width=36, intermediate_size=48).state
    with pytest.raises(InputRefused, match=r"gate_proj\.weight is \[48, 36\], the alignment's target asks for"):
        moved(target=other)[UP]


@pytest.mark.parametrize(
    "tensors, message",
    [
        (
            factors(LAYER.replace("0", "5")),
            r"the adapter changes model\.layers\.5\.self_attn\.q_proj .* source base has 2 blocks",
        ),
        (factors("model.rotary"), r"changes model\.rotary .* source base has no such layer"),
        (factors(width=36), r"q_proj is \[32, 36\], the base's \[32, 24\]; was the right base given"),
        (
            {**factors(), f"{PREFIX}{LAYER}.weight": torch.ones(32, 24)},
            r"the adapter both factors model\.layers\.0\.self_attn\.q_proj and saves it whole",
        ),
        (
            {**factors(), f"{PREFIX}model.layers.0.input_layernorm.weight": torch.ones(24)},
            r"the adapter saves layers\.0\.input_layernorm\.weight whole, which no moved adapter can; --output",
        ),
    ],
)
def test_adapters_that_do_not_fit(tensors: dict, message: str) -> None:
    with pytest.raises(InputRefused, match=message):
        moved_factors(tensors)


def test_a_zero_gain_of_the_target_is_named() -> None:
    target = {k: v.clone() for k, v in TARGET.state.items()}
    target["model.layers.1.post_attention_layernorm.weight"][7] = 0
    message = r"layers\.1\.post_attention_layernorm of the target has gain 0 at feature 7; nothing passes there"
    with pytest.raises(InputRefused, match=message):
        moved(target=target)[UP]
    delta = Delta.from_lora(CONFIG, factors(UP.removesuffix(".weight"), out=40), SOURCE.state)
    with pytest.raises(InputRefused, match=message):
        transport(aligned(intermediate_size=44), delta, target)[UP]


# --- warnings --------------------------------------------------------------------------------------------------------


def test_a_bias_without_a_place_is_left() -> None:
    source = SPECS["biased"]
    name = "model.layers.0.self_attn.q_proj.bias"
    tuned = {**source.state, name: source.state[name] + 1, UP: source.state[UP] + 1}
    update = transport(aligned("biased"), Delta.between(source.state, tuned), base(LLAMA, seed=5, width=36).state)
    assert list(update) == [UP]
    assert TensorFate(name.removeprefix("model."), "left", "the target has no bias to take it") in update.coverage


def test_a_bias_carried_through_a_small_mean_is_said() -> None:
    source, target = SPECS["vit-no-qkv-bias"], base(VIT, seed=5, width=36, qkv_bias=False)
    norm = "vit.layers.0.layernorm_before"
    gain, bias = (target.state[f"{norm}.{part}"] for part in ("weight", "bias"))
    target.state[f"{norm}.bias"] = bias - gain * ((bias / gain).mean() - 1e-4)  # sum(bias / gain) = 36e-4
    alignment = align(source.build(), target.build(), batches(source, seed=3, count=1), recipe="coherent")
    update = transport(alignment, Delta.between(source.state, tune(source, "gains").state), target.state)
    update["vit.layers.0.attention.q_proj.weight"]
    said = r"q_proj: the tune shifts .* no bias: its weight carries it, which is \d+\.\d times the rest of its update; "
    assert len(update.warnings) == 1 and re.search(said, update.warnings[0])


def test_a_bias_that_is_all_a_layer_carries_is_said_without_a_ratio() -> None:
    """Only the final norm's bias was trained: nothing of the head's own update is there to compare with."""
    source, bias = SPECS["gpt2"], "transformer.ln_f.bias"
    tuned = {**source.state, bias: source.state[bias] + 0.01}
    target = base(GPT2, seed=5, width=36).state
    update = transport(aligned("gpt2"), Delta.between(source.state, tuned), target)
    update["lm_head.weight"]
    assert update.warnings == [
        "lm_head: the tune shifts the output of this layer by a constant, for which the target has no bias: its weight "
        "carries it, which is all of its update; 16 bits may round that away, --out-dtype float32 keeps it"
    ]
