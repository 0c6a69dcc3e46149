"""What an earlier run left where an output is to be: an unfinished run, or outputs that are whole."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import AlreadyDone, InputRefused
from .headers import real
from .result_folder import MANIFEST, check_writable, differences, read_manifest
from .run_record import Record


def workplace_of(home: Path) -> Path:
    """The hidden folder beside a resolved one."""
    return home.with_name(f".{home.name}.theseus")


def unfinished(home: Path) -> Record | None:
    """The record of the run into a folder that may be gone on with; None where there is none that can be read."""
    try:
        record = Record.load(workplace_of(real(home)))
    except (InputRefused, OSError):
        return None
    return record if record and record.begun else None


def tell_apart(
    home: Path, targets: Sequence[Path], key: Mapping[str, Any], *, run: str | None = None, overwrite: bool
) -> None:
    """Say of outputs that lie there how they were made; nothing where none does, or is to be replaced.

    Args:
        key, run: of the run that would write them; without ``run`` the key alone tells.

    Raises:
        AlreadyDone: by this run, all of them, and they are whole.
        InputRefused: otherwise; with what differs.
    """
    key = json.loads(json.dumps(key))  # as the manifest has it
    made = {target: found for target in targets if (found := _made(target))}
    for target, (theirs, changed) in {t: (m, Record(m["key"], "").changes(key)) for t, m in made.items()}.items():
        if not changed and (run not in (None, theirs.get("run")) or differences(target)):
            changed = "it is damaged, or holds other tensors"
        if changed and not overwrite:
            raise InputRefused(f"output {target} was made otherwise: {changed}; name another folder, or --overwrite")
        if changed:
            return
    if made and len(made) == len(targets):
        raise AlreadyDone(f"{home} is whole already, made from the same inputs with the same options")


def _made(target: Path) -> dict[str, Any]:
    """The manifest of what a run wrote; {} where there is none."""
    with suppress(InputRefused):
        manifest = read_manifest(target)
        return manifest if isinstance(manifest.get("key"), dict) else {}
    return {}


def check_target(
    place: Path, target: Path, nbytes: int, *, overwrite: bool = False, inputs: Sequence[Path] = ()
) -> None:
    """Refuse, as :func:`check_writable` does, an output of `nbytes` that gets its name by a rename from `place`."""
    check_writable(target, nbytes, overwrite=overwrite, inputs=inputs)
    if _device(target.parent) != _device(place.parent):
        raise InputRefused(f"output {target} is on another disk than {place.parent}; name another")


def check_room(places: Sequence[Path], nbytes: int, job: Any, *, inputs: Sequence[Path]) -> None:
    """Refuse folders that cannot be written, before anything heavy runs.

    ``job`` has the fields of ``AlignJob``. A run that is resumed has its own room already; what lies there whole
    is told apart once all that decides it is known.
    """
    if job.resume and (unfinished(job.out) or any((place / MANIFEST).exists() for place in places)):
        return
    if not job.overwrite:
        check_writable(job.out, 0, inputs=inputs)
    for place in places:
        own = workplace_of(real(job.out))
        check_target(own, real(place), nbytes, overwrite=job.overwrite, inputs=inputs)


def _device(path: Path) -> int:
    return next(place for place in (path, *path.parents) if place.exists()).stat().st_dev
