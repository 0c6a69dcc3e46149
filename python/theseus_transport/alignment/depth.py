"""Which source block feeds which target block, as asked: compared, by relative depth, or told block by block."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, TypeAlias

from ..activations.links import Pairs
from ..errors import InputRefused
from ..files.headers import read_file, real
from ..models.geometry import Geometry
from ..models.pair import Pair
from .restored import check_blocks

Depth: TypeAlias = "str | Sequence[int | None]"
SIMILARITY, RELATIVE = "similarity", "relative"
WORDS = SIMILARITY, RELATIVE
MOST = 1 << 20  # bytes of a file


def blocks_asked(depth: Depth, geometries: Pair[Geometry], what: str = "depth") -> list[int | None] | None:
    """For every target block the source block that feeds it, or None; None alone: where depths differ, compare them.

    Args:
        depth: ``similarity``, ``relative`` (evenly spread), or a list of source blocks, each behind the one before.
        what: how messages name it.

    Raises:
        InputRefused: it is no such word, or no increasing pairing of these two models.
    """
    if isinstance(depth, str) and depth in WORDS:
        return None if depth == SIMILARITY else list(Pairs.by_position(*geometries).blocks)
    told: Any = list(depth) if isinstance(depth, Sequence) and not isinstance(depth, str) else depth
    depths = geometries.map(lambda geometry: geometry.depth)
    example = (
        f"give {' or '.join(WORDS)}, or for each block of the target one of the source, increasing, or None (null)"
    )
    return check_blocks(told, depths, what, example)


def read_depth(asked: str) -> Depth:
    """One of the words, or what a file holds, a JSON list; :func:`blocks_asked` checks it.

    Raises:
        InputRefused: it is no word, and no file of JSON.
    """
    if asked in WORDS:
        return asked
    path = real(asked)
    if not path.is_file():
        raise InputRefused(f"--depth {asked} is no file; give {', '.join(WORDS)} or a JSON list, as [0, null, 1]")
    try:
        found = json.loads(read_file(path, most=MOST))
    except (ValueError, RecursionError) as error:  # no utf-8 is a ValueError too
        raise InputRefused(f"--depth {asked} is no JSON ({error}); give a list, as [0, null, 1]") from None
    if not isinstance(found, list):
        raise InputRefused(f"--depth {asked} holds {str(found)[:80]}; give a list, as [0, null, 1]")
    return found
