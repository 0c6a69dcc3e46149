"""Reading tensors of an opened checkpoint: only the bytes asked for, or an error that says what became of the file."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from theseus_transport.errors import InputRefused, ReadFailed
from theseus_transport.files.checkpoint import Checkpoint, check_finite, count_nonfinite


def write_shards(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """A checkpoint of one shard a tensor."""
    weight_map = {name: f"model-{i:05}-of-{len(tensors):05}.safetensors" for i, name in enumerate(tensors, start=1)}
    for name, file in weight_map.items():
        save_file({name: tensors[name]}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("change", ["cut short", "touched", "rewritten", "gone"])
def test_reading_after_the_file_changed(tmp_path: Path, change: str, suffix: str) -> None:
    path = tmp_path / ("model.safetensors" if suffix == "safetensors" else "pytorch_model.bin")
    state = {"w": torch.arange(100.0), "x": torch.ones(100, 2)}
    (save_file if suffix == "safetensors" else torch.save)(state, path)
    opened = Checkpoint.open(tmp_path, allow_pickle=True)
    assert opened["x"].sum() == 200
    size, time = path.stat().st_size, path.stat().st_mtime_ns
    if change == "cut short":
        os.truncate(path, size - 500)
    elif change == "touched":
        os.utime(path, ns=(time, time + 1))
    elif change == "rewritten":  # another file under the old name, of the same size
        path.unlink()
        path.write_bytes(bytes(size))
        os.utime(path, ns=(time, time + 1))
    else:
        path.unlink()
    words = {"cut short": rf"now {size - 500} bytes|has {size - 500} bytes and had {size}", "gone": "No such file"}
    for read in (lambda: opened["x"], lambda: opened.rows("x", slice(90, 100))):
        with pytest.raises(ReadFailed, match=words.get(change, "the file changed")) as failure:
            read()
        assert str(path) in str(failure.value) and "'x'" in str(failure.value) and "--resume" in str(failure.value)
        assert failure.value.exit_code == 4


def test_a_shard_cut_short_says_how_far_it_got(tmp_path: Path) -> None:
    write_shards(tmp_path, {"a": torch.arange(4.0), "b": torch.ones(2, 3, dtype=torch.bfloat16)})
    opened, path = Checkpoint.open(tmp_path), tmp_path / "model-00002-of-00002.safetensors"
    os.truncate(path, path.stat().st_size - 7)
    with pytest.raises(ReadFailed, match=r"00002-of-00002.safetensors: 'b' cannot be read any more: 5 of 12 bytes"):
        opened["b"]
    assert torch.equal(opened["a"], torch.arange(4.0)), "the other shard is whole"


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("shape, dtype", [((40, 3), torch.bfloat16), ((40, 2, 3), torch.float64), ((40,), torch.uint8),
                                          ((40, 0), torch.float32)])  # fmt: skip
def test_rows_read_only_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], dtype: torch.dtype, suffix: str
) -> None:
    whole = torch.randint(0, 200, shape).to(dtype)
    state = {"first": torch.ones(5), "w": whole, "last": torch.ones(5)}
    if suffix == "bin":
        torch.save(state, tmp_path / "pytorch_model.bin")
    else:
        save_file(state, tmp_path / "model.safetensors")
        piecewise(monkeypatch, 5)
    opened, row = Checkpoint.open(tmp_path, allow_pickle=True), whole[0].nbytes
    for span in (slice(0, 40), slice(3, 17), slice(None, 1), slice(39, None), slice(7, 7), slice(9, 4), slice(-2, 99)):
        before = opened.bytes_read
        rows = opened.rows("w", span)
        assert torch.equal(rows, whole[span]) and rows.dtype == dtype
        assert opened.bytes_read - before == len(whole[span]) * row
    for index in ([], [0], [39], [0, 1, 2, 7, 8, 20, 39], list(range(40))):
        before = opened.bytes_read
        taken = opened.take("w", torch.tensor(index, dtype=torch.int64))
        assert torch.equal(taken, whole[index]) and taken.dtype == dtype
        assert opened.bytes_read - before == len(index) * row
    with pytest.raises(ValueError, match="steps of 2"):
        opened.rows("w", slice(0, 8, 2))
    for wrong in ([-1], [40], [1, 1], [2, 1]):
        with pytest.raises(ValueError, match=r"of w \[40, ...\]: expected ascending, each once"):
            opened.take("w", torch.tensor(wrong))


def piecewise(monkeypatch: pytest.MonkeyPatch, most: int) -> list[int]:
    """Let the system answer reads with at most so many bytes, as it does above 2 GiB; returns the bytes of each."""
    reads, preadv = [], os.preadv

    def read(file: int, into: list[memoryview], offset: int) -> int:
        reads.append(preadv(file, [into[0][:most]], offset))
        return reads[-1]

    monkeypatch.setattr(os, "preadv", read)
    return reads


def test_neighbouring_rows_are_read_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"w": torch.randn(100, 8)}, tmp_path / "model.safetensors")
    opened, reads = Checkpoint.open(tmp_path), piecewise(monkeypatch, 1 << 20)
    opened.take("w", torch.tensor([3, 4, 5, 50, 51, 99]))
    assert reads == [3 * 32, 2 * 32, 32]


def test_reading_leaves_no_file_open_and_nothing_mapped(tmp_path: Path) -> None:
    write_shards(tmp_path, {f"w{i}": torch.ones(3) for i in range(200)})
    opened, before = Checkpoint.open(tmp_path), set(os.listdir("/proc/self/fd"))
    held = [opened[name] for name in opened]
    assert len(held) == 200 and len(set(os.listdir("/proc/self/fd")) - before) <= 1  # the listing itself
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_threads_count_together(tmp_path: Path) -> None:
    save_file({f"w{i}": torch.full((1000,), float(i)) for i in range(50)}, tmp_path / "model.safetensors")
    opened = Checkpoint.open(tmp_path)
    with ThreadPoolExecutor(4) as pool:
        read = list(pool.map(opened.__getitem__, [f"w{i}" for i in range(50)] * 4))
    assert all(tensor.eq(i % 50).all() for i, tensor in enumerate(read)) and opened.bytes_read == 4 * opened.nbytes


def test_check_finite() -> None:
    check_finite("fine", torch.ones(3))
    check_finite("integers", torch.ones(3, dtype=torch.int32))
    check_finite("empty", torch.ones(0))
    bad = torch.zeros(5_000_000, dtype=torch.bfloat16)
    bad[0], bad[-1], bad[-2] = float("nan"), float("inf"), float("-inf")
    with pytest.raises(InputRefused, match=r"layer.w \[1000, 5000\] holds 1 NaN and 2 Inf of 5000000 values"):
        check_finite("layer.w", bad.view(1000, 5000))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_bad_value_anywhere_is_found(dtype: torch.dtype, value: float) -> None:
    """At every place of a short tensor, whole vectors of the processor and their remainders alike."""
    for place in range(67):
        tensor = torch.ones(67, dtype=dtype)
        tensor[place] = value
        assert count_nonfinite(tensor) == ((1, 0) if value != value else (0, 1))
        assert count_nonfinite(tensor[::2]) == ((0, 0) if place % 2 else count_nonfinite(tensor))
