"""Resumable folders: a run that is interrupted or out of disk goes on, and its bytes are those of one run."""

import errno
import itertools
import os
import signal
from pathlib import Path

import pytest
import torch
from helpers.three_steps import OLD, Loop, Stop, content, loop, names
from theseus_transport.errors import AlreadyDone, InputRefused, NumericalError, ReadFailed, ResourceError
from theseus_transport.files import journal, run_folder
from theseus_transport.files.checkpoint import Checkpoint
from theseus_transport.files.result_folder import differences
from theseus_transport.files.writer import Output, Planned, write_checkpoints


@pytest.mark.parametrize("dropped", [(), ("1.w",), ("embedding", "0.w", "0.b", "1.b")], ids=str)
@pytest.mark.parametrize("alphas", [1, 2])
def test_same_bytes_as_a_write_in_one_go(tmp_path: Path, alphas: int, dropped: tuple[str, ...]) -> None:
    stepped = loop(tmp_path / "out", alphas=alphas, dropped=dropped)
    manifests = stepped.run()
    assert names(tmp_path) == {"out"}
    for output in stepped.outputs:
        assert differences(output.folder) == [] and not set(Checkpoint.open(output.folder)) & {*dropped}
    assert [m["metadata"] for m in manifests] == [{"count": 6}] * alphas
    again = []
    for output in stepped.outputs:
        held = Checkpoint.open(output.folder)
        kept = [t for t in output.tensors if t.name in held]
        kept = [t._replace(make=lambda rows, t=t, c=held: c[t.name][rows or ...]) for t in kept]
        files = {**output.files, **stepped.ending.files}
        again.append(Output(tmp_path / "again" / Path(output.folder).relative_to(tmp_path), kept, files))
    write_checkpoints(again, shard_size=100)
    for one, two in zip(stepped.outputs, again, strict=True):
        found, expected = content(Path(one.folder)), content(Path(two.folder))
        assert found.pop("theseus.json") != expected.pop("theseus.json"), "metadata and key"
        assert found == expected


PLACES = ["committed 0", "make 1.w", "wrote 2.w", "committed 2", "make embedding", "finish"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dropped", [(), ("1.w",)], ids=str)
def test_interrupt_then_resume(tmp_path: Path, place: str, dropped: tuple[str, ...]) -> None:
    loop(tmp_path / "straight", dropped=dropped).run()
    with pytest.raises(KeyboardInterrupt, match=r"--resume to go on after step \d, or remove .*/\.out\.theseus$"):
        Loop(tmp_path / "out", dropped=dropped, hook=Stop(place, KeyboardInterrupt())).run()
    assert names(tmp_path) == {"straight", ".out.theseus"}
    passed: list[str] = []
    Loop(tmp_path / "out", dropped=dropped, hook=passed.append).run(resume=True)
    assert content(tmp_path / "out") == content(tmp_path / "straight") and names(tmp_path) == {"straight", "out"}
    assert "make 0.w" not in passed, "what is committed is not made again"


@pytest.mark.parametrize("place", ["open", "make 0.b", "wrote 0.b"])
def test_nothing_committed_leaves_nothing(tmp_path: Path, place: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        Loop(tmp_path / "deep/er/out", hook=Stop(place, KeyboardInterrupt())).run()
    assert names(tmp_path) == set()


ERRORS = {
    "refused": (InputRefused("no such layer"), InputRefused, "no such layer", False),
    "NaN": (NumericalError("not finite"), NumericalError, "not finite", False),
    "bug": (ZeroDivisionError("boom"), ZeroDivisionError, "boom", False),
    "read": (ReadFailed("a.safetensors was cut short"), ReadFailed, "cut short; run again with --resume", True),
    "memory": (MemoryError("no room"), ResourceError, "out of memory: no room; run again with --resume", True),
    "device": (torch.OutOfMemoryError("CUDA"), ResourceError, "CUDA; run again with --resume", True),
    "disk": (OSError(errno.EIO, "on fire"), ResourceError, "on fire; run again with --resume", True),
    "full": (OSError(errno.ENOSPC, "No space left"), ResourceError, r"disk full, 264 bytes of .* with --resume", True),
}


@pytest.mark.parametrize("raised, error, message, stays", ERRORS.values(), ids=ERRORS)
def test_what_an_error_leaves(tmp_path: Path, raised: Exception, error: type, message: str, stays: bool) -> None:
    write_checkpoints([Output(tmp_path / "out", [Planned("a", (4,), torch.float32, lambda rows: OLD["old"])])])
    before = content(tmp_path / "out")
    with pytest.raises(error, match=message):
        Loop(tmp_path / "out", alphas=1, hook=Stop("wrote 1.w", raised)).run(overwrite=True)
    assert names(tmp_path) == ({"out", ".out.theseus"} if stays else {"out"}) and content(tmp_path / "out") == before
    if stays:
        loop(tmp_path / "out", alphas=1).run(resume=True, overwrite=True)
        loop(tmp_path / "straight", alphas=1).run()
        assert content(tmp_path / "out") == content(tmp_path / "straight")


@pytest.mark.parametrize("dropped", [(), ("1.w",)], ids=str)
@pytest.mark.parametrize("function, call", [("seal", 0), ("seal", 1), ("put_in_place", 0), ("put_in_place", 1)])
def test_interrupt_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, call: int, dropped: tuple[str, ...]
) -> None:
    loop(tmp_path / "straight", dropped=dropped).run()
    module = journal if function == "seal" else run_folder
    calls, work = itertools.count(), getattr(module, function)

    def signalled(*known: object, **more: object) -> None:
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGINT)
        work(*known, **more)

    with monkeypatch.context() as patch:
        patch.setattr(module, function, signalled)
        with pytest.raises(KeyboardInterrupt, match="run again with --resume"):
            loop(tmp_path / "out", dropped=dropped).run()
    if function == "seal":
        loop(tmp_path / "out", dropped=dropped).run(resume=True)
    else:
        with pytest.raises(AlreadyDone, match="whole but for its name"):
            Loop(tmp_path / "out", dropped=dropped, hook=Stop("open", AssertionError("nothing to compute"))).run(
                resume=True
            )
    assert content(tmp_path / "out") == content(tmp_path / "straight") and names(tmp_path) == {"straight", "out"}


def test_commit_makes_durable_before_it_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, os.replace

    def sync(descriptor: int) -> None:
        events.append(Path(f"/proc/self/fd/{descriptor}").resolve().name)
        fsync(descriptor)

    def move(source: Path, target: Path) -> None:
        events.append("rename")
        rename(source, target)

    with loop(tmp_path / "out", alphas=1).open() as work:
        shards = names(work.folder / "staged-0")
        assert len(shards) == 4
        monkeypatch.setattr(os, "fsync", sync)
        monkeypatch.setattr(os, "replace", move)
        for name, step, files in (("0.w", 1, shards), ("2.b", 2, {"model-00004-of-00004.safetensors"})):
            work.write(name)
            (work.folder / "hidden").write_text("states")
            work.commit({}, {"t": torch.ones(1)}, files=[work.folder / "hidden"])
            before = events[: events.index("rename")]
            assert {*before} == {*files, "hidden", ".out.theseus", f"state-{step}.safetensors", "journal.json.next"}
            assert len(before) == len({*before}), "one fsync for each file"
            assert events[len(before) :] == ["rename", ".out.theseus"]
            events.clear()


def test_no_file_stays_open(tmp_path: Path) -> None:
    """However many outputs and shards there are, a limit of open files (ulimit -n) is not reached by them."""
    open_files: list[int] = []
    Loop(tmp_path / "out", alphas=3, hook=lambda place: open_files.append(len(os.listdir("/proc/self/fd")))).run()
    assert len(open_files) > 20 and len({*open_files}) == 1


def test_everything_is_written_or_dropped(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'embedding' \(6 in all\) is neither written nor dropped"):  # noqa: SIM117
        with loop(tmp_path / "out").open() as work:
            work.write("1.w")
            work.write("1.w")
            work.finish()
    with pytest.raises(ValueError, match="no tensor to write"), loop(tmp_path / "out").open() as work:
        work.drop(work.pending)
        work.finish()
    with pytest.raises(ValueError, match="'x' is not planned"), loop(tmp_path / "out").open() as work:
        work.drop(["x"])
    assert names(tmp_path) == set()


def test_state_is_bit_exact(tmp_path: Path) -> None:
    state = {"float": 0.1 + 0.2, "nested": {"list": [1, None, "ä"]}}
    tensors = {
        "nan": torch.tensor([float("nan"), -0.0, 5e-324], dtype=torch.float64),
        "turned": torch.randn(3, 4).T,
        "half": torch.randn(3).bfloat16(),
        "scalar": torch.tensor(2),
        "empty": torch.zeros(0, 3),
    }
    with loop(tmp_path / "out").open() as work:
        assert work.tensors == {} and work.state == {}
        work.commit({"first": 1}, {"t": torch.ones(1)})
        work.commit(state, tensors)
        assert {"state-2.safetensors"} == {name for name in names(work.folder) if name.startswith("state")}
    with loop(tmp_path / "out").open(resume=True) as work:
        assert work.step == 2 and work.state == state
        for name, tensor in tensors.items():
            found = work.tensors[name]
            assert found.dtype == tensor.dtype and found.shape == tensor.shape, name
            assert found.contiguous().view(-1).view(torch.uint8).equal(tensor.contiguous().view(-1).view(torch.uint8))
        work.commit({}, {})
        assert work.tensors == {} and not any(name.startswith("state") for name in names(work.folder))
