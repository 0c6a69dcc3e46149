"""Names that wrappers of a model, state dicts and other adapters' names leave behind mean what the plain ones mean."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from test_delta import adapter, factors
from test_update import CONFIG, SOURCE, TARGET, TUNED, aligned, moved, moved_factors
from test_update import factors as drawn
from theseus_transport import Delta, InputRefused, transport
from theseus_transport.models.text_families import LLAMA as FAMILY
from theseus_transport.updates.adapter import PREFIX

Q = "base_model.model.model.layers.0.self_attn.q_proj"
SPELLINGS: dict[str, Callable[[str], str]] = {
    "torch.compile": lambda key: f"_orig_mod.{key}",
    "compiled inside": lambda key: key.replace("layers.0.", "layers.0._orig_mod."),
    "data parallel": lambda key: f"module.{key}",
    "both": lambda key: f"module._orig_mod.module.{key}",
    "FSDP": lambda key: key.replace("layers.0.", "_fsdp_wrapped_module.layers.0._checkpoint_wrapped_module."),
    "prefix missing": lambda key: key.removeprefix(PREFIX),
    "prefix twice": lambda key: PREFIX + key,
    "bare backbone": lambda key: key.replace(".model.model.", ".model."),
    "adapter named sft": lambda key: key.replace(".weight", ".sft.weight"),
    "all of it": lambda key: f"module.{PREFIX}{key.replace('.weight', '.default.weight')}",
}


@pytest.mark.parametrize("spell", SPELLINGS.values(), ids=SPELLINGS)
def test_an_adapter_under_any_spelling_is_the_adapter(tmp_path: Path, spell: Callable[[str], str]) -> None:
    plain, update = moved_factors(drawn()), moved_factors({spell(key): value for key, value in drawn().items()})
    assert [*plain] == [*update] and all(torch.equal(plain[name], update[name]) for name in plain)
    for name, found in (("plain", plain), ("spelled", update)):
        found.save_adapter(tmp_path / name)
    written = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("plain", "spelled")]
    assert all(torch.equal(written[0][key], written[1][key]) for key in {**written[0], **written[1]})


@pytest.mark.parametrize("start", ["_orig_mod.", "module.", "module._orig_mod."])
def test_a_full_tune_under_any_spelling_is_the_tune(start: str) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(moved({start + key: value for key, value in TUNED.items()})[name], moved()[name])


def test_a_state_dict_names_the_adapter() -> None:
    """All of a PEFT model's state dict that belongs to the adapter, as a trainer's own checkpoint keeps it."""
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(SOURCE.build(), config, adapter_name="sft")
    state = {k: v for k, v in model.state_dict().items() if ".sft" in k or ".original_module." in k}
    head = "base_model.model.lm_head.modules_to_save.sft.weight"
    assert head in state and f"{Q}.lora_A.sft.weight" in state
    found = Delta.from_lora({**CONFIG, "bias": "none"}, state, SOURCE.state)
    assert found.adapter is not None and found.adapter.whole() == {"lm_head.weight": head}
    assert [*found.tuned_tensors(FAMILY)] == ["lm_head.weight"]
    assert [*found.adapter.layers()] == [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]


def test_several_adapters_in_one_file() -> None:
    two = {**factors(), **{key.replace(".weight", ".sft.weight"): value for key, value in factors().items()}}
    with pytest.raises(InputRefused, match=r"several adapters \(one without a name, sft\); save it with PEFT"):
        adapter(two).layers()
    twice = {**factors(), **{f"module.{key}": value for key, value in factors().items()}}
    with pytest.raises(InputRefused, match=r"are one factor, saved twice; save it with PEFT"):
        adapter(twice).layers()
    head = dict.fromkeys((f"{PREFIX}lm_head.weight", f"{PREFIX}lm_head.modules_to_save.weight"), torch.ones(60, 24))
    with pytest.raises(InputRefused, match=r"are one parameter, saved twice; save it with PEFT"):
        adapter({**factors(), **head}).whole()


@pytest.mark.parametrize(
    "layer, lacks",
    [("model.layers.3.self_attn.q_proj", "has 2 blocks"), ("backbone.dense_7", "has no such layer")],
)
def test_an_adapter_of_layers_the_source_lacks(layer: str, lacks: str) -> None:
    """Leaving them would leave the rest of an adapter that was trained on another model."""
    given = {**drawn(), **drawn(layer)}
    with pytest.raises(InputRefused) as refused:
        moved_factors(given)
    told = str(refused.value)
    assert f"changes {layer} (1 of its 2 layers are like it), but the source base {lacks}" in told
    assert "give the base that the adapter was trained on as SOURCE" in told and "--leave" not in told


def test_a_layer_that_cannot_move_is_left_only_where_another_moves() -> None:
    source, layer = {**SOURCE.state, "model.adapter.weight": torch.ones(32, 24).double()}, "model.adapter"
    beside, alone = {**drawn(), **drawn(layer)}, drawn(layer)
    for given, cure in ((beside, r"--leave 'adapter\*' leaves it behind"), (alone, "nothing of it can move")):
        with pytest.raises(InputRefused, match=rf"changes {layer}, which has no rule; {cure}"):
            transport(aligned(intermediate_size=44), Delta.from_lora(CONFIG, given, source), TARGET.state)


@pytest.mark.parametrize("presumed", [False, True])
def test_a_tensor_without_a_rule_is_left_only_where_another_moves(presumed: bool) -> None:
    new = {"value.weight": torch.ones(1, 24).double()}
    for tuned, cure in (
        (TUNED, r"--leave 'value\*' leaves it behind"),
        (SOURCE.state, "nothing else changed that could"),
    ):
        with pytest.raises(InputRefused, match=f"value.weight changed but has no rule; {cure}"):
            moved({**tuned, **new}, presumed=presumed)
