"""What a model keeps from call to call: tracing must not change it, and no graph can show it.

State is looked for in the attributes of modules and of other objects, in dicts, lists, sets and
deques, in generators of random numbers, in what functions close over, in globals that a module's
methods name and in attributes of its class. What is kept elsewhere (an iterator, a file) cannot be
put back; that a model computes with it shows only when it runs again.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import types
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from ._errors import TraceError
from ._holders import ATOMS, Attributes, Cell, Holder, Name, holder_of

Item = tuple[str, Any]
TABLES = ("_buffers", "_parameters", "_modules")
CODE = (types.FunctionType, types.BuiltinFunctionType, types.ModuleType, type)


class KeepsStateError(TraceError):
    """A model computes with what it kept of the call before; no way of tracing can show that."""


class State:
    """What a model holds, directly or by way of what it holds."""

    def __init__(self, model: nn.Module) -> None:
        self._holders: list[Holder] = []
        seen: set[int] = set()
        pending: list[Item] = list(model.named_modules())[::-1]
        while pending:
            path, value = pending.pop()
            if type(value) in ATOMS or id(value) in seen:
                continue
            seen.add(id(value))
            for found in _opened(path, value):
                if isinstance(found, Holder):
                    self._holders.append(found)
                    seen.add(id(found.held))
                elif not issubclass(type(found[1]), (types.ModuleType, Tensor)):
                    pending.append(found)
        self._tables = {id(h.held): h for h in self._holders if isinstance(h.held, dict)}

    def restore(self) -> None:
        """Make it as it was."""
        for holder in self._holders:
            holder.restore()

    def changed(self) -> str | None:
        """The path of an attribute that is another now, or holds something else; None if none."""
        return _first_changed(self._holders)

    def changed_in(self, module: nn.Module) -> str | None:
        """The same of one module, without what is inside of its attributes but in their dicts."""
        attributes = vars(module)
        tables = [v for v in attributes.values() if type(v) in (dict, OrderedDict)]
        known = (self._tables.get(id(table)) for table in (attributes, *tables))
        return _first_changed(holder for holder in known if holder is not None)


def _first_changed(holders: Iterable[Holder]) -> str | None:
    return next((found for holder in holders if (found := holder.changed()) is not None), None)


def _opened(path: str, value: Any) -> Iterator[Holder | Item]:
    """Whatever holds what belongs to a value, and the values inside of it."""
    kind = type(value)
    if issubclass(kind, nn.Module) or _has_attributes(value):
        yield from _attributes(path, value)
    elif (holder := holder_of(path, value)) is not None:
        yield holder
        if isinstance(holder.then, (dict, list)):
            named = holder.then.items() if isinstance(value, dict) else enumerate(holder.then)
            yield from ((f"{path}.{name}".lstrip("."), item) for name, item in named)
    elif kind is tuple:
        yield from ((f"{path}.{i}", item) for i, item in enumerate(value))
    elif kind is types.MethodType:
        yield from ((path, value.__self__), (path, value.__func__))
    elif kind is functools.partial:
        yield from ((path, value.func), (path, value.args), (path, value.keywords))
    elif kind is types.FunctionType and _is_own(value):
        yield from _variables(path, value)
    elif isinstance(value, type) and _is_own(value):
        yield from _attributes_of_class(value)


def _is_own(thing: Any) -> bool:
    """Whether a class or a function is neither torch's nor Python's."""
    package = str(getattr(thing, "__module__", None)).partition(".")[0]
    return package not in ("torch", "numpy") and package not in sys.stdlib_module_names


def _has_attributes(value: Any) -> bool:
    kind = type(value)
    own = kind is types.SimpleNamespace or (not issubclass(kind, (type, Tensor)) and _is_own(kind))
    return own and holder_of("", value) is None and isinstance(getattr(value, "__dict__", 0), dict)


def _attributes(path: str, value: Any) -> Iterator[Holder | Item]:
    attributes = vars(value)
    yield Attributes(path, attributes)
    for name in TABLES if isinstance(value, nn.Module) else ():
        yield Attributes(path, attributes[name])
    for name, held in attributes.items():
        if not isinstance(held, type):
            yield f"{path}.{name}".lstrip("."), held
    for base in type(value).__mro__:
        yield path, base


def _attributes_of_class(kind: type) -> Iterator[Holder | Item]:
    for name, value in vars(kind).items():
        function = getattr(value, "__func__", getattr(value, "fget", value))
        if type(function) is types.FunctionType:
            yield kind.__name__, function
        elif not name.startswith("__") and not issubclass(type(value), CODE):
            yield Name(f"{kind.__name__}.{name}", kind, name)
            yield f"{kind.__name__}.{name}", value


def _variables(path: str, function: types.FunctionType) -> Iterator[Holder | Item]:
    """What a function closes over, its defaults, and the globals that it names."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        holder = Cell(f"{path}.{name}".lstrip("."), cell)
        yield holder
        yield from ((holder.path, value) for value in holder.then if not isinstance(value, type))
    yield from ((path, value) for value in function.__defaults__ or ())
    named = function.__globals__
    for name in _names(function.__code__):
        if name in named and not issubclass(type(named[name]), CODE):
            yield Name(f"{function.__module__}.{name}", named, name)
            yield f"{function.__module__}.{name}", named[name]


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from _names(inner)


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[State]:
    """Undo what a model's code assigns to its modules: a trace would leave proxies there.

    What it puts elsewhere, as far as it can be found there, is undone as well.
    """
    state = State(model)
    try:
        yield state
    finally:
        state.restore()


def keeps_state(changed: str | None) -> KeepsStateError:
    """The error about a model that changes something and computes with it."""
    if changed is None:
        return KeepsStateError(
            "its code does something else when it is called again, with what it keeps in a place "
            "that can be neither seen nor put back (an iterator, say), which no graph can; give it "
            "as an input"
        )
    return KeepsStateError(
        f"its code changes {changed} and computes with it at the next call, which no graph can; "
        "give it as an input or, where it is a buffer, write to it in place"
    )
