"""What holds for every verb: what is switched on outside stays outside, nothing raw leaves it."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

from ._errors import reported
from ._threads import alone

P = ParamSpec("P")
T = TypeVar("T")


def undisturbed(verb: Callable[P, T]) -> Callable[P, T]:
    """Run a verb outside inference mode and autocast, while nobody else traces.

    No errors come out but those of rmfx, and Python's own of a call that does not fit.

    Weights made in inference mode could never be trained or loaded again, and autocast would round
    the algebra. Code that traces in another thread patches what this one would run.
    """
    signature = inspect.signature(verb)

    @functools.wraps(verb)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            signature.bind(*args, **kwargs)
        except TypeError:
            return verb(*args, **kwargs)  # which does not fit: Python says why
        with contextlib.ExitStack() as stack:
            stack.enter_context(reported(verb.__name__))
            stack.enter_context(alone())
            stack.enter_context(torch.inference_mode(False))
            for device in ("cpu", "cuda"):
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
            return verb(*args, **kwargs)

    return run
