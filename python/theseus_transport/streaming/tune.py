"""A tune on disk: its update, and the window through which its tensors are read."""

from __future__ import annotations

from ..files.checkpoint import Checkpoint
from ..models.family import Family
from ..updates.adapter import Adapter
from ..updates.delta import Delta
from ..updates.merged import Merged
from .window import Window


def open_tune(
    tuned: Checkpoint, source: Checkpoint, base: Window, family: Family, *, as_adapter: bool
) -> tuple[Delta, Window]:
    """The update in an opened folder, and the window through which its tensors are read.

    Args:
        base: a window over the source.
        as_adapter: it is moved as factors; else an adapter that factors cannot carry is merged into its base.

    Raises:
        InputRefused: the adapter is none of a LoRA, or does not fit the base.
    """
    window = Window(tuned)
    if tuned.kind != "adapter":
        return Delta(base, window, config=tuned.config), window
    delta = Delta(base, adapter=Adapter.of(tuned, window, source=source))
    if as_adapter or not delta.needs_merging(family):
        return delta, window
    merged = Merged(source, Adapter.of(tuned), family)
    window = Window(merged)
    return Delta(base, window, adapted=merged), window
