"""A corpus of broken and hostile folders: functions that break a good folder in place, by name."""

import json
import os
import socket as sockets
import struct
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

INDEX = "model.safetensors.index.json"
FIRST, SECOND = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
LORA, LORA_CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
Break = Callable[[Path], object]


def checkpoint(folder: Path) -> Path:
    """Two shards under an index, with a config."""
    folder.mkdir()
    tensors = {"a.weight": torch.arange(6.0).view(2, 3), "b.weight": torch.ones(4, dtype=torch.bfloat16)}
    for (name, tensor), file in zip(tensors.items(), (FIRST, SECOND), strict=True):
        save_file({name: tensor}, folder / file, {"format": "pt"})
    weight_map = {"a.weight": FIRST, "b.weight": SECOND}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 32}, "weight_map": weight_map}))
    (folder / "config.json").write_text('{"model_type": "llama", "hidden_size": 3}')
    return folder


def adapter(folder: Path) -> Path:
    """A LoRA of rank 2 on one layer."""
    folder.mkdir()
    save_file({f"{PREFIX}A.weight": torch.ones(2, 3), f"{PREFIX}B.weight": torch.ones(5, 2)}, folder / LORA)
    (folder / LORA_CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    return folder


# --- ways to break ---------------------------------------------------------------------------------------------------


def content(name: str, data: bytes | str) -> Break:
    return lambda folder: (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)


def edit(name: str, **values: object) -> Break:
    """A JSON file with keys set; a list of Python's own literals, so NaN and huge integers too."""
    return lambda folder: (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | values))


def header(text: object, data: bytes = b"", *, name: str = FIRST, length: int | None = None) -> Break:
    """A safetensors file of exactly this header, whatever it says."""
    raw = text if isinstance(text, bytes) else json.dumps(text).encode()
    return content(name, struct.pack("<Q", len(raw) if length is None else length) + raw + data)


def entry(dtype: object = "F32", shape: object = (2, 3), offsets: object = (0, 24), **more: object) -> dict:
    return {"a.weight": {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}}


def cut(name: str, size: int) -> Break:
    return lambda folder: os.truncate(folder / name, size)


def link(name: str, to: str) -> Break:
    def make(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(to)

    return make


def placed(file: object, **more: object) -> Break:
    return edit(INDEX, weight_map={"a.weight": file, "b.weight": SECOND, **more})


def replaced(name: str, make: Break) -> Break:
    def run(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return run


def socket(path: Path) -> None:
    """A socket of this name, which is longer than names of sockets may be."""
    here = os.getcwd()
    os.chdir(path.parent)
    try:
        with sockets.socket(sockets.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


def stored(name: str, **tensors: torch.Tensor) -> Break:
    return lambda folder: save_file({key.replace("__", "."): value for key, value in tensors.items()}, folder / name)


def factor(part: str, value: torch.Tensor) -> Break:
    other = {"A": torch.ones(2, 3), "B": torch.ones(5, 2)} | {part: value}
    return lambda folder: save_file({f"{PREFIX}{key}.weight": t for key, t in other.items()}, folder / LORA)


DATA, HUGE, ONES = bytes(24), 10**400, torch.ones
DEEP = {"brackets": "[" * 10**5, "objects": '{"a":' * 10**5, "closed": '{"a": ' + "[" * 10**4 + "]" * 10**4 + "}"}
JSON = {
    "empty": "", "one brace": "{", "a list": "[]", "a number": "1", "null": "null", "two objects": "{}{}",
    "bytes": b"\xff\xfe\x00",
    "half a character": b'{"\xe2\x82": 1}', "zeros": bytes(100), "trailing comma": '{"a": 1,}',
    "twice": '{"a": 1, "a": 2}', "twice inside": '{"a": {"b": 1, "b": 1}}',
    "an endless number": '{"a": 1' + "0" * 5000 + "}",
    "a large number": '{"a": 1' + "0" * 400 + "}", "lone surrogate": b'{"\xed\xa0\x80": 1}', **DEEP,
}  # fmt: skip
CHECKPOINTS: dict[str, Break] = {
    **{f"{name}: {what}": content(name, text) for name in (INDEX, "config.json") for what, text in JSON.items()},
    **{f"header: {what}": header(text if isinstance(text, bytes) else text.encode()) for what, text in JSON.items()},
    # the frame of a safetensors file
    **{f"length {length}": header(entry(), DATA, length=length) for length in (0, 1, 10**6, 2**31, 2**63, 2**64 - 1)},
    **{f"cut to {size}": cut(FIRST, size) for size in (0, 1, 7, 8, 9, 60)},
    "cut by one": lambda folder: os.truncate(folder / FIRST, (folder / FIRST).stat().st_size - 1),
    "one byte more": lambda folder: (folder / FIRST).write_bytes((folder / FIRST).read_bytes() + b"\0"),
    "a terabyte of nothing": cut(FIRST, 2**40),
    "a pickle": lambda folder: torch.save({"a.weight": ONES(2, 3)}, folder / FIRST),
    "a web page": content(FIRST, "<!DOCTYPE html><html><body>404</body></html>"),
    "a pointer to the file": content(FIRST, "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 24\n"),
    # one entry
    **{f"dtype {code!r}": header(entry(code), DATA) for code in ("f32", "F33", "", None, 4, True, ["F32"],
        "F" * 10**4)},
    **{f"quantised {code}": header(entry(code), DATA) for code in ("F8_E4M3", "F8_E5M2", "F4", "F6_E2M3")},
    "wrong dtype": header(entry("F64"), DATA),
    **{f"shape {str(shape)[:20]}": header(entry(shape=shape), DATA) for shape in (
        (-2, -3), (2, -3), (True, 6), (6.0,), ("6",), (None,), [[2, 3]], 6, "23", None, {}, (7,), (), (0,),
        (1,) * 10**4,
        (2**63, 0), (HUGE,), (2**31, 2**31, 2**31), (2**62, 4), float("nan"))},
    **{f"offsets {str(offsets)[:20]}": header(entry(offsets=offsets), DATA) for offsets in (
        (0, 23), (0, 25), (1, 25), (24, 0), (-24, 0), (0,), (0, 12, 24), (0.0, 24.0), (False, 24), ("0", "24"), None,
        24, {},
        (0, HUGE), (2**63, 2**63 + 24), float("inf"))},
    "an unknown key": header(entry(more=1), DATA),
    "no entry": header({"a.weight": {}}, DATA),
    "an entry of text": header({"a.weight": "F32"}, DATA),
    "large for nothing": header(entry(shape=(0, 2**62, 2**62), offsets=(0, 0))),
    "unspeakable name": header({"\ud800": entry()["a.weight"]}, DATA),
    # entries together
    "overlap": header({**entry(), "c": entry(offsets=(12, 36))["a.weight"]}, bytes(36)),
    "the same bytes": header({**entry(), "c": entry()["a.weight"]}, DATA),
    "a gap": header({**entry(), "c": entry(offsets=(28, 52))["a.weight"]}, bytes(52)),
    "the name twice": header(b'{"a.weight":%s,"a.weight":%s}' % ((json.dumps(entry()["a.weight"]).encode(),) * 2),
        DATA),
    "only metadata": header({"__metadata__": {"format": "pt"}}),
    "an unplaced tensor": header({**entry(), "c": entry(shape=(0,), offsets=(24, 24))["a.weight"]}, DATA),
    "a part of a quantised layer": header({"a.qweight": entry()["a.weight"]}, DATA),
    # the index
    **{f"placed {str(file)[:30]!r}": placed(file) for file in (
        "/etc/passwd.safetensors", "../model.safetensors", f"x/../../{FIRST}", f"..\\{FIRST}", f"C:\\{FIRST}",
        "\0.safetensors",
        f"~/{FIRST}x", "", ".", "..", "sub/", "absent.safetensors", "config.json", INDEX, "x.bin", "\ud800.safetensors",
        "x" * 5000 + ".safetensors", "x/" * 3000 + FIRST, SECOND, None, 1, True, [FIRST], {"file": FIRST},
        "file:///etc/passwd")},
    "a tensor too many": placed(FIRST, c=FIRST),
    "a shard too many": placed(FIRST, c="model-00003-of-00002.safetensors"),
    **{f"weight map {text}": edit(INDEX, weight_map=json.loads(text)) for text in ("null", "[]", "{}", '"x"', "1",
        "true")},
    "no weight map": content(INDEX, '{"metadata": {}}'),
    # files that are something else
    "vanished shard": lambda folder: (folder / SECOND).unlink(),
    **{f"{name} is a folder": replaced(name, Path.mkdir) for name in (FIRST, INDEX, "config.json")},
    **{f"{name} is a pipe": replaced(name, os.mkfifo) for name in (FIRST, INDEX, "config.json")},
    **{f"{name} is a socket": replaced(name, socket) for name in (FIRST, INDEX, "config.json")},
    **{f"{name} links {to}": link(name, to) for name in (FIRST, INDEX, "config.json") for to in (
        "../elsewhere", "../elsewhere/config.json", "/dev/zero", "/dev/null", "/dev/stdin", "/proc/self/environ",
        "/etc/passwd", name, "absent", "..", "x" * 300)},
    "no files": lambda folder: [path.unlink() for path in folder.iterdir()],
    # values
    **{f"holds {value}": stored(FIRST, a__weight=torch.full((2, 3), value)) for value in (torch.nan, torch.inf,
        -torch.inf)},
    "holds integers": stored(FIRST, a__weight=torch.ones(2, 3, dtype=torch.int32)),
    # settings
    **{f"quantised: {value}": edit("config.json", quantization_config=value) for value in (
        {"quant_method": "gptq"}, {"quant_method": None, "load_in_4bit": True}, {"quant_method": ["x"] * 10**4},
        "awq", [1], 1)},
    "quantised within": edit("config.json", text_config={"quantization_config": {"bits": 4}}),
}  # fmt: skip
ADAPTERS: dict[str, Break] = {
    **{f"{LORA_CONFIG}: {what}": content(LORA_CONFIG, text) for what, text in JSON.items()},
    **{f"{LORA}: {what}": header(text if isinstance(text, bytes) else text.encode(), name=LORA) for what,
        text in JSON.items()},
    **{f"{key} is {str(value)[:20]!r}": edit(LORA_CONFIG, **{key: value}) for key in ("r", "lora_alpha") for value in (
        0, -1, True, None, "2", [2], {}, float("nan"), float("inf"), HUGE)},
    **{f"r is {value}": edit(LORA_CONFIG, r=value) for value in (1, 3, 10**9)},
    **{f"{key} is {str(value)[:30]!r}": edit(LORA_CONFIG, **{key: value}) for key in ("rank_pattern",
        "alpha_pattern") for value in (
        [1], "q_proj", 1, {"q_proj": 0}, {"q_proj": "2"}, {"q_proj": True}, {"(": 2}, {"q_proj": HUGE},
        {"q_proj": -1})},
    **{f"{key} {value!r}": edit(LORA_CONFIG, **{key: value}) for key, value in (
        ("peft_type", "IA3"), ("peft_type", None), ("peft_type", ["LORA"]), ("use_dora", True), ("bias", "all"),
        ("bias", 1),
        ("init_lora_weights", "pissa"), ("init_lora_weights", "olora"))},
    "no config": lambda folder: (folder / LORA_CONFIG).unlink(),
    "no weights": lambda folder: (folder / LORA).unlink(),
    **{f"{name} links {to}": link(name, to) for name in (LORA, LORA_CONFIG) for to in ("/etc/passwd", "/dev/zero")},
    **{f"{name} is a pipe": replaced(name, os.mkfifo) for name in (LORA, LORA_CONFIG)},
    **{f"{name} is a socket": replaced(name, socket) for name in (LORA, LORA_CONFIG)},
    "weights link to themselves": link(LORA, LORA),
    "a model beside it": stored("model.safetensors", a=ONES(1)),
    "A alone": stored(LORA, **{f"{PREFIX}A.weight": ONES(2, 3)}),
    "a convolution's": stored(LORA, **{f"{PREFIX}embedding_A": ONES(2, 3)}),
    **{f"{part} is {list(value.shape)} {value.dtype} {value.sum()}": factor(part, value) for part, value in (
        ("A", ONES(3, 3)), ("A", ONES(2)), ("A", ONES(0, 3)), ("A", ONES(2, 3, 1, 1)), ("B", ONES(5, 3)), ("B",
        ONES(5, 0)),
        ("B", ONES(5, 2) * torch.nan), ("A", ONES(2, 3, dtype=torch.int8)), ("A", ONES(2, 3) * torch.inf))},
}  # fmt: skip
