"""What a model keeps from call to call: tracing must not change it, and no graph can show it."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from ._errors import TraceError

CONSTANT = "_tensor_constant"  # where torch.fx keeps tensors that the code makes


class KeepsStateError(TraceError):
    """A model computes with what it kept of the call before; no way of tracing can show that."""


class State:
    """What a model's modules hold, by attributes, and what is in their dicts, lists and sets."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = dict(model.named_modules())
        self._attributes = {path: dict(vars(m)) for path, m in self._modules.items()}
        self._contents: list[tuple[str, Any, Any]] = []
        for path, attributes in self._attributes.items():
            _note_contents(path, attributes, self._contents, set())

    def restore(self) -> None:
        """Make it as it was."""
        for path, attributes in self._attributes.items():
            held: Any = vars(self._modules[path])
            held.clear()
            held.update(attributes)
        for _, container, values in self._contents:
            container.clear()
            (container.extend if isinstance(container, list) else container.update)(values)

    def changed(self) -> str | None:
        """The path of an attribute that is another now, or holds something else; None if none."""
        for path, attributes in self._attributes.items():
            held = vars(self._modules[path])
            for name in {**attributes, **held}:
                same = name in held and name in attributes and held[name] is attributes[name]
                if not same and not name.startswith(CONSTANT):
                    return f"{path}.{name}".lstrip(".")
        for path, now, then in self._contents:
            if not _same_items(now, then):
                keys = [k for k in then if now.get(k) is not then[k]] if path == "_buffers" else []
                return keys[0] if keys else path
        return None


def _note_contents(
    path: str, values: Mapping[Any, Any], found: list[tuple[str, Any, Any]], seen: set[int]
) -> None:
    """Add every container among some values, and inside them, with a copy of what it holds."""
    for name, value in values.items():
        if isinstance(value, (dict, list, set)) and id(value) not in seen:
            seen.add(id(value))
            own = f"{path}.{name}".lstrip(".")
            found.append((own, value, value.copy()))
            items = value if isinstance(value, dict) else dict(enumerate(value))
            _note_contents(own, items, found, seen)


def _same_items(now: Any, then: Any) -> bool:
    """Whether a container holds the very objects it held."""
    if isinstance(now, dict):
        return now.keys() == then.keys() and all(now[key] is then[key] for key in then)
    if isinstance(now, list):
        return len(now) == len(then) and all(map(operator.is_, now, then))
    return {id(value) for value in now} == {id(value) for value in then}


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[State]:
    """Undo what a model's code assigns to its modules: a trace would leave proxies there.

    What it puts into dicts, lists and sets that belong to them (caches, say) is undone as well.
    """
    state = State(model)
    try:
        yield state
    finally:
        state.restore()


def keeps_state(changed: str) -> KeepsStateError:
    """The error about a model that changes an attribute and computes with it."""
    return KeepsStateError(
        f"its code changes {changed} and computes with it at the next call, which no graph can; "
        "give it as an input or, where it is a buffer, write to it in place"
    )
