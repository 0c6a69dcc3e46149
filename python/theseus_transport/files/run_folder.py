"""The hidden folder in which an unfinished run lies, beside what it will become.

Beside the folder `out` that the user named there is `.out.theseus` until the end:

    lock                      held by the process at work
    journal.json              the record of the last commit
    state-3.safetensors       tensors of that commit, here the third
    staged-0/ ...             the folder to be of each output, its files at their full size from the start
    final-0/ ...              the same without dropped tensors, made at the end where there are any
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import AlreadyDone, InputRefused, TheseusError
from .checkpoint import Checkpoint
from .earlier_runs import check_target, tell_apart, workplace_of
from .headers import digest, head, inside
from .result_folder import (
    check_writable,
    put_in_place,
    read_manifest,
    refuse_foreign,
    refuse_overlap,
    remove_replaced,
    sync,
    warn_leftovers,
)
from .run_record import JOURNAL, LOCK, NEXT, Record, lock
from .writer import ShardLayout

log = logging.getLogger(__name__)


class Workplace:
    """Where a run works; every file of ours in it, by name, and who may touch them.

    Attributes:
        home: the folder that the user named; folder: the hidden one; targets: what each output will be called.
        record: the one of a run that has not begun; run: digest of its key and plan, which manifests tell.
        owned: what lies in the folder is of this run; done: all is in place.
    """

    def __init__(
        self,
        home: Path,
        targets: Sequence[Path],
        layout: ShardLayout,
        key: Mapping[str, Any],
        *,
        overwrite: bool,
        inputs: Sequence[Path],
    ) -> None:
        self.home, self.targets, self.layout = home, targets, layout
        self.overwrite, self.inputs = overwrite, inputs
        self.folder = workplace_of(home)
        headers = b"".join(header for _, header in sorted(layout.headers.items()))
        names = json.dumps([os.path.relpath(target, home) for target in targets])
        self.record = Record(json.loads(json.dumps(key)), digest(names.encode() + headers))
        self.run = digest(json.dumps([self.record.key, self.record.plan], sort_keys=True).encode())
        self.owned = self.done = False
        self._created: list[Path] = []  # parents of the folder
        self._lock: int | None = None

    def staged(self) -> list[Path]:
        return [self.folder / f"staged-{i}" for i in range(len(self.targets))]

    def final(self, dropped: Collection[str]) -> list[Path]:
        """The folders that get the outputs' names at the end: those without the ``dropped`` tensors, if any are."""
        return [self.folder / f"final-{i}" for i in range(len(self.targets))] if dropped else self.staged()

    def state(self, step: int) -> Path:
        """The file of the tensors of a commit, by its number."""
        return self.folder / f"state-{step}.safetensors"

    def find(self, *, resume: bool) -> Record | None:
        """What to resume, or None, where the folder then is absent or may be emptied.

        Raises AlreadyDone and InputRefused as `Work.open`.
        """
        refuse_overlap(self.folder, self.inputs)
        there, record = os.path.lexists(self.folder), None
        if there:
            self._refuse_foreign()
            self._lock = lock(self.folder)
            try:
                record = Record.load(self.folder)
            except InputRefused:
                if resume or not self.overwrite:
                    raise
        if record and record.begun:
            if not resume and not self.overwrite:
                raise InputRefused(
                    f"an unfinished run lies in {self.lying(record)}, {record.step} steps done; "
                    "--resume goes on with it, or remove it"
                )
            return record if resume else None
        if resume:
            try:
                tell_apart(self.home, self.targets, self.record.key, run=self.run, overwrite=self.overwrite)
            except TheseusError:
                if there:  # a process was killed while it tidied up
                    self.remove()
                raise
        return None

    def lying(self, record: Record) -> str:
        """The folders, in words, in which all lies that a resume from ``record`` needs."""
        other = record.state.get("folder")  # the loop's own
        places = [self.folder, *([Path(other)] if isinstance(other, str) else [])]
        return " and ".join(str(place) for place in places if place == self.folder or self.folder not in place.parents)

    def begin(self) -> None:
        """Make all files, in an empty folder."""
        self.owned = self._lock is not None  # what lies there is of no use, and goes if this does not come about
        self._check_targets(len(self.targets) * self.layout.nbytes)
        if self._lock is None:
            check_writable(self.folder, 0, inputs=self.inputs)
            self._created = [parent for parent in self.folder.parents if not parent.exists()]
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            try:
                self.folder.mkdir(mode=0o700)
            except FileExistsError:
                raise InputRefused(f"another process has just begun to write {self.home}; wait for it") from None
            self._lock = lock(self.folder)
        self.owned = True
        self._empty()
        for staged in self.staged():
            staged.mkdir()
            self.layout.create(staged)
            sync(staged)
        sync(self.folder.parent)

    def restore(self, record: Record) -> None:
        """Bring all files back to a commit."""
        if changed := record.changes(self.record.key):
            raise InputRefused(
                f"the unfinished run in {self.lying(record)} was begun otherwise: {changed}; run as it was begun, or "
                "remove it"
            )
        if record.plan != self.record.plan:
            raise InputRefused(f"the unfinished run in {self.folder} writes other tensors than this one; remove it")
        if record.whole:
            pairs = zip(self.final(record.dropped), self.targets, strict=True)
            if not all(self._is_ours(place if place.exists() else target) for place, target in pairs):
                raise self._damaged()
            self.put_in_place(record.dropped)
            raise AlreadyDone(f"{self.home} was whole but for its name, which it has now")
        self._check_staged(record)
        held = {path for staged in self.staged() for path in staged.iterdir()}
        there = sum(512 * path.stat().st_blocks for path in held)  # what is not written yet takes no room
        self._check_targets(max(0, len(self.targets) * self.layout.nbytes - there))
        self.owned = True
        strays = [self.folder / NEXT, *self.folder.glob("state-*"), *self.folder.glob("final-*")]
        for path in [*strays, *(path for path in held if path.name not in self.layout.headers)]:
            if path != self.state(record.step):
                _delete(path)

    def put_in_place(self, dropped: Collection[str]) -> None:
        """Give whole folders their names; an interrupted process may have done so with some."""
        for place, target in zip(self.final(dropped), self.targets, strict=True):
            if place.exists():
                check_writable(target, 0, overwrite=self.overwrite, inputs=self.inputs)  # others have had time
                target.parent.mkdir(parents=True, exist_ok=True)
                put_in_place(place, target, overwrite=self.overwrite)
            remove_replaced(target)
        self.done = True
        self.remove()

    def remove(self) -> None:
        """Remove the folder, and the parents that were made for it."""
        with suppress(OSError):
            self._empty()
            (self.folder / LOCK).unlink()
            self.folder.rmdir()
        if self.folder.exists():
            log.warning("%s could not be removed whole; what is left of it is of no use", self.folder)
        for parent in self._created:
            with suppress(OSError):  # what was written lies in it
                parent.rmdir()

    def release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _empty(self) -> None:
        """The journal first, so that what is left when this is interrupted can be told from a run; never the lock."""
        for path in sorted(self.folder.iterdir(), key=lambda path: path.name != JOURNAL):
            if path.name != LOCK:
                _delete(path)

    def _refuse_foreign(self) -> None:
        names = {path.name for path in self.folder.iterdir()} if self.folder.is_dir() else {"a file"}
        ours = not names or names & {JOURNAL, LOCK}
        if not ours or self.folder.is_symlink():
            raise InputRefused(f"{self.folder} is in the way and no unfinished run of yours; remove it first")
        refuse_foreign(self.folder)

    def _is_ours(self, folder: Path) -> bool:
        with suppress(InputRefused):
            return bool(read_manifest(folder).get("run") == self.run)
        return False

    def _damaged(self) -> InputRefused:
        return InputRefused(f"{self.folder} is damaged: it holds not what its {JOURNAL} says; remove it")

    def _check_targets(self, nbytes: int) -> None:
        for target in self.targets:
            warn_leftovers(target)
            check_target(self.folder, target, nbytes, overwrite=self.overwrite, inputs=self.inputs)

    def _check_staged(self, record: Record) -> None:
        """Refuse files that are not as a commit left them, before anything is written through their names."""
        files = [(staged / name, name) for staged in self.staged() for name in self.layout.headers]
        with suppress(OSError, InputRefused):
            whole = not any(path.is_symlink() for path in [*self.staged(), *(path for path, _ in files)])
            whole &= {*record.written, *record.dropped} <= {*self.layout.places}
            for path, name in files if whole else ():
                with path.open("rb") as file:
                    header = self.layout.headers[name]
                    whole &= file.read(len(header)) == header and path.stat().st_size == self.layout.sizes[name]
            if record.tensors:
                state = inside(self.folder, self.state(record.step).name)
                whole &= digest(head(state)) == record.tensors and len(Checkpoint.open(state)) > 0
            if whole:
                return
        raise self._damaged()


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
