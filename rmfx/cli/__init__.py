"""The command `rmfx`."""

from .main import main

__all__ = ["main"]
