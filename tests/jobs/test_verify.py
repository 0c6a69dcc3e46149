"""The command verify: what a folder must be, beyond matching its manifest."""

import json
import re

import pytest
import torch
from helpers.broken_inputs import edited
from helpers.command import FAST, aligned, call, invoke, refused
from safetensors.torch import load_file, save_file
from theseus_transport.files.headers import file_blake2b
from theseus_transport.files.journal import Work


@pytest.fixture(scope="module")
def root(models):
    return models


@pytest.fixture(scope="module")
def maps(root, tmp_path_factory):
    return aligned(root, tmp_path_factory.mktemp("alignments") / "maps")


def damaged_copy(place, folder, change, *, sealed=True):
    """A copy with its weights changed; `sealed` with a manifest to match, as if it had been written so."""
    edited(place, folder)
    (path,) = place.glob("*.safetensors")
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})
    if sealed:
        manifest = json.loads((place / "theseus.json").read_text())
        manifest["files"][path.name] = {"size": path.stat().st_size, "blake2b": file_blake2b(path)}
        (place / "theseus.json").write_text(json.dumps(manifest))
    return place


def poison(tensors):
    next(iter(tensors.values())).view(-1)[0] = float("nan")


def reshape(tensors):
    name = next(iter(tensors))
    tensors[name] = torch.cat([tensors[name], tensors[name]])


FAULTS = [
    ("checkpoint", poison, "model.safetensors: .* holds 1 NaN"),
    ("checkpoint", lambda t: t.pop("lm_head.weight"), "lm_head.weight of .*causal/target is in no file"),
    ("checkpoint", reshape, r"OUT .*is \[.*asks for|model.safetensors: .* is \["),
    ("delta", reshape, r"delta.safetensors: .*q_proj.weight is \[80, 40\], that of .* is \[40, 40\]"),
    ("delta", lambda t: t.update(extra=torch.ones(1)), "delta.safetensors: extra is no tensor of"),
    ("adapter", poison, "adapter_model.safetensors: .* holds 1 NaN"),
    ("adapter", reshape, "adapter_model.safetensors: .*(of rank|has rank)"),
    ("adapter", lambda t: t.update({k.replace("layers.0", "layers.9"): v.clone() for k, v in t.items()}),
     "adapter_model.safetensors: .*layers.9.* is no module of"),
]  # fmt: skip


@pytest.fixture(scope="module")
def written(root, maps, tmp_path_factory):
    place = tmp_path_factory.mktemp("written")
    for kind, tuned in (("checkpoint", "causal/tuned"), ("delta", "causal/tuned"), ("adapter", "lora")):
        invoke("apply", maps, root / tuned, place / kind, "--output", kind)
        invoke("verify", place / kind)
    return place


@pytest.mark.parametrize("kind, change, message", FAULTS)
def test_verify_names_what_a_matching_manifest_hides(written, tmp_path, kind, change, message):
    result = call("verify", damaged_copy(tmp_path / kind, written / kind, change))
    assert result.exit_code == 3 and re.search(f"damaged .*({message})", result.stdout), result.stdout
    told = json.loads(call("verify", tmp_path / kind, "--json").stdout)["damaged"]
    assert any(re.search(message, fault) for fault in told)


def test_verify_of_files(root, written, tmp_path):
    bad = damaged_copy(tmp_path / "bytes", written / "checkpoint", poison, sealed=False)
    said = call("verify", bad)
    assert said.exit_code == 3 and "model.safetensors has BLAKE2b" in said.stdout and "NaN" in said.stdout
    cut = edited(tmp_path / "cut", written / "checkpoint")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-9])
    said = call("verify", cut)
    assert said.exit_code == 3 and "truncated" in said.stdout
    for content, message in (("{", "config.json.*no valid JSON"), ('{"model_type": "gpt9"}', "model_type is 'gpt9'")):
        bad = edited(tmp_path / f"config{len(content)}", written / "checkpoint")
        (bad / "config.json").write_text(content)
        assert re.search(message, call("verify", bad).stdout)
    refused("holds no theseus.json", "verify", root / "lora")
    manifest = json.loads((written / "delta/theseus.json").read_text())
    manifest["metadata"]["outcome"]["job"]["target"] = str(tmp_path / "gone")
    for i, outcome in enumerate(([], {"kind": "delta", "job": []}, {"kind": ["delta"]})):
        odd = edited(tmp_path / f"odd{i}", written / "delta")
        (odd / "theseus.json").write_text(json.dumps(manifest | {"metadata": {"outcome": outcome}}))
        assert re.search("damaged theseus.json", call("verify", odd).stdout)
    lost = edited(tmp_path / "lost", written / "delta")
    (lost / "theseus.json").write_text(json.dumps(manifest))
    assert "cannot be compared with" in call("verify", lost).stdout
    invoke("verify", lost, "--target", root / "causal/target")


def test_verify_of_a_delta_in_shards(root, maps, tmp_path, monkeypatch):
    monkeypatch.setitem(Work.open.__func__.__kwdefaults__, "shard_size", 20_000)  # bytes, of 140 thousand
    invoke("apply", maps, root / "causal/tuned", tmp_path / "out", "--output", "delta")
    assert len(list((tmp_path / "out").glob("delta-*.safetensors"))) > 1
    invoke("verify", tmp_path / "out")
    (tmp_path / "out/delta.safetensors.index.json").write_text(json.dumps({"weight_map": {}}))
    assert re.search("damaged .*index.json", call("verify", tmp_path / "out").stdout)


def test_verify_where_the_target_also_stores_its_tied_head(root, tmp_path):
    target = edited(tmp_path / "target", root / "tied/target", tensors=lambda t: t.update(
        {"lm_head.weight": t["model.embed_tokens.weight"].clone()}))  # fmt: skip
    sides = (root / "tied/source", root / "tied/tuned", target)
    invoke("transport", *sides, tmp_path / "out", "--calibration", root / "ids.safetensors", *FAST)
    invoke("verify", tmp_path / "out")
    lost = damaged_copy(tmp_path / "lost", tmp_path / "out", lambda t: t.pop("model.norm.weight"))
    assert "model.norm.weight of" in call("verify", lost).stdout
