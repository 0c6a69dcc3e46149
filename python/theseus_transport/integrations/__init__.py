"""Theseus as a method of other libraries. Nothing here is imported, and no other library needed, until asked for."""

from __future__ import annotations

import importlib


def install(library: str) -> None:
    """Put Theseus in the place of a library's own implementation of the same method, for this process.

    Args:
        library: ``merge_and_rebase``: what its registry calls ``theseus`` is ours afterwards; the official one goes on
            answering data-free requests.

    Raises:
        ValueError: the library is not known.
        ImportError: the library is not installed.
    """
    if library != "merge_and_rebase":
        raise ValueError(f"there is no integration with {library!r}; choose merge_and_rebase")
    importlib.import_module(f"{__name__}.{library}").install()
