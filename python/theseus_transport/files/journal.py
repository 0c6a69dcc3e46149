"""Folders written step by step: whole under their names at the end, and until then resumable by another process."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from ..errors import ResourceError, TheseusError
from .checkpoint import Checkpoint
from .headers import digest, head, real
from .result_folder import FULL, read_manifest, seal, sync
from .run_folder import Workplace
from .run_record import Record
from .writer import Ending, Output, copy_tensors, laid_out, write_plain, write_tensor

log = logging.getLogger(__name__)


class Work:
    """Folders being written step by step: a context that leaves them whole, or resumable, or nothing at all.

    An error that would come again removes what was done. An interrupt, a disk or memory that does not suffice and an
    input that cannot be read any more leave the last commit, if there is one, and say how to go on from it. A process
    that is killed leaves it too.

    Attributes:
        home: the folder that the user named.
        folder: where the loop may keep files of its own, in folders with names of their own; a commit needs them as
            they were then, so what is to change goes to another file.
        written, dropped: names of planned tensors that are done with.
    """

    def __init__(
        self,
        home: Path,
        outputs: Sequence[Output],
        key: Mapping[str, Any],
        *,
        stem: str,
        shard_size: int,
        overwrite: bool,
        inputs: Sequence[Path],
    ) -> None:
        """Use :meth:`open`, which explains the arguments and finds what an earlier process left."""
        self._outputs = outputs
        self._plans, self._layout = laid_out(outputs, stem, shard_size)
        targets = [real(output.folder) for output in outputs]
        self._place = Workplace(home, targets, self._layout, key, overwrite=overwrite, inputs=inputs)
        self.home, self.folder, self._record = home, self._place.folder, self._place.record
        self._dirty = set[Path]()  # files written to since the last commit; no more than one is open at a time
        self.written, self.dropped = set[str](), set[str]()

    @classmethod
    def open(
        cls,
        home: str | Path,
        outputs: Sequence[Output],
        *,
        stem: str,
        key: Mapping[str, Any],
        resume: bool,
        overwrite: bool,
        inputs: Sequence[Path] = (),
        shard_size: int = 5_000_000_000,
    ) -> Work:
        """Begin to write `outputs`, or go on from what an earlier process committed.

        Args:
            home: the folder that the user named; each output is that, or lies in it.
            stem, shard_size, overwrite, inputs: as `write_checkpoint`.
            key: JSON of all that decides what is written: fingerprints of inputs, options, versions. To go on it must
                be the same; its keys are the words in which a message names what differs.
            resume: go on with an unfinished run.

        Raises:
            AlreadyDone: to resume, but the outputs lie there whole, made with the same key.
            InputRefused: nothing to resume; another process is at work; an unfinished run lies there and is neither to
                be resumed nor overwritten, or is damaged, or has another key; and as `check_writable`.
            ResourceError: as `check_writable`, for what is left to write.
            ValueError: as `write_checkpoint`.
        """
        options: dict[str, Any] = {"stem": stem, "shard_size": shard_size, "overwrite": overwrite, "inputs": inputs}
        work = cls(real(home), outputs, key, **options)
        try:
            if found := work._place.find(resume=resume):
                work._restore(found)
            else:
                work._begin()
        except BaseException as error:
            work._end(error)
            raise
        return work

    def __enter__(self) -> Work:
        return self

    def __exit__(self, _: object, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end(error)

    records = True  # beside what only counts its commits

    @property
    def step(self) -> int:
        """Commits so far, of earlier processes too."""
        return self._record.step

    @property
    def state(self) -> dict[str, Any]:
        """The JSON state of the last commit; {} before the first."""
        return self._record.state

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """The tensors of the last commit, each read from disk at each access; to be used before the next commit."""
        return Checkpoint.open(self._place.state(self.step)) if self._record.tensors else {}

    @property
    def pending(self) -> list[str]:
        """Planned tensors, in order, that are neither written nor dropped."""
        return [name for name in self._plans[0] if name not in self.written | self.dropped]

    def write(self, name: str) -> None:
        """Make a planned tensor for every output, tile by tile, and write it; nothing happens where that is done."""
        if name in self.written | self.dropped:
            return
        file, start = self._layout.places[name]
        files = [staged / file for staged in self._place.staged()]
        self._dirty.update(files)
        write_tensor(files, start, [plan[name] for plan in self._plans])
        self.written.add(name)

    def drop(self, names: Iterable[str]) -> None:
        """Leave planned tensors out of the outputs, written or not."""
        for name in names:
            if name not in self._plans[0]:
                raise ValueError(f"{name!r} is not planned and cannot be dropped")
            self.dropped.add(name)

    def commit(self, state: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], files: Iterable[Path] = ()) -> None:
        """Make all that is written, `state` (JSON), `tensors` and the loop's own `files` what a resume starts from.

        Until this returns a resume may start from the commit before; what only that needed may be removed afterwards.
        """
        files, step = list(files), self.step + 1
        self._flush()
        for path in [*files, *{path.parent for path in files}]:
            sync(path)
        written = self._place.state(step)
        if tensors:
            write_plain(written, tensors)
        headers = digest(head(written)) if tensors else ""
        self._save(step=step, state=json.loads(json.dumps(state)), tensors=headers)
        self._place.state(step - 1).unlink(missing_ok=True)

    def note(self, state: Mapping[str, Any]) -> None:
        """Put `state` (JSON) in the place of the last commit's; its tensors and files stay."""
        self._flush()
        self._save(state=json.loads(json.dumps(state)))

    def finish(self, endings: Sequence[Ending] = ()) -> list[dict[str, Any]]:
        """Put the outputs in place, each by one rename, and remove the rest; returns their manifests.

        Args:
            endings: of every output, where there is more to tell than was known when it was begun.

        Raises ValueError if a planned tensor is neither written nor dropped, or all are dropped.
        """
        if pending := self.pending:
            raise ValueError(f"{pending[0]!r} ({len(pending)} in all) is neither written nor dropped")
        self._flush()
        layout = self._layout.without(self.dropped)
        if not layout.places:
            raise ValueError("no tensor to write")
        places = self._place.final(self.dropped)
        endings = endings or [Ending({}, {})] * len(places)
        for staged, place, output, end in zip(self._place.staged(), places, self._outputs, endings, strict=True):
            if place != staged:
                shutil.rmtree(place, ignore_errors=True)
                place.mkdir()
                copy_tensors(self._layout, staged, layout, place)
            layout.complete(place, {**(output.files or {}), **end.files})
            seal(place, {**(output.metadata or {}), **end.metadata}, run=self._place.run, key=self._record.key)
        self._save(whole=True)
        self._place.put_in_place(self.dropped)
        return [read_manifest(target) for target in self._place.targets]

    def _begin(self) -> None:
        self._place.begin()
        # headers have to be durable with the first commit
        self._dirty.update(staged / file for staged in self._place.staged() for file in self._layout.headers)
        self._save()

    def _restore(self, record: Record) -> None:
        self._place.restore(record)
        self._record, self.written, self.dropped = record, set(record.written), set(record.dropped)

    def _save(self, **changed: Any) -> None:
        record = replace(self._record, written=sorted(self.written), dropped=sorted(self.dropped), **changed)
        record.save(self.folder)
        self._record = record

    def _flush(self) -> None:
        for path in self._dirty:
            sync(path)
        self._dirty.clear()

    def _end(self, error: BaseException | None) -> None:
        """Keep what a resume can go on from, or remove it all; the error says which."""
        place, record = self._place, self._record
        try:
            if place.done and isinstance(error, KeyboardInterrupt):
                raise type(error)(f"interrupted; {place.home} is whole") from error
            if not place.owned or place.done:
                return
            if kept := record.whole or (record.begun and _may_pass(error)):
                cure = f"run again with --resume to go on after step {record.step}, or remove {place.lying(record)}"
            else:
                place.remove()
                cure = "nothing was written"
            if kept and error is None:
                log.warning("%s is unfinished; %s", place.home, cure)
            elif told := _told(error, place, cure, kept=kept):
                raise told from error
        finally:
            place.release()


def _may_pass(error: BaseException | None) -> bool:
    """Whether the same run can go well later: after an interrupt, with more disk or memory or an input in reach."""
    from ..machine import out_of_memory

    if error is None or not isinstance(error, Exception):
        return True
    return isinstance(error, (OSError, ResourceError)) or out_of_memory(error)


def _told(error: BaseException | None, place: Workplace, cure: str, *, kept: bool) -> BaseException | None:
    """The error to raise in place of another; None to leave that."""
    from ..machine import out_of_memory

    if isinstance(error, OSError) and error.errno in FULL:
        free = shutil.disk_usage(place.folder.parent).free
        total = len(place.targets) * place.layout.nbytes
        return ResourceError(f"{place.home}: disk full, {total} bytes of tensors and {free} free: {error}; {cure}")
    if not kept:
        return None
    if isinstance(error, KeyboardInterrupt):
        return type(error)(f"interrupted; {cure}")
    if isinstance(error, TheseusError):
        return type(error)(f"{error}; {cure}")
    if isinstance(error, Exception):
        text = f"out of memory: {error}" if out_of_memory(error) else str(error)
        return ResourceError(f"{text}; {cure}")
    return None
