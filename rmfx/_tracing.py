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
from collections.abc import Collection, Iterator, Mapping
from functools import partial
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

OWN_GRADIENT = "own_gradient"  # where a gradient is not that of what is computed
CONSTANT = "_tensor_constant"  # where the tracer keeps tensors that the code makes


class _InPlaceProxy(Proxy):
    """Records `x += y` and the like as in-place operations; `fx.Proxy` makes plain ones of them."""

    def _record(self, function: Any, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})


def _recorded(function: Any) -> Any:
    return lambda self, other: self._record(function, other)


IN_PLACE: list[Any] = []
# All that tensors have, of which `x @= y` is none.
for _name in (
    *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"),
    *("and", "or", "xor", "lshift", "rshift"),
):
    setattr(_InPlaceProxy, f"__i{_name}__", _recorded(getattr(operator, f"i{_name}")))
    IN_PLACE.append(getattr(operator, f"i{_name}"))


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
        if not torch.is_grad_enabled():
            node.meta[OWN_GRADIENT] = True
        return node

    def create_arg(self, a: Any) -> Any:
        # fx would give back an ordinary dict.
        if type(a) is OrderedDict:
            return self.create_node("call_function", OrderedDict, (self.create_arg(dict(a)),), {})
        if isinstance(a, dict) and type(a) is not dict:
            raise TraceError(f"it makes a {type(a).__name__}, of which a trace makes a dict")
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


def trace_symbolically(model: nn.Module, *, twice: bool = True) -> fx.GraphModule:
    """The model's graph, with every size left open.

    Args:
        model: the model.
        twice: whether a model that changes itself must do the same when it is called again.

    Raises:
        KeepsStateError: it does not.
        TraceError: the model's code cannot run on proxies.
    """
    tracer = _Tracer()
    buffers = dict(model.named_buffers())
    try:
        with unchanged(model) as state, _no_autocast(), torch.enable_grad():
            graph = tracer.trace(model)
            changed = state.changed()
            if twice and changed is not None:
                _put_back_written(model, buffers)
                if _listed(graph) != _listed(_Tracer().trace(model)):
                    raise _keeps_state(changed)
        with unchanged(model):  # constants, which the tracer has hung on to the model
            for tensor, name in tracer.tensor_attrs.items():
                if "." not in name and isinstance(tensor, Tensor):
                    setattr(model, name, tensor)
            return fx.GraphModule(model, graph, type(model).__name__)
    except TraceError:
        raise
    # Tracing runs the model's own code, which may raise anything.
    except Exception as error:
        raise TraceError(f"{type(error).__name__}: {first_line(error)}") from error


@contextlib.contextmanager
def _no_autocast() -> Iterator[None]:
    """Raise TraceError where the code switches autocast, which leaves no trace."""
    enter = torch.autocast.__enter__

    def refuse(self: torch.autocast) -> None:
        state = "on" if self._enabled else "off"
        raise TraceError(f"its code switches autocast {state} for a part of it")

    torch.autocast.__enter__ = refuse  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.autocast.__enter__ = enter  # type: ignore[method-assign]


@contextlib.contextmanager
def own_gradients(found: list[str]) -> Iterator[None]:
    """Note the functions with gradients of their own that are called; no graph has them."""
    apply = torch.autograd.Function.__dict__["apply"]

    def note(cls: type, *args: Any, **kwargs: Any) -> Any:
        found.append(cls.__name__)
        return apply.__func__(cls, *args, **kwargs)

    torch.autograd.Function.apply = classmethod(note)
    try:
        yield
    finally:
        torch.autograd.Function.apply = apply


def _put_back_written(model: nn.Module, buffers: Mapping[str, Tensor]) -> None:
    """`buffer += 1`, recorded, leaves a proxy where with tensors the buffer itself stays."""
    for path, buffer in buffers.items():
        owner, _, name = path.rpartition(".")
        held: Any = model.get_submodule(owner)._buffers
        node = held[name].node if isinstance(held[name], Proxy) else None
        while node is not None and node.op == "call_function" and node.target in IN_PLACE:
            node = node.args[0]
        if node is not None and (node.op, node.target) == ("get_attr", path):
            held[name] = buffer


def _listed(graph: fx.Graph) -> list[str]:
    """What a graph calls, in words; what it reads of another graph is none of its own."""
    own = set(graph.nodes)
    return [
        f"{n.op} {n.target} {n.args} {n.kwargs} {own.issuperset(n.all_input_nodes)}"
        for n in graph.nodes
    ]


class KeepsStateError(TraceError):
    """A model computes with what it kept of the call before; no way of tracing can show that."""


class _State:
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
def unchanged(model: nn.Module) -> Iterator[_State]:
    """Undo what a model's code assigns to its modules: a trace would leave proxies there.

    What it puts into dicts, lists and sets that belong to them (caches, say) is undone as well.
    """
    state = _State(model)
    try:
        yield state
    finally:
        state.restore()


def _keeps_state(changed: str) -> KeepsStateError:
    return KeepsStateError(
        f"its code changes {changed} and computes with it at the next call, which no graph can; "
        "give it as an input or, where it is a buffer, write to it in place"
    )


# ---- the check ----------------------------------------------------------------------------------

Call = tuple[object, ...]
aten = torch.ops.aten
# What reads size and type of a tensor, but no value.
FILLED = (
    *(aten.new_zeros.default, aten.new_ones.default, aten.new_full.default),
    *(aten.zeros_like.default, aten.ones_like.default, aten.full_like.default),
)


class _Recording(TorchDispatchMode):
    """Writes down every operator that runs, with its arguments; tensors get running numbers.

    A tensor that the code makes of numbers of its own goes by what it holds: a trace has computed
    it already. What is computed of such tensors alone is not written down, but done. What comes of
    the model's tensors alone, or of the size of others, goes by how it does: it may be kept.
    """

    def __init__(
        self,
        mode: FakeTensorMode,
        inputs: Any,
        own: Collection[int],
        before: _Recording | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._mode = mode
        self._own = own
        self.calls: list[Call] = []
        self._numbers: dict[int, int] = {}
        # What tensors without values hold, which tensor of the model they are, and how they follow
        # from those of the model, by their ids.
        self._held: dict[int, Tensor] = before._held if before else {}
        self._written: dict[int, int] = before._written if before else {}
        self._derived: dict[int, str] = before._derived if before else {}
        # An id is a tensor's own for as long as it lives.
        self._alive: list[Tensor] = before._alive if before else []
        self._note(inputs)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = (args, kwargs or {})
        if self._is_of_constants(func, given):
            return self._computed(func, given)
        writes = func._schema.is_mutable
        name = _look if func in FILLED else partial(self._name, writes=writes)
        leaves = [name(leaf) for leaf in pytree.tree_leaves(given)]
        # A model may write to a tensor of its own: let it write to a fake.
        args, kwargs = as_fakes(self._mode, given)
        result = func(*args, **kwargs)
        if func in FILLED or (not writes and self._is_of_weights(func, given)):
            self._note_derived((func, *leaves), result)
            return result
        if writes or any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(result)):
            self.calls.append((func, *leaves))  # no mere question, such as for the device
        self._note_written(func, given[0], result)
        self._note(result)
        return result

    def _is_of_constants(self, func: Any, given: Any) -> bool:
        tensors = [leaf for leaf in pytree.tree_leaves(given) if isinstance(leaf, Tensor)]
        if torch.Tag.nondeterministic_seeded in func.tags:
            return False
        if func._schema.is_mutable:  # a tensor that the model keeps is not ours to write to
            return bool(tensors) and all(id(t) in self._held for t in tensors)
        return all(self._is_constant(t) for t in tensors)

    def _is_of_weights(self, func: Any, given: Any) -> bool:
        tensors = [leaf for leaf in pytree.tree_leaves(given) if isinstance(leaf, Tensor)]
        if not tensors or torch.Tag.nondeterministic_seeded in func.tags:
            return False
        return not any(id(tensor) in self._numbers for tensor in tensors)

    def _note_derived(self, call: Call, result: Any) -> None:
        """What is computed of the model's tensors alone, which it may keep, goes by how it is."""
        how = hashlib.sha256(repr(call).encode()).hexdigest()
        for i, value in enumerate(pytree.tree_leaves(result)):
            if isinstance(value, Tensor):
                self._derived[id(value)] = f"{how} {i}"
                self._alive.append(value)

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

        with unset_fake_temporarily():
            args, kwargs = pytree.tree_map(real, given)
            result = func(*args, **kwargs)
        return pytree.tree_map(fake, result)

    def _note_written(self, func: Any, args: tuple[Any, ...], result: Any) -> None:
        """`buffer += 1` leaves what the operator gives in the place of the buffer."""
        writes = func._schema.is_mutable and args and isinstance(result, Tensor)
        if writes and isinstance(args[0], Tensor) and not isinstance(args[0], FakeTensor):
            self._written[id(result)] = id(args[0])

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
        if id(leaf) in self._derived:
            return ("derived", self._derived[id(leaf)])
        if not writes and self._is_constant(leaf):
            return (
                "constant",
                leaf.dtype,
                tuple(leaf.shape),
                _digest(self._held.get(id(leaf), leaf)),
            )
        return (
            "weight",
            self._written.get(id(leaf), id(leaf)),
        )  # of the model, the same in both runs


def _look(leaf: Any) -> object:
    """What there is to a tensor but its values."""
    return (tuple(leaf.shape), leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf


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
        KeepsStateError: the model does something else when it is called again.
        Whatever the model's own code raises.
    """
    own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    expected = _calls(model, inputs, own)
    try:
        return expected == _calls(gm, inputs, own)
    except Exception:  # noqa: BLE001  (a trace that missed something may fail in any way)
        return False


def check_state(model: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Raise KeepsStateError for a model that does something else when it is called again."""
    own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    try:
        _calls(model, inputs, own)
    except KeepsStateError:
        raise
    except Exception:  # noqa: BLE001  (whoever traces it says better why it does not run)
        return


def _calls(model: nn.Module, inputs: tuple[Any, ...], own: Collection[int]) -> list[Call]:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    # A trace that fails is no news to anybody; torch would print it.
    run = model.forward if isinstance(model, fx.GraphModule) else model

    def record(before: _Recording | None = None) -> tuple[_Recording, list[Call]]:
        others = pytree.tree_map_only(Tensor, torch.empty_like, inputs) if before else inputs
        fake = as_fakes(mode, others)  # what it kept of the call before is no input of this one
        recording = _Recording(mode, fake, own, before)
        with recording:
            result = run(*fake)
        names = tuple(map(recording._name, pytree.tree_leaves(result)))
        return recording, [*recording.calls, names]

    with unchanged(model) as state, mode, torch.no_grad(), warnings.catch_warnings():
        # The model's own, which nobody called; and torch's, of tensors that it keeps in a cache.
        warnings.simplefilter("ignore")
        recording, calls = record()
        changed = state.changed()
        if changed is not None and record(recording)[1] != calls:
            raise _keeps_state(changed)
    return calls


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
