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
from ..files.checkpoint import Checkpoint
from ..files.headers import digest
from ..version import __version__


def recorded_base(alignment: Alignment, side: str) -> dict[str, Any]:
    """What an alignment's provenance says of a base; {} where it is edited, or was made in Python."""
    provenance: Any = alignment.provenance
    found = provenance.get(side) if isinstance(provenance, dict) else None
    return found if isinstance(found, dict) else {}


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
