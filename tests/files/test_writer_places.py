"""Where a checkpoint is written: failures and kills leave the old folder or none, and nothing else is overwritten."""

import errno
import os
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers.forked import started
from test_writer import failing, listing, plan, same, some_tensors
from theseus_transport.errors import InputRefused, NumericalError, ResourceError
from theseus_transport.files import result_folder as folder
from theseus_transport.files.checkpoint import Checkpoint
from theseus_transport.files.result_folder import check_writable
from theseus_transport.files.result_folder import differences as verify
from theseus_transport.files.writer import Planned, write_checkpoint


def made(tensor: torch.Tensor, *stops: int) -> Planned:
    """A tensor, or tile, of another kind than planned."""
    tiles = tuple(slice(start, stop) for start, stop in zip((0, *stops), stops, strict=False))
    return Planned("s", (stops[-1] if stops else 3,), torch.float32, lambda rows: tensor, tiles)


FAILURES = {
    "exception": (failing(RuntimeError("boom")), RuntimeError, "boom"),
    "interrupt": (failing(KeyboardInterrupt()), KeyboardInterrupt, None),
    "disk full": (failing(OSError(errno.ENOSPC, "No space left")), ResourceError, "disk full, 412 bytes of tensors"),
    "NaN": (plan({"ok": torch.ones(3), "q": torch.tensor([float("nan")])}), NumericalError, r"q \[1\].*1 NaN and 0"),
    "Inf": (plan({"q": torch.tensor([float("inf")] * 2).half()}), NumericalError, "0 NaN and 2 Inf in torch.float16"),
    "other shape": ([made(torch.ones(4))], ValueError, r"s \[3\] came out as \[4\] torch.float32, planned were \[3\]"),
    "other dtype": ([made(torch.ones(3).half())], ValueError, "torch.float16, planned"),
    "other rows": ([made(torch.ones(2), 2, 3)], ValueError, r"s \[3\], rows 2 to 2, came out as \[2\]"),
    "NaN in a tile": ([made(torch.full((2,), torch.nan), 2, 4)], NumericalError, r"s \[4\], rows 0 to 1, .* 2 NaN"),
}  # fmt: skip


@pytest.mark.parametrize("entries, error, message", FAILURES.values(), ids=FAILURES)
@pytest.mark.parametrize("old", [False, True], ids=["absent", "old"])
def test_failure_leaves_nothing(tmp_path: Path, entries: list, error: type, message: str, old: bool) -> None:
    if old:
        write_checkpoint(tmp_path / "out", plan(some_tensors()))
    with pytest.raises(error, match=message):
        write_checkpoint(tmp_path / "out", entries, overwrite=old, shard_size=100)
    assert listing(tmp_path) == ({"out"} if old else set())
    assert not old or (verify(tmp_path / "out") == [] and same(Checkpoint.open(tmp_path / "out"), some_tensors()))


@pytest.mark.parametrize("step", [1, 2])
def test_failure_of_a_rename_restores_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    write_checkpoint(tmp_path / "out", plan(some_tensors()))
    calls, rename = [], os.rename

    def flaky(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == step:
            raise OSError(errno.EIO, "disk on fire")
        rename(source, target)

    monkeypatch.setattr(folder.os, "rename", flaky)
    with pytest.raises(OSError, match="disk on fire"):
        write_checkpoint(tmp_path / "out", plan({"new": torch.ones(1)}), overwrite=True)
    assert listing(tmp_path) == {"out"} and same(Checkpoint.open(tmp_path / "out"), some_tensors())


def write_slowly(*folders: Path) -> None:
    """In a thread each, to which nothing comes behind the first tensor."""

    def slow(rows: slice | None) -> torch.Tensor:
        (folders[0].parent / f"writing-{threading.get_ident()}").touch()
        time.sleep(60)
        raise AssertionError("not killed")

    one = Planned("a", (3,), torch.float32, lambda rows: torch.ones(3))
    planned = [one, Planned("b", (3,), torch.float32, slow)]
    writes = [partial(write_checkpoint, folder, planned, shard_size=1, overwrite=True) for folder in folders]
    threads = [threading.Thread(target=write) for write in writes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_sigkill_leaves_the_target_absent_or_old(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_checkpoint(tmp_path / "old", plan(some_tensors()))
    child = started(write_slowly, tmp_path / "old", tmp_path / "new")
    while len(found := [*tmp_path.glob("writing-*")]) < 2:
        assert child.is_alive()
        time.sleep(0.01)
    child.kill()
    child.join()
    for path in found:
        path.unlink()
    left = sorted(listing(tmp_path) - {"old"})  # SIGKILL cannot be caught: hidden folders stay, and are named later
    assert [name.rpartition("-")[0] for name in left] == [".new.tmp", ".old.tmp"]
    assert verify(tmp_path / "old") == [] and same(Checkpoint.open(tmp_path / "old"), some_tensors())
    for name, hidden in (("new", left[0]), ("old", left[1])):
        write_checkpoint(tmp_path / name, plan({"x": torch.ones(1)}), overwrite=True)
        assert hidden in caplog.text and list(Checkpoint.open(tmp_path / name)) == ["x"]


def test_overwrite_replaces_everything(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "out", plan(some_tensors()), shard_size=1, files={"old.txt": "old"})
    with pytest.raises(InputRefused, match="is not empty; name another folder, or --overwrite"):
        write_checkpoint(tmp_path / "out", plan({"new": torch.ones(1)}))
    assert verify(tmp_path / "out") == []
    write_checkpoint(tmp_path / "out", plan({"new": torch.ones(1)}), overwrite=True)
    assert listing(tmp_path / "out") == {"model.safetensors", "theseus.json"} and listing(tmp_path) == {"out"}


def test_overwrite_spares_what_it_did_not_write(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputRefused, match="holds no theseus.json, so it is not ours to replace"):
        write_checkpoint(tmp_path, plan({"new": torch.ones(1)}), overwrite=True)
    assert listing(tmp_path) == {"thesis.tex"}


def test_targets(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("empty", "new/deep/er"):
        write_checkpoint(tmp_path / name, plan({"a": torch.ones(1)}))
        assert verify(tmp_path / name) == []
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    write_checkpoint(tmp_path / "link", plan({"a": torch.ones(1)}))
    assert (tmp_path / "link").is_symlink() and verify(tmp_path / "real") == []
    mode = (tmp_path / "new").stat().st_mode
    assert (tmp_path / "empty").stat().st_mode == mode, "readable to whom a plain mkdir makes it readable"


def test_never_over_an_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "models/a"
    write_checkpoint(model, plan({"a": torch.ones(1)}))
    monkeypatch.chdir(tmp_path / "models")
    for output in (model, model / "out", tmp_path / "models", tmp_path, "a", "../models/a/x"):
        for inputs in ([model], [tmp_path / "elsewhere", model / "model.safetensors", model]):
            with pytest.raises(InputRefused, match="overlaps the input"):
                check_writable(output, 0, overwrite=True, inputs=inputs)
    (tmp_path / "alias").symlink_to(model)
    with pytest.raises(InputRefused, match="overlaps the input"):
        check_writable(tmp_path / "alias" / "out", 0, inputs=[model])
    check_writable(tmp_path / "models/b", 0, inputs=[model])
    for output in ("/", Path.home(), Path.home().parent, ".", ".."):
        with pytest.raises(InputRefused, match="home or working directory"):
            check_writable(output, 0, overwrite=True)


def test_check_writable_names_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_writable(tmp_path / "a/b/c", 1000)
    assert listing(tmp_path) == set(), "checking writes nothing"
    with pytest.raises(ResourceError, match=rf"needs {2**62} bytes, .* has \d+ free"):
        check_writable(tmp_path / "out", 2**62)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputRefused, match="is a file; name a folder"):
        check_writable(tmp_path / "file", 0)
    with pytest.raises(InputRefused, match="not a folder that may be written"):
        check_writable(tmp_path / "file" / "out", 0)
    monkeypatch.setattr(folder.os, "access", lambda path, mode: False)
    with pytest.raises(InputRefused, match="may be written"):
        check_writable(tmp_path / "out", 0)
    monkeypatch.setattr(folder.os.path, "ismount", lambda path: True)
    with pytest.raises(InputRefused, match="is a mount point"):
        check_writable(tmp_path / "out", 0)


MOST, LONGEST = (os.pathconf(tempfile.gettempdir(), limit) for limit in ("PC_NAME_MAX", "PC_PATH_MAX"))
NO_PLACES = {
    "name": ("x" * (MOST - 13), f"has {MOST - 13}, and 14 more while it is written; choose one of at most {MOST - 14}"),
    "bytes": ("ä" * (MOST // 2), f"at most {MOST} bytes there, 'ä+' has {MOST // 2 * 2}, and 14 more"),
    "parent": ("x" * (MOST + 1) + "/out", f"'x+' has {MOST + 1}; choose one of at most {MOST}"),
    "path": ("/".join(["x" * 99] * (LONGEST // 100)), f"a path has at most {LONGEST} bytes there, .* up to 100 more"),
    "circle": ("circle/out", "leads nowhere"),
    "null byte": ("a\0b", "leads nowhere"),
}


@pytest.mark.parametrize("name, message", NO_PLACES.values(), ids=NO_PLACES)
def test_names_that_no_folder_can_have(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(InputRefused, match=message):
        check_writable(name, 0)
    longest = tmp_path / ("x" * (MOST - 14))
    check_writable(longest, 0)
    for _ in range(2):
        write_checkpoint(longest, plan(some_tensors()), overwrite=True)


def test_a_user_without_a_home_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)
    check_writable(tmp_path / "out", 0)
