"""What holds for every verb: what is switched on outside stays outside, nothing raw leaves it."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from pathlib import Path
from types import UnionType
from typing import Any, ParamSpec, TypeVar, Union, get_args, get_origin

import numpy as np
import torch
from torch import Tensor

from ._errors import OptionError, reported
from ._threads import alone

P = ParamSpec("P")
T = TypeVar("T")
_AUTOCAST: ContextVar[dict[str, torch.dtype]] = ContextVar("autocast", default={})  # noqa: B039


def undisturbed(verb: Callable[P, T]) -> Callable[P, T]:
    """Run a verb outside inference mode and autocast, while nobody else traces.

    No errors come out but those of rmfx, and Python's own of a call that does not fit. Arguments
    have to be what annotations say, by their class alone.

    Weights made in inference mode could never be trained or loaded again, and autocast would round
    the algebra. Code that traces in another thread patches what this one would run.
    """

    @functools.wraps(verb)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        if not _is_call(verb, args, kwargs):
            return verb(*args, **kwargs)  # Python says why it is none
        with contextlib.ExitStack() as stack:
            stack.enter_context(reported(verb.__name__))
            stack.enter_context(alone())
            stack.enter_context(torch.inference_mode(False))
            types = _autocast_types()
            for device in types:
                stack.enter_context(torch.autocast(device, enabled=False))
            if types:
                stack.callback(_AUTOCAST.reset, _AUTOCAST.set(types))
            return verb(*args, **kwargs)

    return run


def typed(verb: Callable[P, T]) -> Callable[P, T]:
    """Let arguments be what annotations say, by their class alone."""

    @functools.wraps(verb)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        _is_call(verb, args, kwargs)
        return verb(*args, **kwargs)

    return run


def _is_call(verb: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a verb takes as many arguments, under these names.

    Raises:
        OptionError: an argument has another class than its annotation names.
    """
    signature = _signature(verb)
    try:
        given = signature.bind(*args, **kwargs).arguments
    except TypeError:
        return False
    for name, value in given.items():
        hint = signature.parameters[name].annotation
        if not _fits(hint, value):
            text = " ".join(repr(value).split())[:60]
            wanted = inspect.formatannotation(hint)
            raise OptionError(f"{verb.__name__}: {name}={text}: it takes {wanted}")
    return True


@functools.cache
def _signature(verb: Callable[..., Any]) -> inspect.Signature:
    # Late, since modules that import one another have no annotations to look up before.
    return inspect.signature(verb, eval_str=True)


def _fits(hint: Any, value: Any) -> bool:
    """Whether a value is of a class that an annotation names; numbers only must be no arrays."""
    kind = get_origin(hint) or hint
    if isinstance(hint, TypeVar):
        return _fits(hint.__bound__, value)
    if kind in (Union, UnionType):
        return any(_fits(choice, value) for choice in get_args(hint))
    if kind in (int, float):
        return value is not None and not isinstance(value, (Tensor, np.ndarray))
    if kind is Iterable:
        return isinstance(value, Iterable) or hasattr(value, "__getitem__")
    if kind is Any or not isinstance(kind, type):
        return True
    classes: dict[type, Any] = {bool: (bool, np.bool_), Path: os.PathLike}
    return isinstance(value, classes.get(kind, kind))


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
