"""Which source block feeds which target block where depths differ, of models too large to be run whole."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..activations.pairing_tokens import mixings
from ..alignment.block_pairing import TOKENS, _paired, _spread
from ..models.forward import Batch
from ..models.geometry import Geometry
from ..models.pair import Pair
from .hidden_states import temporary
from .loop import alone
from .window import Window


def pair_streamed(
    windows: Pair[Window],
    geometries: Pair[Geometry],
    batches: Sequence[Pair[Batch]],
    device: torch.device,
    *,
    folder: Path | None = None,
    ahead: bool = True,
) -> list[int | None]:
    """For every target block the source block that feeds it, or None; blocks that add nothing are never paired.

    What ``alignment/block_pairing.py`` finds of whole models, of models read block by block; all of both is read once.

    Args:
        windows: over the checkpoints of source and target.
        batches: calibration batches (source, target); every one is run once.
        folder: for files of hidden states; None: they stay in memory. ahead: blocks are read before they run.
    """
    rows, share = [mixings(geometries, *pair) for pair in batches], -(-TOKENS // len(batches))
    updates: list[list[list[Tensor]]] = [[], []]
    for k, (window, geometry, found) in enumerate(zip(windows, geometries, updates, strict=True)):
        with temporary(folder) as place:
            side = alone(window, geometry, [pair[k] for pair in batches], device, place)
            for b in range(geometry.depth):
                found.append([])
                window.hold(side.names(b))
                if ahead:
                    window.prefetch(side.names(b + 1))
                with torch.no_grad(), side.skeleton.filled(b) as block:
                    for i in range(len(batches)):
                        before = side.hidden[i].to(device)
                        update = side.step(block, b, i) - before
                        found[b].append(_spread(rows[i][k], share, update.flatten(0, -2)))
                window.release()
    return _paired(updates)
