"""Whatever may hold a value from call to call: what it holds, and how to put that back.

Each kind reads itself into a value of its own that nobody else has, compares it and puts back what
is another now, and only that: other threads may be using it.
"""

from __future__ import annotations

import operator
import random
from collections import OrderedDict, deque
from typing import Any

import torch

ATOMS = frozenset(
    (*(int, float, complex, bool, str, bytes, type(None)), torch.dtype, torch.device, torch.Size)
)


class Holder:
    """Something that holds values, under a path by which its owner knows it."""

    def __init__(self, path: str, held: Any) -> None:
        self.path = path
        self.held = held
        self.then = self.read()

    def read(self) -> Any:
        """What it holds now."""
        raise NotImplementedError

    def restore(self) -> None:
        """Make it hold what it held."""
        raise NotImplementedError

    def changed(self) -> str | None:
        """The path of what is another now; None if nothing is."""
        raise NotImplementedError


class Names(Holder):
    """A dict, whose class may have ways of its own to give what it holds: it is not asked."""

    def read(self) -> Any:
        held = self.held
        if type(held) is dict or not dict.__len__(held):  # nearly all are
            return dict.copy(held)
        return {key: dict.__getitem__(held, key) for key in _kind(held).__iter__(held)}

    def restore(self) -> None:
        held, then, now = self.held, self.then, self.read()
        in_order = len(now) == len(then) and all(map(operator.is_, now, then))
        if in_order and all(map(operator.is_, now.values(), then.values())):
            return
        kind = _kind(held)
        for key in now.keys() - then.keys():
            kind.__delitem__(held, key)
        for key, value in then.items():
            if key not in now or now[key] is not value:
                kind.__setitem__(held, key, value)
        if any(map(operator.is_not, self.read(), then)):  # another order
            kind.clear(held)
            for key, value in then.items():
                kind.__setitem__(held, key, value)

    def changed(self) -> str | None:
        return self.path if self.different() else None

    def different(self) -> list[Any]:
        """The names of what is another now."""
        now, then = self.read(), self.then
        if now.keys() == then.keys():
            return [name for name in then if not _same(now[name], then[name])]
        both = now.keys() & then.keys()
        return [n for n in {**then, **now} if n not in both or not _same(now[n], then[n])]


class Attributes(Names):
    """The dict of an object's attributes, or one that holds them: they have paths of their own."""

    constants = "_tensor_constant"  # where torch.fx keeps tensors that the code makes

    def changed(self) -> str | None:
        for name in self.different():
            if not str(name).startswith(self.constants):
                return f"{self.path}.{name}".lstrip(".")
        return None


class Items(Holder):
    """A list, a set or a deque, whose class is not asked either."""

    def read(self) -> Any:
        return list(_kind(self.held).__iter__(self.held))

    def restore(self) -> None:
        held, then, kind = self.held, self.then, _kind(self.held)
        now = self.read()
        if len(now) == len(then) and all(map(operator.is_, now, then)):
            return
        if kind is list:
            kind.__setitem__(held, slice(None), then)
        else:
            kind.clear(held)
            (kind.update if kind is set else kind.extend)(held, then)

    def changed(self) -> str | None:
        now = self.read()
        if isinstance(self.held, set):
            same = {id(value) for value in now} == {id(value) for value in self.then}
        else:
            same = len(now) == len(self.then) and all(map(_same, now, self.then))
        return None if same else self.path


class Cell(Holder):
    """A variable that a function closes over."""

    def read(self) -> Any:
        try:
            return [self.held.cell_contents]
        except ValueError:  # nothing so far
            return []

    def restore(self) -> None:
        if self.changed() and self.then:
            self.held.cell_contents = self.then[0]

    def changed(self) -> str | None:
        now = self.read()
        same = len(now) == len(self.then) and all(map(_same, now, self.then))
        return None if same else self.path


class Name(Cell):
    """One entry of a namespace that is not the model's: a global, or an attribute of a class."""

    def __init__(self, path: str, held: Any, name: str) -> None:
        self.name = name
        super().__init__(path, held)

    def read(self) -> Any:
        values = vars(self.held) if isinstance(self.held, type) else self.held
        return [values[self.name]] if self.name in values else []

    def restore(self) -> None:
        if not self.changed():
            return
        if isinstance(self.held, type):
            setattr(self.held, self.name, self.then[0])
        else:
            self.held[self.name] = self.then[0]


class Values(Holder):
    """A tensor that is neither a parameter nor a buffer."""

    def read(self) -> Any:
        self._version = self.held._version
        return self.held.detach().clone()

    def restore(self) -> None:
        if self.changed():
            with torch.no_grad():
                self.held.copy_(self.then)

    def changed(self) -> str | None:
        return None if self.held._version == self._version else self.path


class Generator(Holder):
    """A generator of random numbers: Python's, numpy's or torch's."""

    def read(self) -> Any:
        held = self.held
        if isinstance(held, torch.Generator):
            return held.get_state().tolist()
        if hasattr(held, "bit_generator"):
            return held.bit_generator.state
        return held.get_state() if _is_of_numpy(held) else held.getstate()

    def restore(self) -> None:
        if not self.changed():
            return
        held, then = self.held, self.then
        if isinstance(held, torch.Generator):
            held.set_state(torch.tensor(then, dtype=torch.uint8, device="cpu"))
        elif hasattr(held, "bit_generator"):
            held.bit_generator.state = then
        else:
            (held.set_state if _is_of_numpy(held) else held.setstate)(then)

    def changed(self) -> str | None:
        return None if _plain(self.read()) == _plain(self.then) else self.path


def _plain(state: Any) -> Any:
    """The state of a generator as values that can be compared: arrays as their bytes."""
    if isinstance(state, dict):
        return {name: _plain(value) for name, value in state.items()}
    if isinstance(state, tuple):
        return tuple(map(_plain, state))
    return state.tobytes() if hasattr(state, "tobytes") else state


def is_generator(value: Any) -> bool:
    """Whether this draws random numbers."""
    if issubclass(type(value), (random.Random, torch.Generator)):
        return True
    return _is_of_numpy(value) and (hasattr(value, "bit_generator") or hasattr(value, "get_state"))


def _is_of_numpy(value: Any) -> bool:
    return str(type(value).__module__).startswith("numpy.random")


def holder_of(path: str, value: Any) -> Holder | None:
    """The holder of a mutable value; None for others."""
    if issubclass(type(value), dict):
        return Names(path, value)
    if issubclass(type(value), (list, set, deque)):
        return Items(path, value)
    return Generator(path, value) if is_generator(value) else None


def _kind(held: Any) -> Any:
    """Python's own class of what holds several values."""
    return next(kind for kind in (OrderedDict, dict, list, set, deque) if isinstance(held, kind))


def _same(now: Any, then: Any) -> bool:
    return now is then or (type(now) is type(then) and type(now) in ATOMS and bool(now == then))
