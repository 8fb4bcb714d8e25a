"""What callers give besides a model, and whether each of it is of a kind that fits."""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import operator
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from types import UnionType
from typing import (
    Any,
    ParamSpec,
    SupportsFloat,
    SupportsIndex,
    TypeGuard,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
)

import numpy as np
from torch import Tensor

from rmfx.errors import OptionError, RmfxError, ShapeError

P = ParamSpec("P")
T = TypeVar("T")
Inputs = tuple[Any, ...]
_TRUTH = (bool, np.bool_)  # which Python takes for numbers


def typed(verb: Callable[P, T]) -> Callable[P, T]:
    """Let arguments that make a verb fail be told from its own failures."""

    @functools.wraps(verb)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with fitting(verb, declared_arguments(verb, args, kwargs) or {}):
            return verb(*args, **kwargs)

    return run


def declared_arguments(verb: Callable[..., Any], args: Any, kwargs: Any) -> dict[str, Any] | None:
    """The arguments of a call by name, None where they do not fit the verb."""
    try:
        return _signature(verb).bind(*args, **kwargs).arguments
    except TypeError:
        return None


@contextlib.contextmanager
def fitting(verb: Callable[..., Any], given: Mapping[str, Any]) -> Iterator[None]:
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
    wanted = inspect.formatannotation(_signature(verb).parameters[name].annotation)
    told = re.sub(r"(\w+\.)+", "", wanted).replace(" | ", " or ")
    return OptionError(f"{verb.__name__}: {name}={shown(given[name])}: it takes {told}")


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
    classes: dict[type, Any] = {bool: _TRUTH, Path: os.PathLike}
    return isinstance(value, classes.get(kind, kind))


def as_tuple(inputs: Any) -> tuple[Any, ...]:
    """Inputs, one or several, as arguments."""
    return tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)


def patterns_of(name: str, given: str | Iterable[str], paths: Iterable[str]) -> tuple[str, ...]:
    """Patterns such as "layer4.*" that an option holds, one or several.

    Raises:
        OptionError: they are no patterns, or one is of none of the paths that it could mean.
    """
    patterns = (given,) if isinstance(given, str) else given
    if not isinstance(patterns, Iterable) or not all(isinstance(p, str) for p in patterns):
        raise OptionError(f"{name}={given!r} must be a pattern such as 'layer4.*', or several")
    patterns = tuple(patterns)
    known = list(paths)
    for pattern in patterns:
        if not any(fnmatchcase(path, pattern) for path in known):
            some = ", ".join(known[:3]) or "there is none"
            raise OptionError(
                f"{name}={pattern!r} is of no layer that could be meant (such as {some}); "
                "patterns look like 'layer4.*'"
            )
    return patterns


def is_named(path: str, patterns: Iterable[str]) -> bool:
    """Whether one of some patterns such as "layer4.*" is of a module's path."""
    return any(fnmatchcase(path, pattern) for pattern in patterns)


def as_inputs(example_inputs: Any) -> Inputs | None:
    """Example inputs as a tuple of arguments.

    Raises:
        ShapeError: they are whole numbers alone, which is a shape and nothing that has one.
    """
    if example_inputs is None:
        return None
    inputs = as_tuple(example_inputs)
    if inputs and all(type(x) is int for x in inputs):  # not sizes of Dynamo's, nor tensors
        sizes = ", ".join(map(str, inputs))
        raise ShapeError(
            f"example_inputs={shown(example_inputs)}: pass a tensor, not a shape, such as"
            f" torch.zeros({sizes})"
        )
    return inputs


# ---- numbers and words --------------------------------------------------------------------------
def is_number(value: object) -> bool:
    """Whether an option is a number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_whole(value: object) -> TypeGuard[SupportsIndex]:
    """Whether an option is a whole number."""
    try:
        operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return False
    return not isinstance(value, _TRUTH)


def number_of(
    name: str,
    given: object,
    *,
    least: float = -math.inf,
    above: float | None = None,
    most: float = math.inf,
    below: float | None = None,
) -> float:
    """The number that an option holds, which may be one of numpy or a tensor without dimensions.

    Args:
        name: of the option.
        given: its value.
        least, above, most, below: its bounds; `below=math.inf` asks for a finite number.

    Raises:
        OptionError: it is no number, NaN, or out of bounds.
    """
    value = math.nan
    is_array = getattr(given, "ndim", 0) > 0
    if isinstance(given, SupportsFloat) and not isinstance(given, _TRUTH) and not is_array:
        value = float(given)
    inside = (above is None or value > above) and (below is None or value < below)
    if not (inside and least <= value <= most):
        bounds = {"at least": least, "above": above, "at most": most, "below": below}
        known = {word: n for word, n in bounds.items() if n is not None and math.isfinite(n)}
        told = " and ".join(f"{word} {n:g}" for word, n in known.items())
        kind = "a finite number" if below == math.inf else "a number"
        raise OptionError(f"{name}={shown(given)} must be {kind}{told and ' '}{told}")
    return value


def count_of(name: str, given: object, least: int = 1, most: int | None = None) -> int:
    """The whole number that an option holds.

    Raises:
        OptionError: it holds something else, or one out of bounds.
    """
    value = operator.index(given) if is_whole(given) else None
    if value is None or value < least or (most is not None and value > most):
        told = "" if most is None else f" and at most {most}"
        raise OptionError(f"{name}={shown(given)} must be a whole number, at least {least}{told}")
    return value


def check_choice(name: str, given: object, known: Iterable[str]) -> None:
    """Raise OptionError unless an option is one of some words."""
    if not isinstance(given, str) or given not in known:
        raise OptionError(f"{name}={shown(given)}: choose from {', '.join(known)}")


def has_arrays(inputs: Iterable[object]) -> bool:
    """Whether one of some inputs is an array of numpy."""
    return any(isinstance(x, np.ndarray) for x in inputs)


def shapes_shown(inputs: Iterable[object]) -> str:
    """Inputs as messages show them: tensors by their shapes."""
    return f"[{', '.join(map(_shape_shown, inputs))}]"


def _shape_shown(value: object) -> str:
    """A tensor by its shape, whatever holds it; anything else as it is."""
    if isinstance(value, Tensor):
        return str(tuple(value.shape))
    if isinstance(value, Mapping):
        parts = (f"{key!r}: {_shape_shown(part)}" for key, part in value.items())
        return f"{{{', '.join(parts)}}}"
    if type(value) in (list, tuple):
        return shapes_shown(cast("Iterable[object]", value))
    return shown(value)


def with_article(value: object) -> str:
    """The class of a value in a sentence: "an int", "a dict"."""
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiouAEIO' else 'a'} {name}"


def shown(value: object) -> str:
    """A value as messages show it: short, and of arrays the shape alone."""
    if isinstance(value, (Tensor, np.ndarray)) and value.ndim:
        return f"{type(value).__name__} of shape {tuple(value.shape)}"
    return " ".join(repr(value).split())[:60]
