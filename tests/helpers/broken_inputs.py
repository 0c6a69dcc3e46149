"""Broken inputs: each function returns one of (root, place), which makes it at ``place`` and returns its path."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def edited(folder: Path, copy_of: Path, *, config=None, tensors=None, file="config.json") -> Path:
    """A copy of a folder with a JSON file updated and tensors changed in place by a function of the dict."""
    folder.mkdir()
    for path in copy_of.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    if config is not None:
        values = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**values, **config}))
    if tensors is not None:
        (weights,) = folder.glob("*.safetensors")
        held = load_file(weights)
        tensors(held)
        save_file(held, weights, {"format": "pt"})
    return folder


def config(of, **values):
    return lambda root, place: edited(place, root / of, config=values)


def adapter(**values):
    return lambda root, place: edited(place, root / "lora", config=values, file="adapter_config.json")


def tensors(of, change):
    return lambda root, place: edited(place, root / of, tensors=change)


def poisoned(of, name, value):
    return tensors(of, lambda held: held[name].view(-1)[3:4].fill_(value))


def index(change):
    """A sharded source whose index is changed in place, given with its folder."""

    def make(root, place):
        edited(place, root / "bf16" / "source")
        path = place / "model.safetensors.index.json"
        held = json.loads(path.read_text())
        change(held["weight_map"], place)
        path.write_text(json.dumps(held))
        return place

    return make


def without(of, name):
    def make(root, place):
        edited(place, root / of)
        (place / name).unlink()
        return place

    return make


def pickled(root, place):
    edited(place, root / "causal" / "source")
    torch.save(load_file(place / "model.safetensors"), place / "pytorch_model.bin")
    (place / "model.safetensors").unlink()
    return place


def text(of, name, content):
    def make(root, place):
        edited(place, root / of)
        (place / name).write_text(content)
        return place

    return make


def data(**tensors):
    def make(root, place):
        save_file(tensors, place.with_suffix(".safetensors"))
        return place.with_suffix(".safetensors")

    return make
