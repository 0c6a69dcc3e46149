"""Models of 16 bits in Python: compared as the command compares them; what their rounding swallows is said."""

import copy
from functools import cache
from pathlib import Path

import pytest
import theseus_transport as tt
import torch
from helpers.tiny_models import VOCABULARY, llama, tuned, vit
from safetensors.torch import load_file
from torch import nn

SHORT = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
IDS = torch.randint(VOCABULARY, (4, 32), generator=torch.Generator().manual_seed(1))
BATCHES = {
    "llama": [{"input_ids": ids} for ids in IDS.split(2)],
    "vit": [{"pixel_values": torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(2))}],
}


@cache
def models(name: str, depth: int = 2) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Source, its tune, target."""
    torch.manual_seed(0)
    source, target = (
        (llama("source"), llama("target", depth=depth)) if name == "llama" else (vit("source"), vit("target"))
    )
    return source, tuned(source), target


def loaded(model: nn.Module, folder: Path, dtype: torch.dtype) -> nn.Module:
    """As a user gets it from a checkpoint in this dtype."""
    return type(model).from_pretrained(folder, dtype=dtype).eval()


@SHORT
@pytest.mark.parametrize("name, depth", [("llama", 2), ("llama", 3), ("vit", 2)])
def test_an_alignment_is_that_of_the_same_checkpoints_in_float32(tmp_path: Path, name: str, depth: int, dtype) -> None:
    """Also of models cast in memory, whose rotary frequencies are rounded with the weights; all is put back."""
    short = [copy.deepcopy(model).to(dtype) for model in models(name, depth)[::2]]
    folders = [tmp_path / "source", tmp_path / "target"]
    for model, folder in zip(short, folders, strict=True):
        model.save_pretrained(folder)
    made = {}
    for kind in (dtype, torch.float32):
        both = [loaded(model, folder, kind) for model, folder in zip(short, folders, strict=True)]
        made[kind] = tt.align(*both, BATCHES[name])
    held = [{n: t.clone() for n, t in [*m.named_parameters(), *m.named_buffers()]} for m in short]
    pixels = [{k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()} for batch in BATCHES[name]]
    cast = tt.align(*short, BATCHES[name] if name == "llama" else pixels)
    for model, before in zip(short, held, strict=True):
        after = dict([*model.named_parameters(), *model.named_buffers()])
        assert all(t.dtype == after[n].dtype == dtype and torch.equal(t, after[n]) for n, t in before.items())
    wanted = made[torch.float32]
    for found in (made[dtype], *([cast] if name == "llama" else [])):  # pixels in 16 bits are other pixels
        assert found.rules == wanted.rules and found.blocks == wanted.blocks
        for key, t in wanted.maps.items():
            assert all(torch.equal(part, found.maps[key].tensors()[n]) for n, part in t.tensors().items()), key


def moved(target: nn.Module, alpha: float = 1.0) -> tt.Update:
    source, tune, _ = models("llama")
    return tt.transport(tt.align(source, target, BATCHES["llama"]), tt.Delta.between(source, tune), target, alpha=alpha)


@SHORT
def test_adding_rounds_once_and_says_what_that_loses(dtype, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    target = copy.deepcopy(models("llama")[2]).to(dtype)
    update = moved(target, alpha=0.02 if dtype == torch.bfloat16 else 0.002)
    before, values = {n: p.detach().clone() for n, p in target.named_parameters()}, dict(update)
    caplog.clear()
    update.add_to(target)
    lost = {}
    for name, old in before.items():
        wanted = old.float() + values[name] if name in values else old.float()
        assert torch.equal(target.get_parameter(name), wanted.to(dtype)), name
        if name in values:
            lost[name] = float((wanted.to(dtype).double() - old - values[name]).norm() / values[name].norm())
    worst = max(lost, key=lost.get)
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1 and told == update.warnings[-1:] and lost[worst] > 0.1
    assert f"worst {worst} {lost[worst]:.0%}" in told[0] and "model.float(), or save_delta keeps it" in told[0]
    update.save_delta(tmp_path / "delta")
    kept = load_file(tmp_path / "delta" / "delta.safetensors")
    assert kept.keys() == values.keys() and all(torch.equal(kept[n], v) for n, v in values.items())
    whole = copy.deepcopy(models("llama")[2]).to(dtype).float()
    moved(whole, update.alpha).add_to(whole)
    assert not any("rounding" in record.getMessage() for record in caplog.records[1:])


def test_adding_to_another_model_is_refused() -> None:
    target = models("llama")[2]
    with pytest.raises(tt.InputRefused, match="LlamaForCausalLM has no .* of the target's shape; give the target"):
        moved(target).add_to(models("llama")[0])
