"""Broken and hostile folders: each is refused by name, in little memory and without hanging, or read whole."""

import faulthandler
import os
import random
import shutil
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from helpers.hostile_folders import (
    ADAPTERS,
    CHECKPOINTS,
    FIRST,
    INDEX,
    LORA,
    LORA_CONFIG,
    SECOND,
    Break,
    adapter,
    checkpoint,
)
from theseus_transport import Delta
from theseus_transport.errors import InputRefused, ReadFailed
from theseus_transport.files.checkpoint import Checkpoint
from theseus_transport.jobs.checks import check_dtypes, check_values
from theseus_transport.models.text_families import LLAMA
from theseus_transport.updates.adapter import Adapter

MEMORY = 1 << 23  # bytes of Python objects a refusal may need; all files but two of 200 KB are below 10 KB
HANG = 120  # seconds after which a hanging reader dies with a traceback; nothing here should take one


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    faulthandler.dump_traceback_later(HANG, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


def read(folder: Path) -> dict[str, torch.Tensor]:
    """Everything the command reads of a folder: headers, settings, every tensor, hashes."""
    opened = Checkpoint.open(folder)
    assert opened.nbytes < 1000 and "Checkpoint" in repr(opened)
    held = {name: opened[name] for name in opened}
    check_dtypes(opened)
    check_values(opened)
    opened.fingerprint(full=True), opened.header_hash()
    if opened.kind == "adapter":
        lora = Adapter.of(opened)
        Delta({}, adapter=lora).tuned_tensors(LLAMA)  # refuses what factors do not carry
        assert all(abs(lora.factors(layer).scaling) < float("inf") for layer in lora.layers()) and lora.whole() == {}
    assert all(held[name].shape == opened.shapes[name] and held[name].dtype is opened.dtypes[name] for name in held)
    return held


CASES = [
    pytest.param(make, break_, id=name)
    for make, cases in ((checkpoint, CHECKPOINTS), (adapter, ADAPTERS))
    for name, break_ in cases.items()
]


def attempt(folder: Path) -> str:
    """The refusal's text, or "" where everything was read; any other exception is a failure."""
    try:
        read(folder)
    except InputRefused as refusal:
        text = str(refusal)
        named = str(folder) in text or "adapter" in text or "lora_" in text  # an adapter's refusal may name its key
        assert named, f"names no file: {text}"
        assert len(text) < 20_000 and text.encode() and refusal.exit_code == 3
        return text
    return ""


@pytest.mark.parametrize("make", [checkpoint, adapter])
def test_the_good_folders_are_read(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    assert attempt(make(tmp_path / "model")) == ""


@pytest.mark.parametrize("make, break_", CASES)
def test_broken_folder(tmp_path: Path, make: Callable[[Path], Path], break_: Break) -> None:
    checkpoint(tmp_path / "elsewhere")
    folder = make(tmp_path / "model")
    break_(folder)
    tracemalloc.start()
    try:
        assert attempt(folder), "was read as if nothing were wrong"
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < MEMORY, f"{peak} bytes"


@pytest.mark.parametrize("make, name", [(checkpoint, FIRST), (checkpoint, INDEX), (checkpoint, "config.json"),
                                        (adapter, LORA), (adapter, LORA_CONFIG)])  # fmt: skip
def test_every_cut_and_many_changed_bytes(tmp_path: Path, make: Callable[[Path], Path], name: str) -> None:
    """Cut anywhere it is refused; with a byte or two changed it is refused, or says something else in the same form."""
    folder = make(tmp_path / "model")
    whole, generator, refused = (folder / name).read_bytes(), random.Random(0), 0
    for size in range(len(whole)):
        (folder / name).write_bytes(whole[:size])
        assert attempt(folder), size
    for _ in range(300):
        changed = bytearray(whole)
        for _ in range(generator.choice((1, 1, 2))):
            changed[generator.randrange(len(whole))] = generator.choice((0, 0x22, 0x2C, 0x30, 0x39, 0x5D, 0x7D, 0xFF))
        (folder / name).write_bytes(changed)
        refused += bool(attempt(folder))
    assert refused > 50


def test_what_vanishes_after_opening_is_refused_by_name(tmp_path: Path) -> None:
    for break_ in (Path.unlink, lambda path: os.truncate(path, 10), lambda path: path.write_bytes(b"")):
        folder = checkpoint(tmp_path / "model")
        opened = Checkpoint.open(folder)
        break_(folder / SECOND)
        with pytest.raises(ReadFailed, match=f"{SECOND}: .*b.weight.*restore the file"):
            opened["b.weight"]
        for use in (opened.fingerprint, opened.header_hash):
            with pytest.raises(InputRefused, match=SECOND):
                use()
        assert opened["a.weight"].sum() == 15, "the other shard is still read"
        shutil.rmtree(folder)


def test_what_the_system_forbids_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A root user may read everything, so the system's answer is put in by hand."""
    folder, opens = checkpoint(tmp_path / "model"), Path.open

    def forbid(path: Path, *args: object, **options: object) -> object:
        if path.name == SECOND:
            raise PermissionError(13, "Permission denied", str(path))
        return opens(path, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "open", forbid)
    with pytest.raises(InputRefused, match=f"{SECOND}.*Permission denied"):
        Checkpoint.open(folder)
