"""Where a reference to a model leads: a folder or a file here, or a model of the hub."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from ..errors import InputRefused
from .companions import PATTERNS

KINDS = {"checkpoint": "model", "adapter": "adapter_model"}  # kind -> stem of its weight files


def located(reference: str | Path, *, allow_pickle: bool = False, download: bool = True) -> Path:
    """The folder or file that a reference means; without ``download`` a hub id only where it was fetched before.

    What a user named may be downloaded; what a file names, which others may have written, calls nobody.

    Raises:
        InputRefused: there is none within reach.
    """
    path = Path(os.path.expanduser(reference))
    if os.path.exists(path):  # unlike Path.exists it answers False to any impossible name
        return path
    unreachable = (
        f"{str(reference)!r} is neither a folder, nor a .safetensors file, nor a hub id within reach ({{}}); "
        "check the path, or download the model first and give its folder"
    )
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", str(reference)):
        raise InputRefused(unreachable.format("no such path, and hub ids read owner/name"))
    from huggingface_hub import snapshot_download  # imported late: local models need no hub client

    suffixes = ("safetensors", "bin") if allow_pickle else ("safetensors",)
    stems, ends = (*KINDS.values(), "pytorch_model"), ("", ".index.json")
    weights = [f"{stem}*.{suffix}{end}" for stem in stems for suffix in suffixes for end in ends]
    local: dict[str, Any] = {} if download else {"local_files_only": True}
    patterns = [*weights, "config.json", "adapter_config.json", *PATTERNS]
    try:
        return Path(snapshot_download(str(reference), allow_patterns=patterns, **local))
    except Exception as error:  # the hub client raises errors of several libraries; each means: not within reach
        raise InputRefused(unreachable.format(f"{type(error).__name__}: {str(error).splitlines()[0]}")) from error
