"""Which files, and which versions, a result was made of."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers

from ..alignment.alignment import Alignment
from ..errors import InputRefused
from ..files.checkpoint import Checkpoint
from ..files.headers import digest
from ..models.geometry import Geometry
from ..models.pair import SIDES, Pair
from ..version import __version__


def recorded_base(alignment: Alignment, side: str) -> dict[str, Any]:
    """What an alignment's provenance says of a base; {} where it is edited, or was made in Python."""
    provenance: Any = alignment.provenance
    found = provenance.get(side) if isinstance(provenance, dict) else None
    return found if isinstance(found, dict) else {}


def check_identity(
    alignment: Alignment,
    folder: object,
    checkpoints: Pair[Checkpoint],
    geometries: Pair[Geometry],
    *,
    whole: bool,
) -> None:
    """Refuse bases other than those of an alignment.

    Args:
        folder: where the alignment lies, for the message.
        checkpoints, geometries: of source and target, as they are given now.
        whole: compare the content of every file too, not headers and sizes only.
    """
    for side, checkpoint, geometry in zip(SIDES, checkpoints, geometries, strict=True):
        recorded = recorded_base(alignment, side)
        if "header_hash" not in recorded:
            raise InputRefused(f"{folder} does not say which {side} it was made for; align again")
        if getattr(alignment, side) != geometry:
            raise InputRefused(f"{folder} records another geometry of the {side} than it was made for; align again")
        kinds = ("header_hash", "content_hash") if whole else ("header_hash",)
        found = (checkpoint.header_hash(), content_hash(checkpoint) if whole else "")
        for kind, now in zip(kinds, found, strict=False):
            if recorded.get(kind) != now:
                raise InputRefused(
                    f"{folder} was made for the {side} {recorded.get('reference')} ({kind} "
                    f"{str(recorded.get(kind))[:12]}), but {checkpoint.folder} ({now[:12]}) was given; "
                    f"name the right one with --{side}, or align again"
                )


def content_hash(checkpoint: Checkpoint) -> str:
    """BLAKE2b over names and whole contents of all files."""
    rows = checkpoint.fingerprint(full=True)["files"]
    return digest(json.dumps(sorted((name, row["blake2b"]) for name, row in rows.items())).encode())


def versions() -> dict[str, str]:
    return {"theseus": __version__, "torch": torch.__version__, "transformers": transformers.__version__}


def reference_of(given: str) -> str:
    """A folder by its absolute path, so that it is found from elsewhere; a hub id as it is."""
    with suppress(OSError):
        if (path := Path(os.path.expanduser(given))).exists():
            return str(path.resolve())
    return given
