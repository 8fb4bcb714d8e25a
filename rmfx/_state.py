"""What holds for every verb: what is switched on outside stays outside, nothing raw leaves it."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from types import UnionType
from typing import Any, ParamSpec, TypeVar, Union, get_args, get_origin

import numpy as np
import torch
from torch import Tensor

from ._errors import OptionError, RmfxError, reported
from ._threads import alone

P = ParamSpec("P")
T = TypeVar("T")
_AUTOCAST: ContextVar[dict[str, torch.dtype]] = ContextVar("autocast", default={})  # noqa: B039


def undisturbed(verb: Callable[P, T]) -> Callable[P, T]:
    """Run a verb outside inference mode and autocast, while nobody else traces.

    No errors come out but those of rmfx, and Python's own of a call that does not fit.

    Weights made in inference mode could never be trained or loaded again, and autocast would round
    the algebra. Code that traces in another thread patches what this one would run.
    """

    @functools.wraps(verb)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        given = _arguments(verb, args, kwargs)
        if given is None:
            return verb(*args, **kwargs)  # Python says why it is no call
        with contextlib.ExitStack() as stack:
            stack.enter_context(reported(verb.__name__))
            stack.enter_context(_fitting(verb, given))
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
    """Let arguments that make a verb fail be told from its own failures."""

    @functools.wraps(verb)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with _fitting(verb, _arguments(verb, args, kwargs) or {}):
            return verb(*args, **kwargs)

    return run


def _arguments(verb: Callable[..., Any], args: Any, kwargs: Any) -> dict[str, Any] | None:
    """The arguments of a call by name, None where they do not fit the verb."""
    try:
        return _signature(verb).bind(*args, **kwargs).arguments
    except TypeError:
        return None


@contextlib.contextmanager
def _fitting(verb: Callable[..., Any], given: Mapping[str, Any]) -> Iterator[None]:
    """Say of arguments that are not of the class which annotations name what is wanted.

    A verb's own checks, which say it better, come first; but nothing that is not True or False
    passes for one of them.

    Raises:
        OptionError: the verb fails on an argument, or gets one of another class in place of a bool.
    """
    misfits = _misfits(verb, given)
    if any(_signature(verb).parameters[name].annotation is bool for name in misfits):
        raise _misfit(verb, given, misfits)
    try:
        yield
    except RmfxError:
        raise
    except Exception as error:  # whatever a verb makes of something else
        if misfits:
            raise _misfit(verb, given, misfits) from error
        raise


def check_classes(made: Callable[..., Any], given: Mapping[str, Any]) -> None:
    """Raise OptionError for arguments that are not of the class which annotations name."""
    misfits = _misfits(made, given)
    if misfits:
        raise _misfit(made, given, misfits)


def _misfits(made: Callable[..., Any], given: Mapping[str, Any]) -> list[str]:
    parameters = _signature(made).parameters
    return [name for name, x in given.items() if not _fits(parameters[name].annotation, x)]


def _misfit(verb: Callable[..., Any], given: Mapping[str, Any], names: list[str]) -> OptionError:
    name = names[0]
    text = " ".join(repr(given[name]).split())[:60]
    wanted = inspect.formatannotation(_signature(verb).parameters[name].annotation)
    return OptionError(f"{verb.__name__}: {name}={text}: it takes {wanted}")


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
