"""Passes compute weights; what the caller has switched on for networks must not reach them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

from ._threads import alone

P = ParamSpec("P")
T = TypeVar("T")


def undisturbed(verb: Callable[P, T]) -> Callable[P, T]:
    """Run a verb outside inference mode and autocast, and while nobody else traces.

    Weights made in inference mode could never be trained or loaded again, and autocast would round
    the algebra. Code that traces in another thread patches what this one would run.
    """

    @functools.wraps(verb)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with contextlib.ExitStack() as stack:
            stack.enter_context(alone())
            stack.enter_context(torch.inference_mode(False))
            for device in ("cpu", "cuda"):
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
            return verb(*args, **kwargs)

    return run
