"""Was an adapter trained on the source that is given? By its layers, by the name it records, by weights at hand."""

from __future__ import annotations

import re
from collections.abc import Collection

from .adapter import Adapter
from .errors import InputRefused
from .family import Family
from .models import Base


def changed_by(adapter: Adapter, family: Family) -> set[str]:
    """Canonical names of the layers that an adapter factors."""
    return {part for spelled in adapter.layers() for part in family.parts(family.canonical(spelled))}


def check_layers(adapter: Adapter, source: Base, moved: Collection[str]) -> None:
    """Refuse an adapter of layers that the source does not have: no option could move them.

    Args:
        moved: canonical names of layers that have a rule, stored in the source or not (a tied head is not).
    """
    family, depth = source.layout.family, source.layout.depth
    known = {*moved, *(name.rpartition(".")[0] for name in source.slots)}
    names = {spelled: family.canonical(spelled) for spelled in adapter.layers()}
    foreign = [spelled for spelled, name in names.items() if not family.parts(name).keys() & known]
    if foreign:
        block = re.match(rf"{re.escape(family.blocks)}\.(\d+)\.", names[foreign[0]])
        lacks = f"has {depth} blocks" if block and int(block[1]) >= depth else "has no such layer"
        raise InputRefused(
            f"the adapter changes {foreign[0]} ({len(foreign)} of its {len(names)} layers are like it), but the source "
            f"base {lacks}; give the base that the adapter was trained on as SOURCE"
        )
