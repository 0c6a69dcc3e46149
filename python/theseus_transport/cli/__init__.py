"""The command: options, screens, errors."""

from .main import app, main

__all__ = ["app", "main"]
