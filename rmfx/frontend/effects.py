"""What a call reads, writes, shares memory with and draws at random.

- An operator does what its schema says.
- A packet of operators, a function of torch and a method of a tensor do what those of the
  operator's overloads do that can take the call.
- torch's own functions in Python and its layers write to what they read where they are asked to
  work in place, to running statistics in training mode, to embeddings that they normalise.
- Anything else may do anything: it is a barrier that writes to all that it reads.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from torch import Tensor, fx, nn
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch.nn.utils import parametrize

from rmfx.ir.computed_weights import made_by_hook
from rmfx.ir.functions import (
    ACTING,
    COMPUTING,
    FUNCTIONALISED,
    METHODS_OF_CONTAINERS,
    READING,
    WRITING,
    WRITING_METHODS,
    is_in_place,
    is_method,
    is_trusted,
)
from rmfx.ir.kinds import FRESH, aten, is_a, kind_of
from rmfx.ir.nodes import attribute
from rmfx.ir.notes import gives_container

from .memory import tensors_of
from .schemas import (
    Effects,
    Nodes,
    by_schema,
    hidden_writes,
    nodes_in,
    of_overload,
    of_overloads,
    unique,
)


def effects_of(gm: fx.GraphModule, node: fx.Node) -> Effects:
    """What a node of a graph does."""
    if node.op == "call_module":
        return _of_module(gm, node)
    if node.op == "call_method":
        return _of_method(node, str(node.target))
    return _of_function(gm, node) if node.op == "call_function" else Effects()


def _barrier(node: fx.Node, why: str, owned: Iterable[Tensor] = ()) -> Effects:
    """Of a call that may do anything."""
    inputs = tuple(node.all_input_nodes)
    return Effects(inputs, inputs, tuple(owned), draws=True, unknown=why)


def _reading(node: fx.Node) -> Effects:
    """Of a call that writes to nothing, and may give what it reads."""
    return Effects(aliases=tuple(node.all_input_nodes))


# ---- functions and methods ----------------------------------------------------------------------
def _of_function(gm: fx.GraphModule, node: fx.Node) -> Effects:
    target: Any = node.target
    name, home = getattr(target, "__name__", str(target)), getattr(target, "__module__", None)
    if isinstance(target, OpOverload):
        return of_overloads(node, [target])
    if isinstance(target, OpOverloadPacket):
        return of_overloads(node, [getattr(target, o) for o in target.overloads()])
    if isinstance(target, HigherOrderOperator):
        return _of_graphs(gm, node, name)
    if home == "_operator":
        return _of_operator(node, name)
    if home == "builtins" and target not in ACTING:
        return _reading(node)
    if home == "math":
        return Effects()
    if is_method(target):
        return _of_method(node, name)
    if not is_trusted(target) or not callable(target):
        return _barrier(node, _nobody_knows(name))
    return _of_builtin(node, name) if inspect.isbuiltin(target) else _of_python(node, target, name)


def _nobody_knows(name: str) -> str:
    return f"what {name} does to the values it reads is not known"


def _packet(name: str) -> list[OpOverload]:
    """The overloads of torch's operator of a name, without those that write to an `out`."""
    packet = getattr(aten, name, None) if name.isidentifier() else None
    if not isinstance(packet, OpOverloadPacket):
        return []
    every = [getattr(packet, overload) for overload in packet.overloads()]
    return [op for op in every if not any(a.is_out for a in op._schema.arguments)]


def _of_builtin(node: fx.Node, name: str) -> Effects:
    """Of a function of torch that is not written in Python."""
    return _with_out(node, _of_named(node, name, _packet(name)))


def _of_named(node: fx.Node, name: str, overloads: list[OpOverload]) -> Effects:
    inputs = tuple(node.all_input_nodes)
    if overloads:
        return of_overloads(node, overloads)
    return Effects(writes=inputs if is_in_place(name) else (), aliases=inputs)


def _with_out(node: fx.Node, found: Effects) -> Effects:
    """The effects of a call that may be told by `out=` where to write."""
    out = tuple(nodes_in(node.kwargs.get("out")))
    return Effects(
        unique((*found.writes, *out)), unique((*found.aliases, *out)), (), draws=found.draws
    )


def _of_python(node: fx.Node, target: Any, name: str) -> Effects:
    """Of a function of torch in Python: as the operator of its name, if it is not to write."""
    inputs = tuple(node.all_input_nodes)
    given = _bound(target, node)
    in_place = given.get("inplace", False)
    written: Nodes = ()
    if isinstance(in_place, fx.Node) or in_place or is_in_place(name):
        written = tuple(nodes_in(next(iter(given.values()), None))) or inputs
    overloads = _packet(name)
    if overloads:
        found = [of_overload(node, op, by_schema(node, op._schema)) for op in overloads]
        aliases = unique((*written, *(n for one in found for n in one.aliases)))
    else:
        aliases = inputs
    return _with_out(node, Effects(unique((*written, *hidden_writes(given))), aliases))


def _bound(target: Any, node: fx.Node) -> dict[str, Any]:
    """The arguments of a call by name, with the defaults of those that it leaves out."""
    signature = _signature(target)
    try:
        bound = signature.bind(*node.args, **node.kwargs) if signature else None
    except TypeError:
        bound = None
    if bound is None:
        return dict(node.kwargs)
    bound.apply_defaults()
    given = bound.arguments
    return {**given, **given.pop("kwargs", {})} if "kwargs" in given else given


@lru_cache(maxsize=1024)
def _signature(target: Any) -> inspect.Signature | None:
    try:
        return inspect.signature(target)
    except (TypeError, ValueError):
        return None


def _of_operator(node: fx.Node, name: str) -> Effects:
    """Of a function of Python's `operator`."""
    if name in WRITING:
        return Effects(tuple(nodes_in(node.args[:1])), tuple(nodes_in(node.args[:1])))
    if name in COMPUTING and not any(gives_container(n) for n in node.all_input_nodes):
        return Effects()
    known = name in COMPUTING or name in READING
    return _reading(node) if known else _barrier(node, _nobody_knows(name))


def _of_method(node: fx.Node, name: str) -> Effects:
    """Of a method, which is a tensor's if tensors have one of the name."""
    own = tuple(nodes_in(node.args[0] if node.args else node.kwargs.get("self")))
    if name in WRITING_METHODS:
        return Effects(own, own)
    if not hasattr(Tensor, name):
        known = name in METHODS_OF_CONTAINERS
        return _reading(node) if known else _barrier(node, _nobody_knows(name))
    overloads = _packet(name)
    if not overloads and is_in_place(name):
        return Effects(own, own)
    return _with_out(node, _of_named(node, name, overloads))


# ---- modules and graphs -------------------------------------------------------------------------
def _of_module(gm: fx.GraphModule, node: fx.Node) -> Effects:
    module = gm.get_submodule(str(node.target))
    if isinstance(module, fx.GraphModule) and not _forward_hooks(module) and _only_reads(module):
        return _reading(node)
    why = _why_unknown(str(node.target), module)
    if why is not None:
        return _barrier(node, why, tensors_of(module))
    inputs = tuple(node.all_input_nodes)
    in_place = any(getattr(part, "inplace", False) for part in module.modules())
    fresh = is_a(module, FRESH)
    normed = [m for m in module.modules() if getattr(m, "max_norm", None) is not None]
    return Effects(
        inputs if in_place else (),
        () if fresh and not in_place else inputs,
        tuple(p for part in normed for p in part.parameters(recurse=False)),
    )


def _why_unknown(path: str, module: nn.Module) -> str | None:
    """Why nobody knows what a leaf module does to what it reads, None if it is known."""
    for name, part in module.named_modules(prefix=path):
        if parametrize.is_parametrized(part) or ".parametrizations." in name:
            continue  # which computes weights, and sees nothing else
        if "forward" in vars(part):
            return f"module {name} has a forward method of its own"
        if _forward_hooks(part):
            return f"module {name} has hooks; remove them first"
        if kind_of(part) is None:
            return _nobody_knows(f"{type(part).__name__} (module {name})")
    return None


def _forward_hooks(module: nn.Module) -> list[Any]:
    """The hooks around a module's forward but for torch's own, which compute weights."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return [hook for hook in hooks if made_by_hook(hook) is None]


def _of_graphs(gm: fx.GraphModule, node: fx.Node, name: str) -> Effects:
    """Of an operator that runs graphs: those that only read make it one that only reads."""
    if name in FUNCTIONALISED:
        return Effects()
    held = [attribute(gm, n) for n in node.all_input_nodes if n.op == "get_attr"]
    graphs = [value for value in held if isinstance(value, fx.GraphModule)]
    if graphs and all(map(_only_reads, graphs)):
        return _reading(node)
    return _barrier(node, _nobody_knows(name))


def _only_reads(gm: fx.GraphModule) -> bool:
    found = [effects_of(gm, node) for node in gm.graph.nodes]
    return not any(one.writes or one.owned or one.unknown or one.draws for one in found)
