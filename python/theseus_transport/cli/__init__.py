"""The command: options, screens, errors."""

from .main import main

__all__ = ["main"]
