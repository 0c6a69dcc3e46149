"""The bench of language models: no file is in two parts, a widened copy is the same network, and bits are bits."""

import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[2] / "bench/language"))
import corpus  # noqa: E402
import measure  # noqa: E402
import pairs  # noqa: E402
import train  # noqa: E402
from official import official  # noqa: E402


class Kept:
    """What `pairs.save_widened` takes of a shelf."""

    class tokenizer:
        save_pretrained = staticmethod(lambda to: None)


def random_model(size: train.Size, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    model = size.model().eval()
    for name, p in model.named_parameters():
        p.data = 0.1 * torch.randn_like(p) + float("norm" in name)
    return model


def test_files_are_shared_out_whole_and_once() -> None:
    found = [(f"{i}", f"{i:03}" * 50) for i in range(40)]
    parts = corpus.shared_out(iter(found), {"train": 3000, "test": 600})
    told = {part: set(text.split("\n")) for part, text in parts.items()}
    assert not told["train"] & told["test"]
    assert told["train"] | told["test"] <= {text for _, text in found}
    assert len(parts["train"]) >= 3000 and len(parts["test"]) >= 600


def test_uniform_logits_cost_the_bits_of_the_vocabulary() -> None:
    rows, lengths = torch.randint(0, 16, (5, 9)), torch.full((16,), 2)
    assert measure.bits(lambda ids: torch.zeros(*ids.shape, 16), rows, lengths) == pytest.approx(4 / 2)


def test_a_widened_copy_is_the_same_network(tmp_path: Path) -> None:
    source = random_model(pairs.SOURCE, 0)
    source.save_pretrained(tmp_path / "source")
    pairs.save_widened(Kept(), tmp_path / "source", tmp_path / "wide", 1)
    wide, ids = train.load(tmp_path / "wide"), torch.randint(0, corpus.VOCABULARY, (2, 20))
    assert wide.config.hidden_size == pairs.TARGETS["apart"].width
    with torch.no_grad():
        torch.testing.assert_close(wide(ids).logits, source(ids).logits, rtol=1e-4, atol=1e-4)


def test_an_adapter_is_loaded_merged_into_its_base(tmp_path: Path) -> None:
    base = random_model(train.Size(32, 2, 1), 0)
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(r=2, target_modules=train.LINEARS, init_lora_weights=False))
    model.save_pretrained(tmp_path / "tune")
    ids = torch.randint(0, corpus.VOCABULARY, (2, 20))
    merged = train.load(tmp_path / "tune", tmp_path / "base")
    assert not any("lora" in name for name, _ in merged.named_parameters())
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, model.eval()(ids).logits, rtol=1e-4, atol=1e-4)


def test_the_official_fit_of_a_models_own_contracting_layer_is_its_own_change() -> None:
    source, tuned = random_model(train.Size(32, 2, 1), 0), random_model(train.Size(32, 2, 1), 0)
    layer = tuned.model.layers[0].mlp.down_proj
    change = 0.01 * torch.randn_like(layer.weight)
    layer.weight.data += change
    ids = torch.randint(0, corpus.VOCABULARY, (40, 32)).split(8)
    update = official(source, tuned, source, ids, ridge=1e-9)
    assert set(update) == {"model.layers.0.mlp.down_proj.weight"}
    torch.testing.assert_close(update["model.layers.0.mlp.down_proj.weight"], change, rtol=1e-3, atol=1e-5)


def test_the_table_has_the_mean_share_over_cells() -> None:
    row = {"pair": "apart", "kind": "lora", "way": "none", "share best": 0.5, "general": 2.0, "general zero": 1.9}
    told = measure.table([row | {"share moved": share} for share in (0.2, 0.4)])
    assert "| apart | lora | none | 30 ± 127 | 50 ± 0 | +0.100 | 2 |" in told
