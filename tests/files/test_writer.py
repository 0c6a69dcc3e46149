"""The writer: what it writes is whole and loads elsewhere, or it is not there at all."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from theseus_transport.errors import InputRefused
from theseus_transport.files.checkpoint import Checkpoint
from theseus_transport.files.result_folder import differences as verify
from theseus_transport.files.result_folder import read_manifest
from theseus_transport.files.writer import Output, Planned, planned_bytes, write_checkpoint, write_checkpoints


def plan(tensors: dict[str, torch.Tensor]) -> list[Planned]:
    return [Planned(n, t.shape, t.dtype, lambda rows, t=t: t if rows is None else t[rows]) for n, t in tensors.items()]


def some_tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "half": torch.randn(3, 5).bfloat16(),  # an odd number of 2-byte values, then wider ones
        "wide": torch.randn(7, dtype=torch.float64),
        "turned": torch.randn(4, 6).T,
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 4),
        "flags": torch.tensor([True, False, True]),
        "complex": torch.randn(2, dtype=torch.complex64).conj(),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }


def same(found: Checkpoint, tensors: dict[str, torch.Tensor]) -> bool:
    return list(sorted(found)) == sorted(tensors) and all(
        torch.equal(found[n], t) and found[n].dtype is t.dtype for n, t in tensors.items()
    )


def listing(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def failing(error: BaseException) -> list[Planned]:
    def fail(rows: slice | None) -> torch.Tensor:
        raise error

    return [*plan({"fine": torch.ones(100)}), Planned("bad", (3,), torch.float32, fail)]


def test_round_trip_in_one_file(tmp_path: Path) -> None:
    tensors, extra = some_tensors(), tmp_path / "tokenizer.json"
    extra.write_text("{}")
    files = {"config.json": '{"model_type": "llama"}', "README.md": b"# hello", "tokenizer.json": extra}
    manifest = write_checkpoint(tmp_path / "out", plan(tensors), files=files, metadata={"recipe": "coherent"})
    assert listing(tmp_path / "out") == {"model.safetensors", *files, "theseus.json"}
    assert same(Checkpoint.open(tmp_path / "out"), tensors)
    loaded = load_file(tmp_path / "out/model.safetensors")
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    assert all(loaded[name].data_ptr() % loaded[name].dtype.itemsize == 0 for name in tensors), "aligned"
    assert manifest == read_manifest(tmp_path / "out") and manifest["metadata"] == {"recipe": "coherent"}
    assert verify(tmp_path / "out") == [] and listing(tmp_path) == {"out", "tokenizer.json"}


@pytest.mark.parametrize("shard_size, shards", [(10**9, 1), (8 * 3, 3), (8 * 2, 4), (1, 6)])
def test_shards_are_planned(tmp_path: Path, shard_size: int, shards: int) -> None:
    tensors = {f"t{i}": torch.full((size,), float(i), dtype=torch.float64) for i, size in enumerate((1, 1, 1, 4, 1, 1))}
    write_checkpoint(tmp_path / "out", plan(tensors), shard_size=shard_size)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) == shards and same(Checkpoint.open(tmp_path / "out"), tensors)
    if shards > 1:
        assert files[0].name == f"model-00001-of-{shards:05}.safetensors"
        index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == 9 * 8 == planned_bytes(plan(tensors))
    assert all(sum(t.nbytes for t in load_file(f).values()) <= max(shard_size, 32) for f in files)


def test_one_tensor_is_held_at_a_time(tmp_path: Path) -> None:
    import weakref

    alive: list[weakref.ref] = []

    def make(rows: slice | None) -> torch.Tensor:
        assert not any(ref() is not None for ref in alive), "the tensor before is still held"
        made = torch.ones(10)
        alive.append(weakref.ref(made))
        return made

    write_checkpoint(tmp_path / "out", [Planned(f"t{i}", (10,), torch.float32, make) for i in range(5)], shard_size=80)
    assert len(alive) == 5


def test_tiles_are_made_one_by_one_for_all_folders(tmp_path: Path) -> None:
    whole, asked = {"a": torch.randn(5, 3, 2).half(), "b": torch.randn(2)}, []

    def tiles(folder: str) -> list[Planned]:
        def make(rows: slice | None) -> torch.Tensor:
            asked.append((folder, rows))
            return whole["a"][rows]

        a, b = plan(whole)
        return [a._replace(make=make, tiles=(slice(0, 2), slice(2, 3), slice(3, 5))), b]

    write_checkpoints([Output(tmp_path / name, tiles(name)) for name in ("one", "two")])
    write_checkpoint(tmp_path / "whole", plan(whole))
    bytes_of = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "one", "two")]
    assert bytes_of == bytes_of[:1] * 3, "tiles change no byte"
    assert asked == [(name, slice(*rows)) for rows in ((0, 2), (2, 3), (3, 5)) for name in ("one", "two")]
    with pytest.raises(ValueError, match="hold different tensors"):
        write_checkpoints([Output(tmp_path / "x", tiles("x")), Output(tmp_path / "y", plan(whole))])


def test_adapter_is_one_file(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(10), "b": torch.ones(10)}
    write_checkpoint(
        tmp_path / "out", plan(tensors), stem="adapter_model", shard_size=1, files={"adapter_config.json": "{}"}
    )
    assert Checkpoint.open(tmp_path / "out").kind == "adapter" and same(Checkpoint.open(tmp_path / "out"), tensors)


def test_transformers_loads_it(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=17, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2)
    model = LlamaForCausalLM(config)
    files = {"config.json": json.dumps(config.to_dict() | {"architectures": ["LlamaForCausalLM"]})}
    for name, size in (("one", 10**9), ("many", 500)):
        write_checkpoint(tmp_path / name, plan(model.state_dict()), files=files, shard_size=size)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 5


def test_checkpoint_to_checkpoint(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a", plan(some_tensors()))
    opened = Checkpoint.open(tmp_path / "a")
    entries = [Planned(n, opened.shapes[n], opened.dtypes[n], lambda _, n=n: opened[n]) for n in opened]
    write_checkpoint(tmp_path / "b", entries, inputs=[tmp_path / "a"])
    assert same(Checkpoint.open(tmp_path / "b"), some_tensors())


def tiled(*tiles: tuple[int, int]) -> Planned:
    return Planned("a", (6,), torch.float32, lambda rows: torch.ones(6)[rows], tuple(slice(*tile) for tile in tiles))


BAD_PLANS = {
    "nothing": ([], {}, "no tensor"),
    "a name twice": (plan({"a": torch.ones(1)}) * 2, {}, "'a' is planned twice"),
    "reserved": (plan({"__metadata__": torch.ones(1)}), {}, "reserved"),
    "fp8": ([Planned("a", (1,), torch.float8_e4m3fn, None)], {}, "hold no torch.float8_e4m3fn"),
    "rows left out": ([tiled((0, 2), (2, 5))], {}, r"a \[6\]: .* are not all its rows, in order"),
    "rows beyond": ([tiled((0, 2), (2, 7))], {}, "are not all its rows"),
    "rows twice": ([tiled((0, 4), (2, 6))], {}, "are not all its rows"),
    "rows backwards": ([tiled((0, 8), (8, 6))], {}, "are not all its rows"),
    "file in place of weights": (plan({"a": torch.ones(1)}), {"model.safetensors": b""}, "must be a plain name"),
    "file in place of the manifest": (plan({"a": torch.ones(1)}), {"theseus.json": b""}, "must be a plain name"),
    **{f"file {name!r}": (plan({"a": torch.ones(1)}), {name: b""}, "must be a plain name")
       for name in ("../x", "x/..", "/x", "x/", "a/b/c", "", ".", "..", "./x")},
}  # fmt: skip


@pytest.mark.parametrize("entries, files, message", BAD_PLANS.values(), ids=BAD_PLANS)
def test_bad_plans_are_seen_before_any_work(tmp_path: Path, entries: list, files: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_checkpoint(tmp_path / "out", entries, files=files)
    with pytest.raises(TypeError):
        write_checkpoint(tmp_path / "out", failing(AssertionError()), metadata={"x": object()})
    with pytest.raises(InputRefused, match="missing or not a regular file"):
        write_checkpoint(tmp_path / "out", failing(AssertionError()), files={"x": tmp_path / "absent"})
    assert listing(tmp_path) == set()


def test_verify_reports_each_difference(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_checkpoint(out, plan({"a": torch.ones(50), "b": torch.ones(50)}), shard_size=1, files={"config.json": "{}"})
    first, second = sorted(out.glob("*.safetensors"))
    data = bytearray(first.read_bytes())
    data[-3] ^= 1
    first.write_bytes(data)
    second.write_bytes(second.read_bytes()[:-1])
    (out / "config.json").unlink()
    (out / "stranger").write_text("")
    faults = verify(out)
    assert len(faults) == 4
    for name, words in ((first.name, "BLAKE2b"), (second.name, "bytes, the manifest says"), ("config.json", "missing"),
                        ("stranger", "not in the manifest")):  # fmt: skip
        assert any(name in fault and words in fault for fault in faults)


def test_manifest_is_hostile_too(tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match="theseus.json is missing"):
        read_manifest(tmp_path)
    (tmp_path / "theseus.json").write_text('{"files": {"../../etc/passwd": {"size": 1}}}')
    assert "leads out of the folder" in verify(tmp_path)[0]
    (tmp_path / "theseus.json").write_text('{"files": []}')
    with pytest.raises(InputRefused, match="lists no files"):
        verify(tmp_path)
