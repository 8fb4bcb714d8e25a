"""Names of nodes and modules: by their place in the model, whoever traced it."""

from __future__ import annotations

import re
from collections.abc import Collection

from torch import fx, nn

from rmfx.compatibility import dotted

from .notes import gives_number


def module_path(node: fx.Node) -> str:
    """Path of the innermost module whose code made a node, "" for the root or where unknown."""
    return _innermost(node)[0]


def _innermost(node: fx.Node) -> tuple[str, str]:
    """Path and type name of the innermost module whose code made a node."""
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return "", ""
    key, entry = list(stack.items())[-1]
    path, kind = entry if isinstance(entry, tuple) else (key, entry)
    kind = f"{kind.__module__}.{kind.__qualname__}" if isinstance(kind, type) else str(kind)
    return dotted(str(path)), kind


def name_nodes(graph: fx.Graph, named: Collection[str] = ()) -> None:
    """Name nodes by their place in the model, whoever traced it, but for those that have names.

    Args:
        graph: whose nodes are named in place.
        named: names to be kept. What a pass adds does not renumber what stood there before it.
    """
    free = [node for node in graph.nodes if node.name not in named]
    bases = {node: base for node in free if (base := _name_by_place(node)) is not None}
    # Numbers come last: how many of them a graph computes differs from one tracer to the next.
    numbers = {node: node.name for node in free if _may_give_way(node)}
    taken = {node.name for node in graph.nodes if node not in bases and node not in numbers}
    for node, base in {**bases, **numbers}.items():
        name, i = base, 1
        while name in taken:
            name, i = f"{base}_{i}", i + 1
        taken.add(name)
        node.name = name


def _may_give_way(node: fx.Node) -> bool:
    return node.op in ("call_function", "call_method") and gives_number(node)


def _name_by_place(node: fx.Node) -> str | None:
    if node.op == "call_module":
        path = str(node.target)
    elif node.op in ("call_function", "call_method") and not gives_number(node):
        path = ".".join(filter(None, (module_path(node), _role(node))))
    else:
        return None
    name = re.sub(r"\W", "_", path)
    return f"_{name}" if name[:1].isdigit() or name == "self" else name


def free_path(gm: fx.GraphModule, node: fx.Node, taken: set[str], module: nn.Module) -> str:
    """A free module path for a call: the layer's own where a layer of torch.nn made the call."""
    path, kind = _innermost(node)
    if path and kind.startswith("torch.nn.modules."):
        if path in taken and _only_holds(gm, path, module):
            return path
        return free_name(gm, path, taken)
    # The operator's name, not the node's, which differs from one tracer to the next.
    return free_name(gm, ".".join(filter(None, (path, _role(node)))), taken)


def _role(node: fx.Node) -> str:
    """What a call does, by the name of what it calls."""
    return str(getattr(node.target, "__name__", node.target)).partition(".")[0].strip("_")


def _only_holds(gm: fx.GraphModule, path: str, module: nn.Module) -> bool:
    """Whether a path leads to a mere holder of a module's tensors, as exporting leaves them."""
    holder = gm.get_submodule(path)
    own = {id(t) for t in (*module.parameters(), *module.buffers())}
    held = dict((*holder.named_parameters(), *holder.named_buffers()))
    held.pop("num_batches_tracked", None)
    return type(holder) is nn.Module and own >= {id(t) for t in held.values()}


def free_name(gm: fx.GraphModule, base: str, taken: set[str]) -> str:
    """A name that nothing of the module has, from one that may be taken."""
    name, i = base, 1
    while name in taken or _is_attribute(gm, name):
        name, i = f"{base}_{i}", i + 1
    taken.add(name)
    return name


def _is_attribute(gm: fx.GraphModule, path: str) -> bool:
    """Whether something stands at a path: a tensor, a module or a method of every module, as `to`.

    A module that is to be made on the way has the methods of every one.
    """
    *parents, last = path.split(".")
    holder: object = gm
    for name in parents:
        holder = getattr(holder, name, nn.Module)
    return hasattr(holder, last)
