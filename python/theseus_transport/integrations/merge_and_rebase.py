"""merge-and-rebase: importing this module registers the method ``theseus_ext`` there.

The library is optional. Its registry is a dict of methods by name behind ``register`` and ``get_method``.
"""

from __future__ import annotations

import importlib
from typing import Any

from .drop_in import DropIn

try:
    registry: Any = importlib.import_module("merge_and_rebase.rebase.registry")
except ImportError as error:
    raise ImportError(
        f"merge-and-rebase cannot be imported ({error}); install it (its name is merge_and_rebase), or use "
        "theseus_transport.integrations.drop_in.DropIn, which needs no registry"
    ) from error
method = DropIn()
registry.register(method)


def install() -> None:
    """Make ours what the registry gives out as ``theseus``; the official one stays behind it for data-free requests."""
    official = registry.get_method("theseus")
    if not isinstance(official, DropIn):
        registry._METHODS["theseus"] = DropIn(name="theseus", official=official)  # register() refuses a taken name
