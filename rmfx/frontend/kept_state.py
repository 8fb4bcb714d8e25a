"""What a model keeps from call to call: tracing must not change it, and no graph can show it.

State is looked for in the attributes of modules and of other objects, in dicts, lists, sets and
deques, in generators of random numbers, in what functions close over, in globals that a module's
methods name and in attributes of its class. What is kept elsewhere (an iterator, a file) cannot be
put back; that a model computes with it shows only when it runs again.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import sys
import types
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from rmfx.errors import TraceError

from .holders import ATOMS, Attributes, Cell, Holder, Items, Name, Values, holder_of

Item = tuple[str, Any]
TABLES = ("_buffers", "_parameters", "_modules")
OF_GLOBALS = ("LOAD_GLOBAL", "LOAD_NAME", "STORE_GLOBAL", "DELETE_GLOBAL")
CODE = (types.FunctionType, types.BuiltinFunctionType, types.ModuleType, type)


class KeepsStateError(TraceError):
    """A model computes with what it kept of the call before; no way of tracing can show that."""


class State:
    """What a model holds, directly or by way of what it holds.

    With `values`, also what is in its tensors that are neither parameters nor buffers.
    """

    def __init__(self, model: nn.Module, *, values: bool = False) -> None:
        self._holders: list[Holder] = []
        self.hidden: str | None = None  # the path of a value that may hold what nobody can see
        seen: set[int] = set()
        pending: list[Item] = list(model.named_modules())[::-1]
        while pending:
            path, value = pending.pop()
            if type(value) in ATOMS or id(value) in seen:
                continue
            seen.add(id(value))
            if values and isinstance(value, Tensor) and not value.is_inference():
                self._holders.append(Values(path, value))
            opened = _opened(path, value)
            if opened is None:
                self.hidden = self.hidden or path
                continue
            for found in opened:
                if isinstance(found, Holder):
                    self._holders.append(found)
                    seen.add(id(found.held))
                else:
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


def _opened(path: str, value: Any) -> Iterable[Holder | Item] | None:
    """Whatever holds what belongs to a value, and the values inside of it; None if unknown."""
    kind = type(value)
    if issubclass(kind, nn.Module):
        return _attributes(path, value)
    if (holder := holder_of(path, value)) is not None:
        return _contents(holder)
    if issubclass(kind, (tuple, frozenset)):
        return [(f"{path}.{i}", item) for i, item in enumerate(value)]
    if kind is types.MethodType:
        return [(path, value.__self__), (path, value.__func__)]
    if kind is types.BuiltinFunctionType:
        return [(path, value.__self__)]
    if kind is functools.partial:
        return [(path, value.func), (path, value.args), (path, value.keywords)]
    if kind is types.FunctionType:
        return _variables(path, value) if _is_own(value) else ()
    if isinstance(value, type):
        return _attributes_of_class(value) if _is_own(value) else ()
    if issubclass(kind, (types.ModuleType, Tensor, slice, range)) or kind.__module__ == "torch":
        return ()
    return _attributes(path, value) if _has_attributes(value) else None


def _contents(holder: Holder) -> Iterator[Holder | Item]:
    """What is inside of a dict, a list, a set or a deque; a generator holds numbers."""
    yield holder
    if isinstance(holder.held, dict):
        for name, value in holder.then.items():
            if type(value) not in ATOMS:
                yield f"{holder.path}.{name}", value
    elif isinstance(holder, Items):
        for i, value in enumerate(holder.then):
            if type(value) not in ATOMS:
                yield f"{holder.path}.{i}", value


@functools.cache
def _is_own_package(package: str) -> bool:
    return package not in ("torch", "numpy") and package not in sys.stdlib_module_names


def _is_own(thing: Any) -> bool:
    """Whether a class or a function is neither torch's nor Python's."""
    return _is_own_package(str(getattr(thing, "__module__", None)).partition(".")[0])


def _has_attributes(value: Any) -> bool:
    own = type(value) is types.SimpleNamespace or _is_own(type(value))
    return own and isinstance(getattr(value, "__dict__", None), dict)


def _attributes(path: str, value: Any) -> Iterator[Holder | Item]:
    attributes = vars(value)
    yield Attributes(path, attributes)
    for name in TABLES if isinstance(value, nn.Module) else ():
        yield Attributes(path, attributes[name])
    for name, held in attributes.items():
        if type(held) not in ATOMS:
            yield f"{path}.{name}".lstrip("."), held
    for base in type(value).__mro__:
        if _is_own(base):
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
        yield from ((holder.path, value) for value in holder.then)
    yield from ((path, value) for value in function.__defaults__ or ())
    named = function.__globals__
    for name in _names(function.__code__):
        if name in named and not issubclass(type(named[name]), CODE):
            yield Name(f"{function.__module__}.{name}", named, name)
            yield f"{function.__module__}.{name}", named[name]


@functools.lru_cache(maxsize=1 << 14)  # code never changes, and is looked at in every trace
def _names(code: types.CodeType) -> tuple[str, ...]:
    """The globals that code names; attributes are among its names, too."""
    found = dict.fromkeys(i.argval for i in dis.get_instructions(code) if i.opname in OF_GLOBALS)
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            found |= dict.fromkeys(_names(inner))
    return tuple(found)


@contextlib.contextmanager
def unchanged(model: nn.Module, *, values: bool = False) -> Iterator[State]:
    """Undo what a model's code assigns to its modules: a trace would leave proxies there.

    What it puts elsewhere, as far as it can be found there, is undone as well; with `values` also
    what it writes to tensors that are neither parameters nor buffers.
    """
    state = State(model, values=values)
    try:
        yield state
    finally:
        state.restore()


def keeps_state(changed: str | None, hidden: str | None = None) -> KeepsStateError:
    """The error about a model that changes something and computes with it.

    Args:
        changed: the path of what it changes, where that can be seen.
        hidden: the path of a value that may hold what nobody can see.
    """
    if changed is not None:
        return KeepsStateError(
            f"its code changes {changed} and computes with it at the next call, which no graph "
            "can; give it as an input or, where it is a buffer, write to it in place"
        )
    place = "a place that cannot be seen" if hidden is None else f"{hidden} or another such place"
    return KeepsStateError(
        "its code does something else when it is called again, which no graph can: it keeps "
        f"something in {place}, which can be put back by its owner only; give it as an input"
    )
