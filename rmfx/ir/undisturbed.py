"""What holds for every verb: what is switched on outside stays outside, nothing raw leaves it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import torch

from rmfx.errors import reported
from rmfx.options import P, T, declared_arguments, fitting

from .threads import alone

_AUTOCAST: ContextVar[dict[str, torch.dtype]] = ContextVar("autocast", default={})  # noqa: B039


def undisturbed(verb: Callable[P, T]) -> Callable[P, T]:
    """Run a verb outside inference mode and autocast, while nobody else traces.

    No errors come out but those of rmfx, and Python's own of a call that does not fit.

    Weights made in inference mode could never be trained or loaded again, and autocast would round
    the algebra. Code that traces in another thread patches what this one would run.
    """

    @functools.wraps(verb)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        given = declared_arguments(verb, args, kwargs)
        if given is None:
            return verb(*args, **kwargs)  # Python says why it is no call
        with contextlib.ExitStack() as stack:
            stack.enter_context(reported(verb.__name__))
            stack.enter_context(fitting(verb, given))
            stack.enter_context(alone())
            stack.enter_context(torch.inference_mode(False))
            types = _autocast_types()
            for device in types:
                stack.enter_context(torch.autocast(device, enabled=False))
            if types:
                stack.callback(_AUTOCAST.reset, _AUTOCAST.set(types))
            return verb(*args, **kwargs)

    return run


def _autocast_types() -> dict[str, torch.dtype]:
    """The devices for which autocast is on, with the type it casts to."""
    devices = [device for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)]
    return {device: torch.get_autocast_dtype(device) for device in devices}


@contextlib.contextmanager
def autocast_of_caller() -> Iterator[dict[str, torch.dtype]]:
    """Switch autocast on again as the caller of a verb has it; gives the types it casts to."""
    with contextlib.ExitStack() as stack:
        for device, dtype in _AUTOCAST.get().items():
            stack.enter_context(torch.autocast(device, dtype))
        yield _autocast_types()
