"""The reader: what it opens, and what it refuses with which words."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from theseus_transport.errors import InputRefused
from theseus_transport.files.checkpoint import Checkpoint, refuse_unsupported


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    save_file({"a": torch.arange(4.0)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"b": torch.ones(2, 3, dtype=torch.bfloat16)}, tmp_path / "model-00002-of-00002.safetensors")
    write_index(tmp_path, {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"})
    return tmp_path


def write_index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_single_file(tmp_path: Path) -> None:
    tensors = {"x": torch.randn(3, 4), "empty": torch.zeros(0, 5), "scalar": torch.tensor(7)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    opened = Checkpoint.open(tmp_path)
    assert opened.kind == "checkpoint" and opened.config == {"model_type": "llama"} and opened.adapter_config == {}
    assert set(opened) == set(tensors) and all(torch.equal(opened[name], tensors[name]) for name in tensors)
    assert opened.shapes["x"] == (3, 4) and opened.dtypes["scalar"] is torch.int64
    assert opened.nbytes == 3 * 4 * 4 + 8 and "nope" not in opened and len(opened) == 3
    opened["x"].zero_()
    assert torch.equal(opened["x"], tensors["x"]), "a tensor is read anew at each access and never written back"
    assert set(Checkpoint.open(tmp_path / "model.safetensors")) == set(tensors)
    with pytest.raises(KeyError):
        opened["nope"]


def test_every_dtype(tmp_path: Path) -> None:
    kinds = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.bool, torch.uint8]
    kinds += [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint16, torch.uint32, torch.uint64]
    tensors = {str(dtype): torch.ones(3, dtype=dtype) for dtype in kinds}
    save_file(tensors, tmp_path / "model.safetensors")
    opened = Checkpoint.open(tmp_path)
    assert all(
        opened.dtypes[name] is tensors[name].dtype and torch.equal(opened[name], tensors[name]) for name in tensors
    )


def test_shards(sharded: Path) -> None:
    opened = Checkpoint.open(sharded)
    assert torch.equal(opened["a"], torch.arange(4.0)) and opened["b"].shape == (2, 3)
    assert [path.name for path in opened.files][:2] == [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    with pytest.raises(InputRefused, match="one shard of several; give its folder"):
        Checkpoint.open(sharded / "model-00001-of-00002.safetensors")


def test_adapter_folder(tmp_path: Path) -> None:
    save_file({"lora_A": torch.ones(1, 2)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"r": 1}')
    opened = Checkpoint.open(tmp_path)
    assert opened.kind == "adapter" and opened.adapter_config == {"r": 1} and opened.config == {}
    assert Checkpoint.open(tmp_path / "adapter_model.safetensors").kind == "adapter"
    save_file({"w": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(InputRefused, match="holds a model and an adapter"):
        Checkpoint.open(tmp_path)


def test_fingerprint_sees_a_change(sharded: Path) -> None:
    opened = Checkpoint.open(sharded)
    before, short = opened.fingerprint(), opened.header_hash()
    assert set(before["files"]) == {path.name for path in opened.files}
    assert set(before["files"]["model-00001-of-00002.safetensors"]) == {"size", "mtime_ns", "header_blake2b"}
    assert opened.fingerprint() == before
    full = opened.fingerprint(full=True)
    save_file({"a": torch.zeros(4)}, sharded / "model-00001-of-00002.safetensors")  # same header, other values
    assert opened.header_hash() == short and opened.fingerprint(full=True) != full
    save_file({"a": torch.zeros(4, dtype=torch.int32)}, sharded / "model-00001-of-00002.safetensors")
    assert opened.header_hash() != short and opened.fingerprint() != before


@pytest.mark.parametrize("name", ["/etc/model.safetensors", "../model.safetensors", "x/../../model.safetensors",
                                  "..\\model.safetensors", "C:model.safetensors", "a\0b.safetensors"])  # fmt: skip
def test_index_leads_out_of_the_folder(sharded: Path, name: str) -> None:
    write_index(sharded, {"a": name})
    with pytest.raises(InputRefused, match="leads out of the folder"):
        Checkpoint.open(sharded)


INDEXES = {
    "missing shard": ({"a": "model-00009-of-00009.safetensors"}, "missing or not a regular file"),
    "no map": (["a"], "no weight_map"),
    "file no text": ({"a": 3}, "no weight_map"),
    "another suffix": ({"a": "evil.bin"}, r"names 'evil.bin', expected .safetensors"),
    "empty": ({}, "holds no tensor"),
    "tensor not in shard": ({"a": "model-00001-of-00002.safetensors", "z": "model-00001-of-00002.safetensors"},
                            r"places 'z' \(1 in all\) in model-00001-of-00002.safetensors, which lacks it"),
    "tensor not in index": ({"b": "model-00001-of-00002.safetensors"}, "lacks it"),
}  # fmt: skip


@pytest.mark.parametrize("weight_map, message", INDEXES.values(), ids=INDEXES)
def test_hostile_index(sharded: Path, weight_map: object, message: str) -> None:
    write_index(sharded, weight_map)
    with pytest.raises(InputRefused, match=message):
        Checkpoint.open(sharded)


def test_shard_holds_more_than_the_index_says(sharded: Path) -> None:
    save_file({"b": torch.ones(1), "c": torch.ones(1)}, sharded / "model-00002-of-00002.safetensors")
    with pytest.raises(
        InputRefused, match=r"holds 'c' \(1 in all\), which model.safetensors.index.json does not place"
    ):
        Checkpoint.open(sharded)


def test_index_repeats_a_tensor(sharded: Path) -> None:
    text = '{"weight_map": {"a": "model-00001-of-00002.safetensors", "a": "model-00002-of-00002.safetensors"}}'
    (sharded / "model.safetensors.index.json").write_text(text)
    with pytest.raises(InputRefused, match="'a' is given twice"):
        Checkpoint.open(sharded)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_symlink_out_of_the_folder(tmp_path: Path, name: str) -> None:
    folder, outside = tmp_path / "model", tmp_path / "outside"
    folder.mkdir()
    save_file({"a": torch.ones(1)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside)
    with pytest.raises(InputRefused, match="outside the model's folder"):
        Checkpoint.open(folder)
    outside.unlink()
    with pytest.raises(InputRefused, match="outside the model's folder"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("store", ["models--me--tiny/blobs", "blobs/ab"])
def test_hub_cache_links(tmp_path: Path, store: str) -> None:
    """A snapshot links into its repository's blobs, which may link into the store that repositories share."""
    snapshot, own, shared = (
        tmp_path / "models--me--tiny/snapshots/abc",
        tmp_path / "models--me--tiny/blobs",
        tmp_path / store,
    )
    for folder in (snapshot, own, shared):
        folder.mkdir(parents=True, exist_ok=True)
    save_file({"a": torch.ones(1)}, shared / "hash")
    if shared != own:
        (own / "etag").symlink_to(shared / "hash")
    (snapshot / "model.safetensors").symlink_to(shared / "hash" if shared == own else own / "etag")
    assert Checkpoint.open(snapshot)["a"].item() == 1
    (snapshot / "model.safetensors").unlink()
    save_file({"a": torch.ones(1)}, tmp_path / "models--me--tiny/elsewhere")
    (snapshot / "model.safetensors").symlink_to(tmp_path / "models--me--tiny/elsewhere")
    with pytest.raises(InputRefused, match="outside the model's folder"):
        Checkpoint.open(snapshot)


def test_links_inside_the_folder(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "weights-v2.safetensors")
    (tmp_path / "model.safetensors").symlink_to("weights-v2.safetensors")
    assert list(Checkpoint.open(tmp_path)) == ["a"]


def test_folder_in_place_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(InputRefused, match="not a regular file"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("text, message", [("{", "no valid JSON"), ("[]", "a JSON list"), ("\ud800", "no valid JSON")])
def test_hostile_config(tmp_path: Path, text: str, message: str) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(InputRefused, match=message):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("quantised, name", [
    ({"quant_method": "gptq", "bits": 4}, "gptq"), ({"quant_method": "awq"}, "awq"), ({"quant_method": "fp8"}, "fp8"),
    ({"load_in_4bit": True, "load_in_8bit": False}, "load_in_4bit"), ("int8", "int8"), ({"bits": 4}, "not named"),
])  # fmt: skip
def test_quantised_config(tmp_path: Path, quantised: object, name: str) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    for config in ({"quantization_config": quantised}, {"text_config": {"quantization_config": quantised}}):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(InputRefused, match=rf"quantised \({name}.*dequantise first.*bf16|method not named"):
            Checkpoint.open(tmp_path)
    refuse_unsupported({"quantization_config": None, "hidden_size": 4})


def test_pickle_only_when_allowed(tmp_path: Path) -> None:
    state = {"w": torch.arange(3.0)}
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputRefused, match="a pickle; convert it to safetensors, or --allow-pickle"):
        Checkpoint.open(tmp_path)
    opened = Checkpoint.open(tmp_path, allow_pickle=True)
    assert torch.equal(opened["w"], state["w"]) and opened.shapes["w"] == (3,) and opened.fingerprint()
    opened["w"].zero_()
    assert torch.equal(opened["w"], state["w"]) and opened.bytes_read == 3 * opened.nbytes
    save_file({"safe": torch.ones(1)}, tmp_path / "model.safetensors")
    assert list(Checkpoint.open(tmp_path, allow_pickle=True)) == ["safe"], "safetensors go first even then"


def test_pickled_shards(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(3)}, tmp_path / "one.bin")
    (tmp_path / "pytorch_model.bin.index.json").write_text('{"weight_map": {"w": "one.bin"}}')
    assert Checkpoint.open(tmp_path, allow_pickle=True)["w"].sum() == 3
    (tmp_path / "pytorch_model.bin.index.json").write_text('{"weight_map": {"w": "../one.bin"}}')
    with pytest.raises(InputRefused, match="leads out"):
        Checkpoint.open(tmp_path, allow_pickle=True)


class Evil:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("/nonexistent/never"),))


@pytest.mark.parametrize("state", [{"w": Evil()}, {"w": {"nested": torch.ones(1)}}, [torch.ones(1)]])
def test_pickle_of_anything_else(tmp_path: Path, state: object) -> None:
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputRefused, match="no plain pickle|more than a flat"):
        Checkpoint.open(tmp_path, allow_pickle=True)


def test_references_that_lead_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for reference in (tmp_path / "absent", "a/b/c", "bad\0name", "x" * 5000):
        with pytest.raises(InputRefused, match="neither a folder, nor a .safetensors file, nor a hub id"):
            Checkpoint.open(reference)
    with pytest.raises(InputRefused, match="holds no model.safetensors"):
        Checkpoint.open(tmp_path)
    save_file({"a": torch.ones(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(InputRefused, match="it holds weights.safetensors: give one"):
        Checkpoint.open(tmp_path)
    (tmp_path / "note.txt").write_text("")
    with pytest.raises(InputRefused, match="no .safetensors file"):
        Checkpoint.open(tmp_path / "note.txt")


def test_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def download(name: str, **options: object) -> str:
        calls.append((name, options))
        if name == "me/gone":
            raise ConnectionError("no route\nto the hub")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    assert list(Checkpoint.open("me/tiny")) == ["a"]
    name, options = calls[0]
    assert name == "me/tiny" and not any(".bin" in p for p in options["allow_patterns"])
    with pytest.raises(InputRefused, match=r"'me/gone' is neither.*\(ConnectionError: no route\); check the path"):
        Checkpoint.open("me/gone", allow_pickle=True)
    assert "pytorch_model*.bin" in calls[1][1]["allow_patterns"]
