"""Task vectors and adapters: scales as PEFT applies them, nothing read before it is asked for, refusals by name."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from exact.models import LLAMA, LLAMA_SCORE, VIT, base
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from theseus_transport import Delta, InputRefused
from theseus_transport.models.text_families import LLAMA as LLAMA_FAMILY
from theseus_transport.models.vision_families import VIT as VIT_FAMILY
from theseus_transport.updates.adapter import PREFIX, Adapter
from torch import Tensor, nn

SPEC = base(LLAMA)
PLAIN = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "bias": "none", "init_lora_weights": True}
LAYER = "model.layers.0.self_attn.q_proj"


def lora(**options: object) -> PeftModel:
    """A random LoRA on q, v and down, both factors non-zero, in float64."""
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"], **{"r": 2, "lora_alpha": 6, **options})
    model = get_peft_model(SPEC.build(), config).double()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model


def factors(layer: str = LAYER, *, rank: int = 2, width: int = 24, out: int = 32) -> dict[str, Tensor]:
    name = f"{PREFIX}{layer}"
    return {f"{name}.lora_A.weight": torch.ones(rank, width), f"{name}.lora_B.weight": torch.ones(out, rank)}


def adapter(tensors: Mapping[str, Tensor] | None = None, **config: object) -> Adapter:
    return Adapter({**PLAIN, **config}, factors() if tensors is None else tensors)


class Watched(dict):
    """A mapping that remembers what was read."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(tensors)
        self.read: list[str] = []

    def __getitem__(self, name: str) -> Tensor:
        self.read.append(name)
        return super().__getitem__(name)


# --- what an adapter means, by PEFT itself ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"r": 4, "lora_alpha": 1},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 5, r"layers\.1\.self_attn\.v_proj": 3}},
        {"alpha_pattern": {"down_proj": 11, "model.layers.0.self_attn.q_proj": 1}},
        {"rank_pattern": {r".*\.0\..*": 3, "v_proj": 4}, "alpha_pattern": {"^model.*v_proj": 5}, "use_rslora": True},
        {
            "alpha_pattern": {"_proj": 99, "proj": 98, "layers.0": 97, "1.self_attn.q_proj": 7}
        },  # most match no whole name
    ],
    ids=["plain", "other-rank", "rslora", "rank-pattern", "alpha-pattern", "all", "near-misses"],
)
def test_products_are_pefts(tmp_path: Path, options: dict) -> None:
    model = lora(**options)
    model.save_pretrained(tmp_path)
    ours = Delta.from_adapter(tmp_path, SPEC.build()).adapter
    assert ours is not None and len(ours.layers()) == 6 and not ours.whole()
    for layer in ours.layers():
        f = ours.factors(layer)
        expected = model.base_model.model.get_submodule(layer).get_delta_weight("default")
        torch.testing.assert_close(f.scaling * f.b @ f.a, expected, rtol=1e-14, atol=1e-14)


def test_patterns_change_something() -> None:
    """Else the comparison with PEFT would hold for an implementation that ignores them."""
    patterned = {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"q_proj": 4}}
    assert adapter().scaling(LAYER) == 3 and adapter(**patterned).scaling(LAYER) == 0.5
    assert adapter(use_rslora=True).scaling(LAYER) == pytest.approx(6 / 2**0.5)
    assert adapter(**patterned).scaling(LAYER.replace("q_proj", "k_proj")) == 3


def test_modules_saved_whole(tmp_path: Path) -> None:
    model = lora(modules_to_save=["lm_head"])
    head = model.base_model.model.lm_head.modules_to_save["default"].weight
    nn.init.normal_(head)
    model.save_pretrained(tmp_path)
    delta = Delta.from_adapter(tmp_path, SPEC.build())
    tuned = delta.tuned_tensors(LLAMA_FAMILY)
    assert list(tuned) == ["lm_head.weight"] and len(tuned) == 1
    torch.testing.assert_close(tuned["lm_head.weight"], head.detach())


@pytest.mark.parametrize("spelling", ["lm_head.weight", "lm_head.modules_to_save.default.weight"])
def test_spellings_of_what_is_saved_whole(spelling: str) -> None:
    found = adapter({**factors(), PREFIX + spelling: torch.ones(3)})
    assert found.whole() == {"lm_head.weight": PREFIX + spelling} and list(found.layers()) == [LAYER]


def test_adapters_of_older_peft_name_their_adapter() -> None:
    old = {k.replace(".weight", ".default.weight"): v for k, v in factors().items()}
    assert adapter(old).factors(LAYER).a.shape == (2, 24)


# --- task vectors -----------------------------------------------------------------------------------------------------


def test_between_takes_modules_and_mappings_of_any_spelling() -> None:
    model = base(LLAMA_SCORE).build()
    renamed = {k.replace("model.", ""): v for k, v in model.state_dict().items()}
    for tuned in (model, model.state_dict(), renamed):
        found = Delta.between(model, tuned).tuned_tensors(LLAMA_FAMILY)
        assert sorted(found) == sorted(renamed)
        assert all(torch.equal(found[name], renamed[name]) for name in renamed)


def test_older_names_of_vision_transformers_mean_the_same() -> None:
    state = base(VIT).build().state_dict()
    old = {"attention.q_proj": "attention.attention.query", "attention.k_proj": "attention.attention.key"}
    old |= {"attention.v_proj": "attention.attention.value", "attention.o_proj": "attention.output.dense"}
    old |= {"mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense", "vit.layers.": "vit.encoder.layer."}
    spelled = {}
    for name, value in state.items():
        for new, older in old.items():
            name = name.replace(new, older)
        spelled[name] = value
    assert spelled.keys() != state.keys()
    found = Delta.between(state, spelled).tuned_tensors(VIT_FAMILY)
    assert all(torch.equal(found[VIT_FAMILY.canonical(name)], value) for name, value in state.items())
    with pytest.raises(InputRefused, match=r"layers\.0\.attention\.q_proj\.weight; keep one of them"):
        Delta.between(state, state | spelled).tuned_tensors(VIT_FAMILY)


def test_nothing_is_read_before_it_is_asked_for(tmp_path: Path) -> None:
    before, after = Watched(SPEC.state), Watched(SPEC.state)
    delta = Delta.between(before, after)
    tuned = delta.tuned_tensors(LLAMA_FAMILY)
    assert len(list(tuned)) == len(SPEC.state) and not before.read and not after.read
    assert tuned["norm.weight"] is SPEC.state["model.norm.weight"] and after.read == ["model.norm.weight"]
    kept = Watched({**factors(), **factors(LAYER.replace("0", "1"))})
    found = Delta.from_lora(PLAIN, kept, before).adapter
    assert found is not None and len(found.layers()) == 2 and not kept.read
    found.factors(LAYER)
    assert len(kept.read) == 2 and not before.read


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config, message",
    [
        ({"peft_type": "LOHA"}, "of type 'LOHA'; merge it into its base with PEFT, then move TUNED-merged: python -c"),
        ({"peft_type": None}, "says peft_type None; is it an adapter of PEFT?"),
        (
            {"peft_type": "PROMPT_TUNING"},
            "puts trained vectors in front of the input: no weights hold it; train a LoRA",
        ),
        ({"peft_type": "XLORA"}, "acts on activations: no weights hold it; train a LoRA"),
        *(
            ({"init_lora_weights": init}, f"initialised by {init}, which changes the base; merge it into its base with")
            for init in ("pissa", "PiSSA", "olora")
        ),
        *(
            ({"init_lora_weights": init}, f"initialised by {init}, .*; where it was trained, save it as a plain LoRA")
            for init in ("pissa_niter_16", "corda", "lora_ga")
        ),
        ({"init_lora_weights": "loftq"}, "by loftq, on a quantised base .*; where it was trained, merge it"),
        *(
            ({option: value}, f"the adapter uses {option}; merge it into its base with PEFT, then move TUNED-merged")
            for option, value in {
                "use_qalora": True,
                "target_parameters": ["mlp.experts"],
                "kasa_config": {"beta": 1},
            }.items()
        ),
        ({"layer_replication": [[0, 2]]}, "uses layer_replication, which makes another base, .*; train without it"),
        ({"alora_invocation_tokens": [5]}, "uses alora_invocation_tokens, which acts on some tokens only"),
        ({"r": 0}, "r is 0, expected a positive number"),
        ({"r": None}, "r is None, expected a positive number"),
        ({"r": "x"}, "r is 'x', expected a positive number"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan, expected a positive number"),
        ({"rank_pattern": [1]}, r"rank_pattern is \[1\], expected names and numbers"),
        ({"rank_pattern": {"q(": 2}}, "rank_pattern holds no regular expression"),
    ],
)
def test_refused_by_configuration(config: dict, message: str) -> None:
    with pytest.raises(InputRefused, match=message):
        adapter(**config)


@pytest.mark.parametrize(
    "config, what",
    [
        ({"use_dora": True}, "DoRA"),
        ({"bias": "all"}, r"trained biases \(bias='all'\)"),
        ({"lora_bias": True, "use_dora": True}, r"DoRA and biases behind its factors \(lora_bias\)"),
        ({"trainable_token_indices": [1, 2]}, "trained tokens"),
    ],
)
def test_more_than_factors_is_merged(config: dict, what: str) -> None:
    delta = Delta.from_lora({**PLAIN, **config}, factors(), SPEC.state)
    with pytest.raises(
        InputRefused, match=f"the adapter holds {what}, which no moved adapter can; --output checkpoint"
    ):
        delta.tuned_tensors(LLAMA_FAMILY)


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal"])
def test_initialisations_that_leave_the_base_alone(init: object) -> None:
    assert adapter(init_lora_weights=init).scaling(LAYER) == 3


@pytest.mark.parametrize(
    "extra, message",
    [
        (
            {"model.embed_tokens.lora_embedding_A": torch.ones(2, 60)},
            "lora_embedding_A is no factor of a linear layer; --output",
        ),
        ({f"{LAYER}.lora_magnitude_vector": torch.ones(32)}, "lora_magnitude_vector is no factor of a linear layer"),
        ({f"{LAYER}.lora_B.bias": torch.ones(32)}, r"lora_B\.bias is no factor of a linear layer"),
        ({"model.layers.1.mlp.up_proj.lora_A.weight": torch.ones(2, 24)}, "up_proj has lora_A alone"),
        (
            {"model.layers.1.mlp.up_proj.lora_B.weight": torch.ones(40, 2)},
            "has lora_B alone; the adapter is incomplete",
        ),
    ],
)
def test_refused_by_tensors(extra: dict, message: str) -> None:
    with pytest.raises(InputRefused, match=message):
        adapter({**factors(), **{PREFIX + k: v for k, v in extra.items()}}).layers()


@pytest.mark.parametrize("shapes", [((2, 24), (32, 3)), ((24,), (32, 24)), ((2, 3, 3, 3), (8, 2, 1, 1))], ids=str)
def test_factors_that_do_not_multiply(shapes: tuple) -> None:
    a, b = (torch.ones(shape) for shape in shapes)
    tensors = dict(zip(factors(), (a, b), strict=True))
    with pytest.raises(InputRefused, match="lora_A is .*, lora_B .*; they do not multiply as B A"):
        adapter(tensors).factors(LAYER)


def test_folders_that_hold_no_adapter(tmp_path: Path) -> None:
    save_file(factors(), tmp_path / "adapter_model.safetensors")
    with pytest.raises(InputRefused, match="has no adapter_config.json; PEFT writes it beside the weights"):
        Delta.from_adapter(tmp_path, SPEC.state)
    (tmp_path / "adapter_config.json").write_text(json.dumps(PLAIN))
    assert repr(Delta.from_adapter(tmp_path, SPEC.state)) == f"Delta(LoRA adapter, {len(factors())} tensors)"
    assert load_file(tmp_path / "adapter_model.safetensors").keys() == factors().keys()


def test_a_pattern_that_would_not_end_is_ended(monkeypatch):
    """re would try it for years; a plain name, and what PEFT's own users write, is found at once."""
    layer = "model.layers.0.self_attn.q_proj"
    monkeypatch.setattr("theseus_transport.updates.adapter.PATIENCE", 0.05)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "alpha_pattern": {"(?:(?:.|..|...)*,?)*q": 3}}
    with pytest.raises(InputRefused, match=r"the pattern '\(\?:.* does not end on 'model.layers.0.*write the name out"):
        Adapter(config, {}).scaling(layer)
    for pattern in ("q_proj", r"layers\.\d+\.self_attn\.q_proj", r".*\.0\..*"):
        assert Adapter({**config, "alpha_pattern": {pattern: 3}}, {}).scaling(layer) == 1.5
