"""The drop-in method as a library sees it: keys and dtypes, batches, token alignment, refusals, the registry.

The official package is not needed: its registry is played by a stand-in.
"""

import copy
import importlib
import sys
import types
import warnings
from collections.abc import Mapping
from itertools import product
from typing import Any

import pytest
import torch
from helpers.openclip_tower import Clip
from test_drop_in import delta_of, moved, pair
from theseus_transport.integrations import install
from theseus_transport.integrations.drop_in import DropIn
from theseus_transport.integrations.feed import batches
from theseus_transport.integrations.taps import paired
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

# --- the library's conventions ---------------------------------------------------------------------------------------


def clips() -> tuple[Clip, Clip, Any]:
    (source, target), images = pair("wider")
    return Clip(source), Clip(target), ([images[0]], [images[1]])


def test_keys_shapes_and_dtypes() -> None:
    source, target, loaders = clips()
    delta = {"only.here": torch.ones(3), **delta_of(source)}
    base = {key: t.to(torch.bfloat16) for key, t in target.state_dict().items()}
    found = moved(source, target, loaders, delta, target_base=base)
    assert list(found) == list(delta)[1:]
    assert all(t.shape == base[k].shape and t.dtype == torch.bfloat16 for k, t in found.items())
    assert not found["logit_scale"].any() and found["visual.proj"].any()
    with pytest.raises(KeyError, match=r"only\.here \(1 such\) is in the delta"):
        moved(source, target, loaders, delta, strict=True)
    with pytest.raises(ValueError, match="no key of the delta"):
        moved(source, target, loaders, {"visual.none": torch.ones(3)}, strict=True)
    assert moved(source, target, loaders, {"visual.none": torch.ones(3)}) == {}


def test_prepared_once_applied_to_any_delta() -> None:
    source, target, (own, other) = clips()
    models = {"source_model": source, "target_model": target, "source_dataloader": own, "target_dataloader": other}
    base, delta = target.state_dict(), delta_of(source)
    for given in ({}, {"delta": delta, "target_base": base}):
        prepared = DropIn().prepare(**models, **given, device="cpu", show_progress=True, what_is_this=1)
        once = DropIn().apply(prepared, target_base=base, delta=delta, verbose=False, sparsify=0)
        twice = DropIn().transport(
            source_base={}, target_base=base, delta={k: 2 * t for k, t in delta.items()}, prepared=prepared
        )
        direct = moved(source, target, (own, other), delta)
        for key in delta:
            assert torch.equal(once[key], direct[key])
            assert torch.allclose(2 * once[key], twice[key], rtol=1e-12, atol=0)


def test_batches_of_datasets_are_drawn_from_the_seed() -> None:
    x = torch.arange(20.0)[:, None]
    loaders = [DataLoader(TensorDataset(side * x, torch.zeros(20)), batch_size=size) for side, size in ((1, 4), (2, 5))]
    seen = list(batches(*loaders, count=3, seed=123, size=None))
    expected = torch.randperm(20, generator=torch.Generator().manual_seed(123))[:12].double()
    assert [len(own) for own, _ in seen] == [4, 4, 4]
    assert torch.equal(torch.cat([own for own, _ in seen]).flatten().double(), expected)
    assert all(torch.equal(2 * own, other) for own, other in seen)
    assert [len(own) for own, _ in batches(*loaders, count=None, seed=0, size=8)] == [8, 8, 4]


def test_batches_of_other_iterables_run_side_by_side() -> None:
    own, other = [{"pixel_values": torch.ones(2, 1)}] * 3, [(torch.zeros(2, 1), "label")] * 3
    assert len(list(batches(own, other, count=2, seed=0, size=None))) == 2
    with pytest.raises(ValueError, match="shorter"):
        list(batches(own, other[:2], count=None, seed=0, size=None))
    with pytest.raises(ValueError, match="2 samples, the target's has 3"):
        list(batches(own, [torch.ones(3, 1)], count=1, seed=0, size=None))
    with pytest.raises(ValueError, match="a dict without inputs"):
        list(batches([{"text": "a"}], own, count=1, seed=0, size=None))


def test_alignment_of_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    for own, other, mode in product((1, 4, 5, 7, 10, 17), (4, 10, 12), ("interpolate", "interpolate2d", "mean", "cls")):
        x, y = torch.randn(2, own, 3, generator=generator).double(), torch.zeros(2, other, 5).double()
        rows, into, mixing = paired(x, y, mode)
        assert torch.allclose(rows if mixing is None else mixing(rows), aligned(x, other, mode).flatten(0, 1))
        assert len(into) == (2 if mode in ("mean", "cls") else 2 * other)
    with pytest.raises(ValueError, match="4 tokens where the target has 5, and seq_align is 'none'"):
        paired(torch.ones(2, 4, 3), torch.ones(2, 5, 3), "none")
    with pytest.raises(ValueError, match=r"is \[2, 4\] in the source, \[3, 4\] in the target"):
        paired(torch.ones(2, 4), torch.ones(3, 4), "none")


def aligned(x: Tensor, count: int, mode: str) -> Tensor:
    """Source tokens [samples, tokens, width] as torch interpolates them."""
    if mode in ("mean", "cls"):
        return x.mean(1, keepdim=True) if mode == "mean" else x[:, :1]
    squares = {n * n for n in range(1, 9)}
    first = mode == "interpolate2d" and {x.shape[1] - 1, count - 1} <= squares
    if x.shape[1] == count:
        return x
    if mode == "interpolate2d" and (first or {x.shape[1], count} <= squares):
        sides = [round((n - first) ** 0.5) for n in (x.shape[1], count)]
        grid = x[:, int(first) :].mT.unflatten(2, (sides[0],) * 2)
        patches = nn.functional.interpolate(grid, size=(sides[1],) * 2, mode="bilinear").flatten(2).mT
        return torch.cat([x[:, : int(first)], patches], 1)
    return nn.functional.interpolate(x.mT, size=count, mode="linear").mT


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (dict(whiten_power=0.51), "whiten_power is 0.51"),
        (dict(whiten_power=-0.1), "whiten_power is -0.1"),
        (dict(whiten_eps=0.0), "whiten_eps is 0.0"),
        (dict(covariance_mode="spectral"), "covariance_mode is 'spectral'"),
        (dict(recipe="best"), "recipe name is 'best'"),
        (dict(source_dataloader=None), "source_dataloader and target_dataloader are both needed"),
        (dict(source_model=None), "source_model and target_model are both needed"),
        (dict(source_dataloader=[], target_dataloader=[]), "hold no batch"),
        (dict(covariance_mode="data-free"), "whose signs nothing fixes"),
    ],
)
def test_refused(options: dict[str, Any], text: str) -> None:
    source, target, loaders = clips()
    with pytest.raises(ValueError, match=text):
        moved(source, target, loaders, delta_of(source), **options)


def test_prepared_by_another_method() -> None:
    with pytest.raises(ValueError, match="prepared holds transforms_by_key; give what prepare of this method returned"):
        DropIn().apply({"transforms_by_key": {}}, target_base={}, delta={})


def test_without_a_gpu_statistics_stay_on_the_cpu(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    source, target, loaders = clips()
    found = moved(source, target, loaders, delta_of(source), device="cuda")
    assert found["visual.proj"].any() and "this torch sees no GPU" in caplog.text


def test_coherent_on_request() -> None:
    """The target is a copy of the source, so the tuned function is known; the paper's recipe misses it."""
    (source, _), (images, _) = pair("wider")
    target, delta, fresh = copy.deepcopy(source), delta_of(source), torch.randn_like(images)
    base, missed = source.state_dict(), {}
    for recipe in ("coherent", "paper"):
        found = moved(source, target, [images], delta, recipe=recipe)
        assert list(found) == list(delta)
        with torch.no_grad():
            own, theirs = (
                torch.func.functional_call(source, {k: base[k] + d[k] for k in base}, fresh) for d in (delta, found)
            )
            missed[recipe] = float((theirs - own).norm() / (own - source(fresh)).norm())
    assert missed["coherent"] <= 1e-9 and missed["paper"] > 0.1  # float64; what the paper leaves in place is a tenth
    nothing = {key: torch.zeros_like(t) for key, t in delta.items()}
    assert not any(t.any() for t in moved(source, target, [images], nothing, recipe="coherent").values())


@pytest.mark.parametrize("part", ["attn.in_proj_weight", "ln_1.weight"])
def test_coherent_moves_a_part_of_the_tensors(part: str) -> None:
    """What the delta leaves out did not change; a changed norm is taken up by the layer that reads it."""
    (source, _), (images, _) = pair("wider")
    target, fresh, base = copy.deepcopy(source), torch.randn_like(images), source.state_dict()
    delta = {key: change for key, change in delta_of(source).items() if key.endswith(part)}
    found = moved(source, target, [images], delta, recipe="coherent")
    assert delta and delta.keys() <= found.keys() < base.keys()
    with torch.no_grad():
        own, theirs = (
            torch.func.functional_call(source, base | {k: base[k] + d[k] for k in d}, fresh) for d in (delta, found)
        )
    assert (theirs - own).norm() <= 1e-9 * (own - source(fresh)).norm()  # float64, as above


# --- the registry ----------------------------------------------------------------------------------------------------


class Official:
    """Stands in for the library's own method: says who was called."""

    name = "theseus"

    def prepare(self, **options: Any) -> dict[str, Any]:
        return {"theirs": options}

    def apply(self, prepared: Mapping[str, Any], **options: Any) -> dict[str, Tensor]:
        return {"prepared": prepared["theirs"], "applied": options}  # type: ignore[dict-item]


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """The library's registry, as far as it is used: a dict of methods behind two functions."""
    for name in ("merge_and_rebase", "merge_and_rebase.rebase"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    module = types.ModuleType("merge_and_rebase.rebase.registry")
    module._METHODS = {"theseus": Official()}  # type: ignore[attr-defined]

    def register(method: Any) -> None:
        assert method.name not in module._METHODS
        module._METHODS[method.name] = method

    module.register, module.get_method = register, module._METHODS.__getitem__  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.delitem(sys.modules, "theseus_transport.integrations.merge_and_rebase", raising=False)
    return module


def test_import_registers_and_install_replaces(registry: Any) -> None:
    importlib.import_module("theseus_transport.integrations.merge_and_rebase")
    assert registry.get_method("theseus_ext") == DropIn() and isinstance(registry.get_method("theseus"), Official)
    install("merge_and_rebase")
    method = registry.get_method("theseus")
    assert (method.name, type(method), type(method.official)) == ("theseus", DropIn, Official)
    install("merge_and_rebase")
    assert registry.get_method("theseus") is method


def test_data_free_requests_go_to_the_official_method(registry: Any) -> None:
    install("merge_and_rebase")
    source, target, _ = clips()
    delta = delta_of(source)
    models = {"source_model": source, "target_model": target}
    with pytest.warns(UserWarning, match="whose signs nothing fixes.*Handed to the library's own method") as told:
        found: Any = registry.get_method("theseus").transport(
            **models, source_base={}, target_base=target.state_dict(), delta=delta, covariance_mode="data_free", seed=3
        )
    assert len(told) == 1 and found["prepared"]["source_model"] is source and found["prepared"]["seed"] == 3
    assert found["prepared"]["delta"] is delta and found["applied"]["delta"] is delta
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaders = clips()[2]
        shared = {"source_dataloader": loaders[0], "target_dataloader": loaders[1], "device": "cpu"}
        ours = registry.get_method("theseus").transport(
            **models, **shared, target_base=target.state_dict(), delta=delta
        )
    assert ours["visual.proj"].any()


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "merge_and_rebase", None)
    monkeypatch.delitem(sys.modules, "theseus_transport.integrations.merge_and_rebase", raising=False)
    with pytest.raises(ImportError, match="merge-and-rebase cannot be imported.*install it"):
        install("merge_and_rebase")
    with pytest.raises(ValueError, match="no integration with 'mergekit'; choose merge_and_rebase"):
        install("mergekit")
