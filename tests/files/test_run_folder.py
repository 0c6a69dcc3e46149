"""The folder of an unfinished run: whose it is, what it may be resumed with, what damage is refused."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.three_steps import KEY, Stop, content, interrupted, loop, names
from theseus_transport.errors import AlreadyDone, InputRefused
from theseus_transport.files import run_folder
from theseus_transport.files.journal import Work
from theseus_transport.files.run_record import signed
from theseus_transport.files.writer import Output, Planned


def test_refusals_name_the_cure(tmp_path: Path) -> None:
    hidden = interrupted(tmp_path / "out")
    before = content(hidden)
    with pytest.raises(InputRefused, match=r"unfinished run lies in .*theseus, 2 steps done; --resume .*, or remove"):
        loop(tmp_path / "out").run()
    (hidden / "journal.json").rename(tmp_path / "kept")
    (hidden / "journal.json").write_text("{")
    for options in ({}, {"resume": True}, {"resume": True, "overwrite": True}):
        with pytest.raises(InputRefused, match="journal.json holds no valid JSON"):
            loop(tmp_path / "out").run(**options)
    (tmp_path / "kept").rename(hidden / "journal.json")
    assert content(hidden) == before, "a refusal changes nothing"
    with loop(tmp_path / "out").open(overwrite=True) as work:
        assert work.step == 0 and not work.written and names(hidden) == {"lock", "journal.json", "staged-0", "staged-1"}
    assert names(tmp_path) == set()


def test_a_whole_folder_is_not_made_again(tmp_path: Path) -> None:
    loop(tmp_path / "out").run()
    with pytest.raises(AlreadyDone, match="whole already, made from the same inputs with the same options") as caught:
        loop(tmp_path / "out").run(resume=True)
    assert caught.value.exit_code == 0
    (tmp_path / ".out.theseus").mkdir()  # a process was killed while it tidied up
    (tmp_path / ".out.theseus/lock").write_text("1\n")
    with pytest.raises(AlreadyDone):
        loop(tmp_path / "out").run(resume=True)
    assert names(tmp_path) == {"out"}
    before, other = content(tmp_path), "it is damaged, or holds other tensors"
    changes = {'torch is "3", was "2.13"': {"key": {**KEY, "torch": "3"}}, other: {"shard_size": 10**9}}
    for said, change in changes.items():
        with pytest.raises(InputRefused, match=f"out/alpha-0 was made otherwise: {said}; name another folder, or --ov"):
            loop(tmp_path / "out").run(resume=True, **change)
    assert content(tmp_path) == before
    (tmp_path / "out/alpha-1/config.json").write_text("{} ")
    with pytest.raises(InputRefused, match=f"out/alpha-1 was made otherwise: {other}"):
        loop(tmp_path / "out").run(resume=True)
    loop(tmp_path / "out").run(resume=True, overwrite=True)
    assert content(tmp_path) == before and names(tmp_path) == {"out"}


def test_what_a_process_left_that_was_killed_while_it_tidied_up(tmp_path: Path) -> None:
    """It goes with the next run, whatever becomes of that, and so does what an overwritten folder was put aside as."""
    loop(tmp_path / "out", alphas=1).run()
    for options, error in (({}, InputRefused), ({"resume": True}, AlreadyDone)):
        (tmp_path / ".out.theseus/staged-0").mkdir(parents=True)
        (tmp_path / ".out.theseus/lock").touch()
        with pytest.raises(error):
            loop(tmp_path / "out", alphas=1).run(**options)
        assert names(tmp_path) == {"out"}
    (tmp_path / "out").rename(tmp_path / ".out.old-0123abcd")
    loop(tmp_path / "out", alphas=1).run()
    assert names(tmp_path) == {"out"}


def test_resume_begins_where_nothing_is_to_be_resumed(tmp_path: Path) -> None:
    """A requeued script has one line."""
    loop(tmp_path / "straight").run()
    loop(tmp_path / "out").run(resume=True)
    assert content(tmp_path / "out") == content(tmp_path / "straight")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").touch()
    with pytest.raises(InputRefused, match="full is not empty; name another folder, or --overwrite"):
        loop(tmp_path / "full", alphas=1).run(resume=True)
    assert names(tmp_path) == {"out", "straight", "full"}


CHANGES = {
    "input": (
        {"source": {"files": {"model.safetensors": {"size": 10, "mtime_ns": 2, "header_blake2b": "bb"}}}},
        'source model.safetensors time of change in ns is 2, was 1; source model.safetensors header is "bb", was "aa";',
    ),
    "file": ({"source": {"files": {}}}, "source model.safetensors size in bytes is absent, was 10; "),
    "option": ({"option --alpha": 2.0}, "was begun otherwise: option --alpha is 2.0, was 1.0; run as it was begun, or"),
    "new option": ({"option --leave": ["head"]}, 'otherwise: option --leave is ["head"], was absent; run as'),
    "version": ({"torch": "2.14"}, 'otherwise: torch is "2.14", was "2.13"; run'),
    "many": ({f"x{i}": i for i in range(8)}, "x4 is 4, was absent and 3 more; run"),
}


@pytest.mark.parametrize("change, message", CHANGES.values(), ids=CHANGES)
def test_changed_key_is_named(tmp_path: Path, change: dict, message: str) -> None:
    hidden = interrupted(tmp_path / "out")
    before = content(hidden)
    with pytest.raises(InputRefused) as caught:
        loop(tmp_path / "out").run(resume=True, key=KEY | change)
    assert message in str(caught.value) and content(hidden) == before
    loop(tmp_path / "out").run(resume=True)


def test_changed_plan_is_refused(tmp_path: Path) -> None:
    interrupted(tmp_path / "out")
    for other in (loop(tmp_path / "out", alphas=1), loop(tmp_path / "out", alphas=3)):
        with pytest.raises(InputRefused, match="writes other tensors than this one"):
            other.run(resume=True)
    with pytest.raises(InputRefused, match="writes other tensors than this one"):
        loop(tmp_path / "out").run(resume=True, shard_size=10**9)


def edited(**fields: object) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        record = json.loads((folder / "journal.json").read_text())
        (folder / "journal.json").write_text(json.dumps(signed(record | fields)))

    return edit


def changed(path: Path, old: bytes, new: bytes) -> None:
    assert path.read_bytes().count(old) == 1
    path.write_bytes(path.read_bytes().replace(old, new))


def linked(name: str) -> Callable[[Path], object]:
    """A file or folder becomes a link to its copy elsewhere, where nothing may change."""

    def link(folder: Path) -> None:
        place = folder.parent / "elsewhere"
        (folder / name).rename(place)
        (folder / name).symlink_to(place)

    return link


SHARD = "staged-1/model-00002-of-00004.safetensors"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "format": (edited(format=0), "of another version"),
    "digest": (lambda f: changed(f / "journal.json", b'"whole": false', b'"whole": true'), "journal.json is damaged"),
    "field": (edited(extra=1), "journal.json is damaged"),
    "type": (edited(step="2"), "journal.json is damaged"),
    "bool": (edited(step=True), "journal.json is damaged"),
    "negative": (edited(step=-1), "journal.json is damaged"),
    "names": (edited(written=[1]), "journal.json is damaged"),
    "list": (edited(dropped={}), "journal.json is damaged"),
    "path": (edited(written=["../../x"]), "it holds not what"),
    "other step": (edited(step=7), "it holds not what"),
    "no state": (lambda f: (f / "state-2.safetensors").unlink(), "it holds not what"),
    "cut state": (lambda f: os.truncate(f / "state-2.safetensors", 90), "it holds not what"),
    "no shard": (lambda f: (f / SHARD).unlink(), "it holds not what"),
    "cut shard": (lambda f: os.truncate(f / SHARD, 90), "it holds not what"),
    "other shard": (lambda f: (f / SHARD).write_bytes(bytes((f / SHARD).stat().st_size)), "it holds not what"),
    "linked shard": (linked(SHARD), "it holds not what"),
    "linked folder": (linked("staged-0"), "it holds not what"),
    "linked journal": (linked("journal.json"), "outside the model's folder"),
    "nothing of ours": (lambda f: [(f / name).unlink() for name in ("lock", "journal.json")], "no unfinished run"),
    "linked whole": (lambda f: (f.rename(f.parent / "elsewhere"), f.symlink_to("elsewhere")), "no unfinished run"),
}  # fmt: skip


def test_damage_between_the_last_commit_and_the_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "put_in_place", lambda *_, **__: Stop("", KeyboardInterrupt())(""))
        with pytest.raises(KeyboardInterrupt):
            loop(tmp_path / "out").run()
    (tmp_path / ".out.theseus/staged-1").rename(tmp_path / "lost")
    with pytest.raises(InputRefused, match="is damaged: it holds not what"):
        loop(tmp_path / "out").run(resume=True)
    assert names(tmp_path) == {".out.theseus", "lost", "out"} and names(tmp_path / "out") == set()
    (tmp_path / "lost").rename(tmp_path / ".out.theseus/staged-1")
    with pytest.raises(AlreadyDone):
        loop(tmp_path / "out").run(resume=True)
    assert names(tmp_path) == {"out"} and names(tmp_path / "out") == {"alpha-0", "alpha-1"}


@pytest.mark.parametrize("damage, message", DAMAGE.values(), ids=DAMAGE)
def test_damaged_or_hostile_folder_is_refused(tmp_path: Path, damage: Callable, message: str) -> None:
    hidden = interrupted(tmp_path / "out")
    damage(hidden)
    before = content(tmp_path)
    with pytest.raises(InputRefused, match=message):
        loop(tmp_path / "out").run(resume=True)
    assert content(tmp_path) == before


def test_second_process_is_refused(tmp_path: Path) -> None:
    with loop(tmp_path / "out").open() as work:
        work.commit({"count": 0}, {"total": torch.zeros(3)})
        (work.folder / "hidden-1").write_text("1")
        for options in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(InputRefused, match=f"process {os.getpid()} is at work in .*theseus; wait for it, or"):
                loop(tmp_path / "out").run(**options)
    (work.folder / "lock").write_text("99999999\n")  # of a process that died
    loop(tmp_path / "out").run(resume=True)
    assert names(tmp_path) == {"out"}


def test_room_counts_what_is_staged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    check = run_folder.check_target

    def spy(place: Path, target: Path, nbytes: int, **options: object) -> None:
        asked.append(nbytes)
        check(place, target, nbytes, **options)

    big = [Planned(n, (1 << 20,), torch.uint8, lambda rows: torch.ones(1 << 20, dtype=torch.uint8)) for n in "abcd"]
    monkeypatch.setattr(run_folder, "check_target", spy)
    options = {"stem": "model", "key": {}, "overwrite": False}
    with Work.open(tmp_path / "out", [Output(tmp_path / "out", big)], resume=False, **options) as work:
        work.write("a"), work.write("c")
        work.commit({}, {})
    with Work.open(tmp_path / "out", [Output(tmp_path / "out", big)], resume=True, **options) as work:
        assert work.pending == ["b", "d"]
    first, resumed = asked[0], asked[-1]
    page = 4096  # a header, and what a file system rounds up to
    assert first == 4 << 20 and (2 << 20) - 8 * page <= resumed <= 2 << 20


def test_never_in_an_input(tmp_path: Path) -> None:
    for place in (tmp_path / "out", tmp_path / ".out.theseus", tmp_path / ".out.theseus/model", tmp_path):
        with pytest.raises(InputRefused, match="overlaps the input"):
            loop(tmp_path / "out").run(inputs=[place])
    with loop(tmp_path / "out").open() as work:
        work.commit({}, {})
    for options in ({"resume": True}, {"overwrite": True}):
        with pytest.raises(InputRefused, match="overlaps the input"):
            loop(tmp_path / "out").run(inputs=[work.folder / "staged-0"], **options)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").write_text("")
    for overwrite, message in ((False, "is not empty"), (True, "not ours to replace")):
        with pytest.raises(InputRefused, match=message):
            loop(tmp_path / "full", alphas=1).run(overwrite=overwrite)
    assert names(tmp_path) == {".out.theseus", "full"}
