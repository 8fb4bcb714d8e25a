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
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ._activation import OWN_ACTIVATIONS
from ._errors import TraceError
from ._kept import keeps_state, unchanged

OWN_GRADIENT = "own_gradient"  # where a gradient is not that of what is computed
BAKED = "baked"  # an operator that ran on the model's tensors while it was traced


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


class _Reads(TorchDispatchMode):
    """Notes an operator that runs on a model's own tensors: the graph has its result only.

    A view is another name of the tensor, so the graph follows it all the same.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        own = [*model.parameters(), *model.buffers()]
        self._own = {_memory(t) for t in own if not is_lazy(t)}
        self.found: str | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        own = [t for t in tensors if t.requires_grad or _memory(t) in self._own]
        self._own.update(map(_memory, own))  # a parameter in a list is none of the model's
        if own and not func.is_view:
            self.found = self.found or str(func)
        return func(*args, **(kwargs or {}))


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


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
    tracer, reads = _Tracer(), _Reads(model)
    buffers = dict(model.named_buffers())
    try:
        with unchanged(model) as state, _no_autocast(), torch.enable_grad():
            with reads:
                graph = tracer.trace(model)
            changed = state.changed()
            if twice and changed is not None:
                _put_back_written(model, buffers)
                if _listed(graph) != _listed(_Tracer().trace(model)):
                    raise keeps_state(changed)
        with unchanged(model):  # constants, which the tracer has hung on to the model
            for tensor, name in tracer.tensor_attrs.items():
                if "." not in name and isinstance(tensor, Tensor):
                    setattr(model, name, tensor)
            gm = fx.GraphModule(model, graph, type(model).__name__)
        if reads.found is not None:
            gm.meta[BAKED] = reads.found
        return gm
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


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return (str(error).strip().splitlines() or ["no message"])[0]
