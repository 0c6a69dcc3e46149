"""The window over a checkpoint: each tensor read once while held, read ahead on one thread, checked, counted."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from theseus_transport.errors import InputRefused, ReadFailed
from theseus_transport.files.checkpoint import Checkpoint
from theseus_transport.models.tensors import dtype_of, shape_of
from theseus_transport.streaming.window import Window

TENSORS = {f"{b}.{name}": (b + 1) * torch.arange(12.0).view(4, 3) for b in range(3) for name in ("up", "down")}
BLOCK = 2 * 12 * 4  # bytes
FIRST, SECOND, THIRD = ([f"{b}.up", f"{b}.down"] for b in range(3))


@pytest.fixture
def window(tmp_path: Path) -> Window:
    save_file(TENSORS, tmp_path / "model.safetensors")
    return Window(Checkpoint.open(tmp_path))


def test_a_block_is_read_once_while_it_is_held(window: Window) -> None:
    window.hold(FIRST)
    window.hold(FIRST)
    window.prefetch(FIRST)
    for name in FIRST:
        assert torch.equal(window[name], TENSORS[name]) and window[name] is window[name]
        assert torch.equal(window.rows(name, slice(1, 3)), TENSORS[name][1:3])
        assert torch.equal(window.take(name, torch.tensor([0, 3])), TENSORS[name][[0, 3]])
    assert window.bytes_read == window.held_bytes == window.peak_held_bytes == BLOCK
    window.release(FIRST)
    assert window.held_bytes == 0 and torch.equal(window["0.up"], TENSORS["0.up"])
    assert window.bytes_read == BLOCK + BLOCK // 2 and window.held_bytes == 0 and window.peak_held_bytes == BLOCK


def test_a_walk_over_blocks_reads_everything_once(window: Window) -> None:
    """The block loop: never more than a block and the next one, every byte read once."""
    with window:
        for now, after in ((FIRST, SECOND), (SECOND, THIRD), (THIRD, [])):
            window.hold(now)
            window.prefetch(after)
            assert window.held_bytes == BLOCK * (2 if after else 1)
            assert all(torch.equal(window[name], TENSORS[name]) for name in now)
            window.release(now)
    assert window.bytes_read == window.checkpoint.nbytes == 3 * BLOCK
    assert window.peak_held_bytes == 2 * BLOCK and window.held_bytes == 0 and window.seconds_waiting > 0


def test_it_is_the_checkpoint_to_those_who_ask(window: Window) -> None:
    assert set(window) == set(TENSORS) and len(window) == 6 and "0.up" in window and "nope" not in window
    assert shape_of(window, "0.up") == (4, 3) and dtype_of(window, "0.up") is torch.float32
    assert window.folder == window.checkpoint.folder and window.bytes_read == 0
    for read in (lambda: window["nope"], lambda: window.hold(["nope"]), lambda: window.rows("nope", slice(1))):
        with pytest.raises(KeyError, match="nope"):
            read()


def test_pieces_are_read_alone(window: Window) -> None:
    assert torch.equal(window.rows("1.up", slice(1, 3)), TENSORS["1.up"][1:3]) and window.bytes_read == 2 * 12
    assert torch.equal(window.take("1.up", torch.tensor([3])), TENSORS["1.up"][3:]) and window.bytes_read == 3 * 12
    assert window.held_bytes == window.peak_held_bytes == 0


def test_release_spares_what_is_to_be_kept(window: Window) -> None:
    window.hold([*FIRST, *SECOND])
    window.prefetch(THIRD)
    window.release(keep=["1.up"])
    assert window.held_bytes == BLOCK // 2 + BLOCK, "what is on its way is not given up"
    window.release(THIRD, keep=["2.up"])
    assert window.held_bytes == BLOCK
    window.prefetch(["1.up", "2.up"])
    window.hold(["1.up", "2.up"])
    assert window.bytes_read <= 3 * BLOCK, "neither was read again"


class Slow(Checkpoint):
    """A checkpoint whose reads begin when they are let."""

    gate = threading.Event()
    started: list[tuple[str, str]] = []

    def __getitem__(self, name: str) -> torch.Tensor:
        self.started.append((threading.current_thread().name, name))
        assert self.gate.wait(60)
        return super().__getitem__(name)


@pytest.fixture
def slow(tmp_path: Path) -> Window:
    save_file(TENSORS, tmp_path / "model.safetensors")
    Slow.gate, Slow.started = threading.Event(), []
    return Window(Slow.open(tmp_path))


def test_reading_ahead_does_not_hold_up_the_caller(slow: Window) -> None:
    slow.prefetch(SECOND)
    slow.prefetch(SECOND)
    assert slow.held_bytes == BLOCK and slow.bytes_read == 0
    Slow.gate.set()
    slow.hold(SECOND)
    assert torch.equal(slow["1.down"], TENSORS["1.down"]) and slow.bytes_read == BLOCK
    assert [name for _, name in Slow.started] == SECOND, "in the order asked for, each once"
    assert {thread for thread, _ in Slow.started} == {"theseus-reader_0"}
    slow.close()


def test_what_is_let_go_before_it_came_is_not_read(slow: Window) -> None:
    slow.prefetch([*FIRST, *SECOND])
    while not Slow.started:  # the first is being read, the others wait for it
        pass
    threading.Timer(0.05, Slow.gate.set).start()
    slow.close()
    assert [name for _, name in Slow.started] == ["0.up"] and slow.held_bytes == 0
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("theseus-reader")]
    assert torch.equal(slow["0.down"], TENSORS["0.down"]), "a closed window still reads"


def test_errors_surface_where_the_tensor_is_wanted(window: Window) -> None:
    path = window.checkpoint.files[0]
    stat, whole = path.stat(), path.read_bytes()
    os.truncate(path, stat.st_size - 1)
    window.prefetch(THIRD)
    for use in (lambda: window.hold(THIRD), lambda: window["2.down"], lambda: window.rows("2.up", slice(1))):
        with pytest.raises(ReadFailed, match="cannot be read any more"):
            use()
    assert window.held_bytes == 0
    path.write_bytes(whole)  # put back as it was: the next attempt reads it
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    window.hold(THIRD)
    assert torch.equal(window["2.up"], TENSORS["2.up"])
    window.close()


@pytest.mark.parametrize("ahead", [True, False], ids=["ahead", "at once"])
def test_every_read_is_checked(tmp_path: Path, ahead: bool) -> None:
    bad = torch.ones(4, 3)
    bad[2, 1] = float("nan")
    save_file({"good": torch.ones(2), "bad": bad}, tmp_path / "model.safetensors")
    with Window(Checkpoint.open(tmp_path)) as window:
        if ahead:
            window.prefetch(["good", "bad"])
        window.hold(["good"])
        message = rf"bad of {tmp_path} \[\d, 3\] holds 1 NaN and 0 Inf of"
        for read in (lambda: window.hold(["bad"]), lambda: window["bad"], lambda: window.rows("bad", slice(2, 4)),
                     lambda: window.take("bad", torch.tensor([0, 2]))):  # fmt: skip
            with pytest.raises(InputRefused, match=message):
                read()
        assert window.rows("bad", slice(0, 2)).eq(1).all() and window["good"].eq(1).all()


@pytest.mark.parametrize("end", ["del window", "raise KeyboardInterrupt"])
def test_the_interpreter_ends_with_reads_on_their_way(tmp_path: Path, end: str) -> None:
    save_file({f"w{i}": torch.ones(1000) for i in range(200)}, tmp_path / "model.safetensors")
    program = (
        "from theseus_transport.files.checkpoint import Checkpoint\n"
        "from theseus_transport.streaming.window import Window\n"
        f"window = Window(Checkpoint.open({str(tmp_path)!r}))\nwindow.prefetch(list(window))\n{end}\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], timeout=600, capture_output=True, text=True)
    assert ended.returncode == {"raise KeyboardInterrupt": -2}.get(end, 0), ended.stderr
    assert "reader" not in ended.stderr


def test_where_no_thread_can_be_started_nothing_is_read_ahead(
    window: Window, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    with window:
        for block in (FIRST, SECOND):
            window.prefetch(block)
            assert window.held_bytes == window.bytes_read == 0
        window.hold(FIRST)
        assert all(torch.equal(window[name], TENSORS[name]) for name in FIRST) and window.bytes_read == BLOCK
    assert caplog.text.count("weights are not read ahead: can't start new thread") == 1
