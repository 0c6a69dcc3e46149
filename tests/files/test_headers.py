"""safetensors headers: every lie a file can tell is refused by name, and nothing is allocated on its word."""

import json
import struct
from pathlib import Path

import pytest
from theseus_transport.errors import InputRefused
from theseus_transport.files.checkpoint import Checkpoint
from theseus_transport.files.headers import parse_json, read_header


def raw(path: Path, header: object, data: bytes = b"", *, length: int | None = None) -> Path:
    """A safetensors file with exactly this header, whatever it says."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


GOOD = bytes(8)
HOSTILE_HEADERS = {
    "not JSON": (b"{nonsense", GOOD, "no valid JSON"),
    "not utf-8": (b'{"\xff": 1}', GOOD, "no valid JSON"),
    "deeply nested": (b"[" * 100_000, GOOD, "no valid JSON"),
    "a list": ([1], GOOD, "a JSON list"),
    "a name twice": (b'{"a": 1, "a": 2}', GOOD, "'a' is given twice"),
    "entry no object": ({"a": 3}, GOOD, "must hold exactly"),
    "entry lacks offsets": ({"a": {"dtype": "F32", "shape": [2]}}, GOOD, "must hold exactly"),
    "unknown dtype": ({"a": entry("F33")}, GOOD, "unknown dtype 'F33'"),
    "dtype no text": ({"a": entry(["F32"])}, GOOD, "unknown dtype"),
    "fp8": ({"a": entry("F8_E4M3", (8,))}, GOOD, r"quantised \(F8_E4M3\); dequantise first"),
    "fp4": ({"a": entry("F4", (16,))}, GOOD, r"quantised \(F4\)"),
    "gptq names": ({"q.qweight": entry()}, GOOD, "part of a quantised layer"),
    "negative shape": ({"a": entry(shape=(-1, -2))}, GOOD, "expected integers"),
    "boolean shape": ({"a": entry(shape=(True, 2))}, GOOD, "expected integers"),
    "fractional offsets": ({"a": entry(offsets=(0, 8.0))}, GOOD, "expected integers"),
    "span too wide": ({"a": entry(shape=(1,))}, GOOD, "needs 4 bytes, its offsets span 8"),
    "huge shape": ({"a": entry(shape=(2**40, 2**40))}, GOOD, "needs 4835703278458516698824704 bytes"),
    "huge shape, matching span": ({"a": entry(shape=(2**50,), offsets=(0, 2**52))}, GOOD, "truncated"),
    "huge rank": ({"a": entry(shape=[1] * 1000)}, GOOD, "expected integers"),
    "three offsets": ({"a": entry(offsets=(0, 4, 8))}, GOOD, r"expected \[start, stop\]"),
    "reversed offsets": ({"a": entry(offsets=(8, 0))}, GOOD, "needs 8 bytes, its offsets span -8"),
    "overlap": ({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12), "overlaps the tensor before it"),
    "same bytes twice": ({"a": entry(), "b": entry()}, GOOD, "overlaps"),
    "gap": ({"a": entry(), "b": entry(offsets=(16, 24))}, bytes(24), "leaves a gap"),
    "truncated": ({"a": entry()}, bytes(7), "holds 7 bytes of data, its header describes 8: truncated"),
    "trailing bytes": ({"a": entry()}, bytes(9), "belong to no tensor"),
}  # fmt: skip


@pytest.mark.parametrize("header, data, message", HOSTILE_HEADERS.values(), ids=HOSTILE_HEADERS)
def test_hostile_header(tmp_path: Path, header: object, data: bytes, message: str) -> None:
    raw(tmp_path / "model.safetensors", header, data)
    with pytest.raises(InputRefused, match=message) as refusal:
        Checkpoint.open(tmp_path)
    assert "model.safetensors" in str(refusal.value) and refusal.value.exit_code == 3


@pytest.mark.parametrize("length", [0, 1, 2**63, 2**64 - 1, 100_000_001, 500])
def test_hostile_header_length(tmp_path: Path, length: int) -> None:
    path = raw(tmp_path / "model.safetensors", {"a": entry()}, GOOD, length=length)
    with pytest.raises(InputRefused, match=f"announces a header of {length} bytes"):
        read_header(path)


@pytest.mark.parametrize("content", [b"", b"123", struct.pack("<Q", 2)])
def test_file_too_short(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(InputRefused, match="truncated"):
        Checkpoint.open(tmp_path)


def test_header_order_is_free(tmp_path: Path) -> None:
    header = {
        "__metadata__": {"format": "pt"},
        "b": entry(offsets=(8, 16)),
        "a": entry(),
        "none": entry(shape=(0,), offsets=(8, 8)),
    }
    raw(tmp_path / "model.safetensors", header, struct.pack("<4f", 1, 2, 3, 4))
    assert Checkpoint.open(tmp_path)["b"].tolist() == [3, 4]


@pytest.mark.parametrize("opened, closed", [('{"a":', "}"), ("[", "]")])
def test_depth_is_bounded(opened: str, closed: str) -> None:
    """What shows it, or writes it again, goes down by recursion."""

    def nested(depth: int) -> bytes:
        return ('{"x":' + opened * (depth - 1) + "1" + closed * (depth - 1) + "}").encode()

    assert parse_json(nested(64), Path("here"))
    for depth in (65, 900, 10**5):
        with pytest.raises(InputRefused, match="here holds no valid JSON: (it is nested more than 64|.*recursion)"):
            parse_json(nested(depth), Path("here"))
