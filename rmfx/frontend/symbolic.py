"""Symbolic tracing: in-place operators, source lines, and what leaves no trace."""

from __future__ import annotations

import contextlib
import operator
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import Proxy

from rmfx.errors import TraceError
from rmfx.files.source_lines import described, short_path
from rmfx.ir.functions import IN_PLACE_SYMBOLS
from rmfx.ir.nodes import replaced_method
from rmfx.ir.notes import OWN_GRADIENT, SOURCE
from rmfx.ir.threads import alone, for_this_thread, replaced
from rmfx.modules.activations import OWN_ACTIVATIONS
from rmfx.options import with_article

from .draws import no_draws
from .kept_state import State, keeps_state, unchanged
from .watches import Outside

BAKED = "baked"  # an operator that ran on the model's tensors while it was traced


# What is asked of a proxy in vain, by what happens then; a tensor has an answer.
ASKED_IN_VAIN = {
    "__len__": "asks for the length of a value",
    "__int__": "makes a number of a value",
    "__float__": "makes a number of a value",
    "__contains__": "looks for something in a value",
}


# Attributes that a proxy answers with another proxy, which no code is prepared for.
ASKED_WRONGLY = ("grad_fn", "grad", "layout")


# Attributes of tensors that code assigns, of which a proxy would keep the value to itself.
ASSIGNED = ("data", "real", "imag", "grad", "requires_grad")


class _InPlaceProxy(Proxy):
    """Records `x += y` and the like as in-place operations; `fx.Proxy` makes plain ones of them."""

    def __getattr__(self, k: str) -> Any:
        if k in ASKED_WRONGLY:
            raise self.tracer.refused(f"asks for a value's {k}")  # type: ignore[attr-defined]
        return _Attribute(self, k)

    def __setattr__(self, k: str, value: Any) -> None:
        # `x.real *= 2` writes in place, and then puts there what is there already.
        if k in ASSIGNED and not (isinstance(value, Proxy) and _writes_to(value.node, self, k)):
            raise self.tracer.refused(f"assigns a value's {k}")  # type: ignore[attr-defined]
        if k not in ASSIGNED:
            super().__setattr__(k, value)

    def _record(self, function: Any, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})


class _Attribute(fx.proxy.Attribute, _InPlaceProxy):
    """An attribute of a value, which may be a view of its memory."""

    def __hash__(self) -> int:
        if self.attr in ("dtype", "device", "shape"):
            raise self.tracer.refused(f"looks up a value's {self.attr}")  # type: ignore[attr-defined]
        return id(self)


def _asked_in_vain(what: str) -> Any:
    def ask(self: Any, *others: Any) -> Any:
        raise self.tracer.refused(what)

    return ask


for _name, _what in ASKED_IN_VAIN.items():
    setattr(_InPlaceProxy, _name, _asked_in_vain(_what))


def _writes_to(node: fx.Node, x: Proxy, attribute: str) -> bool:
    """Whether a node has just written in place to an attribute of a value."""
    written = node.args[0] if node.target in IN_PLACE else None
    return isinstance(written, fx.Node) and written.args == (x.node, attribute)


def _recorded(function: Any) -> Any:
    return lambda self, other: self._record(function, other)


IN_PLACE = [getattr(operator, name) for name in IN_PLACE_SYMBOLS]


for _name, _function in zip(IN_PLACE_SYMBOLS, IN_PLACE, strict=True):
    setattr(_InPlaceProxy, f"__{_name}__", _recorded(_function))


class _Tracer(fx.Tracer):
    """The symbolic tracer, with in-place operators, source lines, and what leaves no trace."""

    # A buffer that forward() changes must show in the graph instead of being changed by tracing.
    proxy_buffer_attributes = True

    def __init__(self, state: State) -> None:
        super().__init__()
        self._state = state
        self._autocast = _autocast_state()
        self.baked: str | None = None  # an operator on the model's tensors that leaves no trace
        self._refusal: TraceError | None = None  # the first that the model's code may have caught

    def run(self, model: nn.Module) -> fx.Graph:
        """Trace it; raise TraceError for computations that the graph would not hold."""
        with Outside(model) as outside, torch.enable_grad(), self._mode_hidden():
            graph = self.trace(model)
        if self._refusal is not None:
            raise TraceError(f"{self._refusal}, and its code catches the error that this raises")
        self.baked = outside.baked
        return graph

    def refused(self, what: str) -> TraceError:
        """The error for what nobody can do with a value that is not there."""
        error = TraceError(f"it {what}, which no trace can tell")
        self._refusal = self._refusal or error
        return error

    @contextlib.contextmanager
    def _mode_hidden(self) -> Iterator[None]:
        """Let the model's code not ask whether gradients are computed: calls differ in that."""
        known = torch.is_grad_enabled

        def ask() -> bool:
            if is_user_file(sys._getframe(2).f_code.co_filename):  # behind the choice of threads
                raise self.refused("asks whether gradients are computed")
            return known()

        with replaced(torch, "is_grad_enabled", for_this_thread(ask, known)):
            yield

    def to_bool(self, obj: Proxy) -> bool:
        raise self.refused("decides by a value")

    def iter(self, obj: Proxy) -> Iterator[Any]:
        raise self.refused("goes through the parts of a value, of which the number is unknown")

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if replaced_method(m) is not None:
            return False
        return type(m) in OWN_ACTIVATIONS or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        path = self.path_of_module(m)
        if self.is_leaf_module(m, path) and (changed := self._state.changed_in(m)) is not None:
            raise TraceError(f"it changes {changed} before it calls {path}, which leaves no trace")
        return super().call_module(m, forward, args, kwargs)

    def proxy(self, node: fx.Node) -> Proxy:
        return _InPlaceProxy(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _autocast_state() != self._autocast:
            on = any(_autocast_state()[1:])
            raise TraceError(f"its code switches autocast {'on' if on else 'off'} for a part of it")
        node = super().create_node(*args, **kwargs)
        node.meta[SOURCE] = _user_line()
        if not torch.is_grad_enabled():
            node.meta[OWN_GRADIENT] = True
        return node

    def create_arg(self, a: Any) -> Any:
        # fx would give back an ordinary dict.
        if type(a) is OrderedDict:
            return self.create_node("call_function", OrderedDict, (self.create_arg(dict(a)),), {})
        if isinstance(a, dict) and type(a) is not dict:
            raise TraceError(f"it makes {with_article(a)}, of which a trace makes a dict")
        return super().create_arg(a)


def _user_line() -> str | None:
    """The place ("file.py:12") of the innermost frame that is neither PyTorch nor this file."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if is_user_file(path):
            return f"{short_path(path)}:{frame.f_lineno}"
        frame = frame.f_back
    return None


def is_user_file(path: str) -> bool:
    """Whether code of a file is neither PyTorch's nor the tracer's."""
    named = f"/{path}".replace("\\", "/")  # saved programs name files relative to their packages
    return "/torch/" not in named and path != __file__


def _autocast_state() -> tuple[int, bool, bool]:
    """How many switches this thread is inside of, and whether autocast is on for the devices."""
    depth = torch.autocast_increment_nesting()
    torch.autocast_decrement_nesting()
    return depth, torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")


def trace_symbolically(model: nn.Module, *, twice: bool = True) -> fx.GraphModule:
    """The model's graph, with every size left open.

    Args:
        model: the model.
        twice: whether a model that changes itself must do the same when it is called again.

    Raises:
        KeepsStateError: it does not, or it draws random numbers that are not torch's.
        TraceError: the model's code cannot run on proxies, or does what leaves no trace.
    """
    _check_calls(model)
    try:
        with alone():
            return _trace(model, twice)
    except TraceError:
        raise
    # Tracing runs the model's own code, which may raise anything.
    except Exception as error:
        raise TraceError(described(error)) from error


def _trace(model: nn.Module, twice: bool) -> fx.GraphModule:
    buffers = dict(model.named_buffers())
    with unchanged(model) as state, no_draws(lambda: _Tracer(state).run(model)):
        tracer = _Tracer(state)
        graph = tracer.run(model)
        changed = state.changed()
        if twice and (changed is not None or state.hidden is not None):
            _put_back_written(model, buffers)
            if _listed(graph) != _listed(_Tracer(state).run(model)):
                raise keeps_state(changed, state.hidden)
    with unchanged(model):  # constants, which the tracer has hung on to the model
        for tensor, name in tracer.tensor_attrs.items():
            if "." not in name and isinstance(tensor, Tensor):
                setattr(model, name, tensor)
        gm = fx.GraphModule(model, graph, type(model).__name__)
    if tracer.baked is not None:
        gm.meta[BAKED] = tracer.baked
    return gm


def _check_calls(model: nn.Module) -> None:
    """Raise TraceError where a call of a model is more than its class's forward()."""
    kinds = type(model).__mro__
    for kind in kinds[: kinds.index(nn.Module)]:
        if "__call__" in vars(kind):
            raise TraceError(f"{kind.__name__} has a __call__ of its own, which leaves no trace")
    if (name := replaced_method(model)) is not None:
        raise TraceError(f"its {name} is that of one instance, which leaves no trace")


@contextlib.contextmanager
def own_gradients(found: list[str]) -> Iterator[None]:
    """Note the functions with gradients of their own that this thread calls; no graph has them.

    Another thread's must not be there: it is for `alone` to see to that.
    """
    apply = torch.autograd.Function.__dict__["apply"]

    def call(cls: type, *args: Any, **kwargs: Any) -> Any:
        return apply.__get__(None, cls)(*args, **kwargs)

    def note(cls: type, *args: Any, **kwargs: Any) -> Any:
        found.append(cls.__name__)
        return call(cls, *args, **kwargs)

    torch.autograd.Function.apply = classmethod(for_this_thread(note, call))
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
