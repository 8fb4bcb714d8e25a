"""Symbolic tracing, and the check that it recorded what the model does.

`torch.fx` runs a model's Python code with proxies instead of tensors. Where the code looks at them
(`isinstance(x, Tensor)`, `str(x.device)`) it may take another way than with tensors, without an
error. So where example inputs are known both the model and its trace run on fake tensors, and every
operator they call, with the values it reads, must be the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import operator
import sys
import warnings
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator
from types import FrameType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import (
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.fx.proxy import Proxy
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ._activation import OWN_ACTIVATIONS
from ._errors import TraceError


class _InPlaceProxy(Proxy):
    """Records `x += y` and the like as in-place operations; `fx.Proxy` makes plain ones of them."""

    def _record(self, function: Any, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})


def _recorded(function: Any) -> Any:
    return lambda self, other: self._record(function, other)


# All that tensors have, of which `x @= y` is none.
for _name in (
    *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"),
    *("and", "or", "xor", "lshift", "rshift"),
):
    setattr(_InPlaceProxy, f"__i{_name}__", _recorded(getattr(operator, f"i{_name}")))


class _Tracer(fx.Tracer):
    """The symbolic tracer, with in-place operators and source lines."""

    # A buffer that forward() changes must show in the graph instead of being changed by tracing.
    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) in OWN_ACTIVATIONS or super().is_leaf_module(m, module_qualified_name)

    def proxy(self, node: fx.Node) -> Proxy:
        return _InPlaceProxy(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta["source"] = _user_line()
        return node

    def create_arg(self, a: Any) -> Any:
        # fx would give back an ordinary dict.
        if type(a) is OrderedDict:
            return self.create_node("call_function", OrderedDict, (self.create_arg(dict(a)),), {})
        return super().create_arg(a)


def _user_line() -> str | None:
    """The place ("file.py:12") of the innermost frame that is neither PyTorch nor this file."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if is_user_file(path):
            return f"{path}:{frame.f_lineno}"
        frame = frame.f_back
    return None


def is_user_file(path: str) -> bool:
    """Whether code of a file is neither PyTorch's nor the tracer's."""
    return "/torch/" not in path.replace("\\", "/") and path != __file__


def trace_symbolically(model: nn.Module) -> fx.GraphModule:
    """The model's graph, with every size left open.

    Raises:
        TraceError: the model's code cannot run on proxies.
    """
    tracer = _Tracer()
    try:
        with unchanged(model):
            graph = tracer.trace(model)
        with unchanged(model):  # constants, which the tracer has hung on to the model
            for tensor, name in tracer.tensor_attrs.items():
                if "." not in name and isinstance(tensor, Tensor):
                    setattr(model, name, tensor)
            return fx.GraphModule(model, graph, type(model).__name__)
    # Tracing runs the model's own code, which may raise anything.
    except Exception as error:
        raise TraceError(f"{type(error).__name__}: {first_line(error)}") from error


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Undo what a model's code assigns to its modules: a trace would leave proxies there.

    What it puts into dicts, lists and sets that belong to them (caches, say) is undone as well.
    """
    modules = list(model.modules())
    before = [dict(vars(m)) for m in modules]
    contents: list[tuple[Any, Any]] = []
    for attributes in before:
        _note_contents(attributes.values(), contents, set())
    try:
        yield
    finally:
        for module, attributes in zip(modules, before, strict=True):
            vars(module).clear()
            vars(module).update(attributes)
        for container, values in contents:
            container.clear()
            (container.extend if isinstance(container, list) else container.update)(values)


def _note_contents(values: Iterable[Any], found: list[tuple[Any, Any]], seen: set[int]) -> None:
    """Add every container among some values, and inside them, with a copy of what it holds."""
    for value in values:
        if isinstance(value, (dict, list, set)) and id(value) not in seen:
            seen.add(id(value))
            found.append((value, value.copy()))
            _note_contents(value.values() if isinstance(value, dict) else value, found, seen)


# ---- the check ----------------------------------------------------------------------------------

Call = tuple[object, ...]


class _Recording(TorchDispatchMode):
    """Writes down every operator that runs, with its arguments; tensors get running numbers.

    A tensor that the code makes of numbers of its own goes by what it holds: a trace has computed
    it already. What is computed of such tensors alone is not written down, but done.
    """

    def __init__(self, mode: FakeTensorMode, inputs: Any, own: Collection[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._mode = mode
        self._own = own
        self.calls: list[Call] = []
        self._numbers: dict[int, int] = {}
        self._held: dict[int, Tensor] = {}  # what tensors without values hold, by their ids
        self._alive: list[Tensor] = []  # an id is a tensor's own for as long as it lives
        self._note(inputs)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = (args, kwargs or {})
        if self._is_of_constants(func, given):
            return self._computed(func, given)
        writes = func._schema.is_mutable
        leaves = [self._name(leaf, writes=writes) for leaf in pytree.tree_leaves(given)]
        # A model may write to a tensor of its own: let it write to a fake.
        args, kwargs = as_fakes(self._mode, given)
        result = func(*args, **kwargs)
        self.calls.append((func, *leaves))
        self._note(result)
        return result

    def _is_of_constants(self, func: Any, given: Any) -> bool:
        tensors = [leaf for leaf in pytree.tree_leaves(given) if isinstance(leaf, Tensor)]
        if torch.Tag.nondeterministic_seeded in func.tags:
            return False
        if func._schema.is_mutable:  # a tensor that the model keeps is not ours to write to
            return bool(tensors) and all(id(t) in self._held for t in tensors)
        return all(self._is_constant(t) for t in tensors)

    def _is_constant(self, value: Tensor) -> bool:
        if id(value) in self._held:
            return id(value) not in self._numbers
        return not isinstance(value, FakeTensor) and id(value) not in self._own

    def _computed(self, func: Any, given: Any) -> Any:
        """What an operator makes of constants, for which a fake stands."""
        fakes: dict[int, Tensor] = {}

        def real(leaf: Any) -> Any:
            held = self._held.get(id(leaf), leaf)
            fakes[id(held)] = leaf
            return held

        def fake(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            made = fakes.get(id(leaf))  # an operator in place gives what it was given
            if not isinstance(made, FakeTensor):
                made = self._mode.from_tensor(leaf, static_shapes=True)
                self._held[id(made)] = leaf
                self._alive.append(made)
            return made

        args, kwargs = pytree.tree_map(real, given)
        with unset_fake_temporarily():
            result = func(*args, **kwargs)
        return pytree.tree_map(fake, result)

    def _note(self, values: Any) -> None:
        for value in pytree.tree_leaves(values):
            if isinstance(value, Tensor) and id(value) not in self._numbers:
                self._numbers[id(value)] = len(self._numbers)
                self._alive.append(value)

    def _name(self, leaf: Any, *, writes: bool = False) -> object:
        if not isinstance(leaf, Tensor):
            return repr(leaf) if isinstance(leaf, float) else leaf
        if id(leaf) in self._numbers:
            return ("value", self._numbers[id(leaf)])
        if not writes and self._is_constant(leaf):
            return (
                "constant",
                leaf.dtype,
                tuple(leaf.shape),
                _digest(self._held.get(id(leaf), leaf)),
            )
        return ("weight", id(leaf))  # of the model, the same in both runs


def _digest(value: Tensor) -> str:
    """A short form of what a tensor holds."""
    with unset_fake_temporarily():
        numbers = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        return hashlib.sha256(numbers.numpy().tobytes()).hexdigest()


def records_the_same(model: nn.Module, gm: fx.GraphModule, inputs: tuple[Any, ...]) -> bool:
    """Whether a model and its trace call the same operators on the same values.

    Args:
        model, gm: the model and what was traced of it, sharing its tensors.
        inputs: example inputs; only their shapes and types are used.

    Raises:
        Whatever the model's own code raises.
    """
    own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    expected = _calls(model, inputs, own)
    try:
        return expected == _calls(gm, inputs, own)
    except Exception:  # noqa: BLE001  (a trace that missed something may fail in any way)
        return False


def _calls(model: nn.Module, inputs: tuple[Any, ...], own: Collection[int]) -> list[Call]:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fake = as_fakes(mode, inputs)
    recording = _Recording(mode, fake, own)
    with unchanged(model), mode, recording, torch.no_grad(), warnings.catch_warnings():
        # The model's own, which nobody called; and torch's, of tensors that it keeps in a cache.
        warnings.simplefilter("ignore")
        result = model(*fake)
    return [*recording.calls, tuple(recording._name(x) for x in pytree.tree_leaves(result))]


def as_fakes(mode: FakeTensorMode, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The inputs with tensors that have shape and type, but no values."""

    def fake(x: Any) -> Any:
        is_real = isinstance(x, Tensor) and not isinstance(x, FakeTensor)
        return mode.from_tensor(x, static_shapes=True) if is_real else x

    fakes: tuple[Any, ...] = pytree.tree_map(fake, inputs)
    return fakes


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return (str(error).strip().splitlines() or ["no message"])[0]
