"""Every way to hold a model becomes one graph in one dialect."""

from .tracing import trace, with_constants

__all__ = ["trace", "with_constants"]
