"""Questions about single nodes of a graph, and the order of nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import _side_effectful_functions
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from rmfx.errors import RmfxError, fault

from .notes import gives_container, gives_number, why_frozen

MEANS: tuple[object, ...] = ("mean", torch.mean, torch.ops.aten.mean.dim)


def between(start: fx.Node, end: fx.Node) -> Iterator[fx.Node]:
    """The nodes of a graph behind one and before another one.

    Raises:
        InternalError: the other one does not come behind the first.
    """
    node = start.next
    while node is not end:
        if node.op == "root":  # where the graph ends, and begins again
            raise fault(end.name, f"it does not stand behind {start.name}")
        yield node
        node = node.next


def put_in_order(start: fx.Node, end: fx.Node) -> None:
    """Move the nodes between two others that stand before one that they read behind the rest.

    Raises:
        RmfxError: some nodes read each other.
    """
    waiting = list(between(start, end))
    unplaced, last = set(waiting), start
    while waiting:
        behind = []
        for node in waiting:
            if not unplaced.isdisjoint(node.all_input_nodes):
                behind.append(node)
                continue
            if last.next is not node:
                last.append(node)
            last = node
            unplaced.discard(node)
        if len(behind) == len(waiting):
            raise RmfxError(f"{behind[0].name}: a rewrite has made a cycle")
        waiting = behind


def data_input(node: fx.Node) -> fx.Node:
    """The first tensor a node reads that is not a constant of the model."""
    return data_read(node)[0]


def each(value: Any, dims: int) -> Any:
    """An option for each dimension; text stays as it is."""
    if isinstance(value, int):
        return (value,) * dims
    if isinstance(value, (list, tuple)):
        return tuple(value) * dims if len(value) == 1 else tuple(value)
    return value


def _no_module(path: str) -> nn.Module:
    raise fault(path, "it is called where functions alone are run")


def run_node(
    node: fx.Node, known: Mapping[fx.Node, Any], module: Callable[[str], nn.Module] = _no_module
) -> Any:
    """What a call gives for values of what it reads; `module` finds a layer by its path."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
    if node.op == "call_module":
        return module(str(node.target))(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def slice_by_slice(index: Sequence[Any], rank: int) -> list[slice]:
    """A slice for every dimension, of an index of slices and at most one ellipsis."""
    at = index.index(...) if ... in index else len(index)
    given = [*index[:at], *index[at + 1 :]]
    return [*given[:at], *[slice(None)] * (rank - len(given)), *given[at:]]


def two_operands(node: fx.Node) -> tuple[object, object]:
    """The first two arguments of an operation, by place or by name."""
    given = [*node.args]
    given += [node.kwargs[k] for k in ("input", "other") if k in node.kwargs]
    first, second, *_ = [*given, None, None]
    return first, second


def is_tensor_node(value: object) -> bool:
    """Whether an argument is a tensor that depends on the graph's input."""
    if not isinstance(value, fx.Node) or value.op == "get_attr":
        return False
    return not gives_number(value) and not gives_container(value)


def input_of(node: fx.Node) -> fx.Node | None:
    """The one tensor a node reads (constants of the model aside), None if there are several."""
    inputs = data_read(node)
    return inputs[0] if len(inputs) == 1 else None


def describe(node: fx.Node) -> str:
    """What a node calls, by its name."""
    return str(getattr(node.target, "__name__", node.target))


def replace_by_number(node: fx.Node, value: float | bool) -> None:
    """Put a number in the place of a node's value."""
    for user in list(node.users):
        user.args = fx.map_arg(user.args, lambda n: value if n is node else n)
        user.kwargs = fx.map_arg(user.kwargs, lambda n: value if n is node else n)
    node.graph.erase_node(node)


def data_read(node: fx.Node) -> list[fx.Node]:
    """The nodes that a node reads, without numbers and what is the model's own."""
    return [n for n in node.all_input_nodes if n.op != "get_attr" and not gives_number(n)]


def must_stay(node: fx.Node) -> bool:
    """Whether a node whose value nobody reads does something all the same."""
    if node.op in ("placeholder", "output") or why_frozen(node):
        return True
    schema = getattr(node.target, "_schema", None)
    return node.target in _side_effectful_functions or bool(schema and schema.is_mutable)


def reads_among_writes(graph: fx.Graph) -> dict[fx.Node, set[int]]:
    """Of each value that is written to, behind how many of the nodes that stay it is read."""
    found: dict[fx.Node, set[int]] = {}
    count = 0
    for node in graph.nodes:
        for read in node.all_input_nodes:
            if why_frozen(read):
                found.setdefault(read, set()).add(count)
        if why_frozen(node):
            found.setdefault(node, set())
            count += node.op not in ("placeholder", "get_attr")
    return found


def is_same_there(value: fx.Node, here: fx.Node, there: fx.Node) -> bool:
    """Whether a node that reads a value would read the same in the place of another one."""
    if not why_frozen(value):
        return True
    node, last = sorted((here, there))
    while node is not last:
        if why_frozen(node):
            return False
        node = node.next
    return True


def has_global_hooks() -> bool:
    """Whether something runs around the forward of every module."""
    return bool(_global_forward_hooks or _global_forward_pre_hooks)


def has_hooks(module: nn.Module) -> bool:
    """Whether something runs around a module's own forward or backward, or around all forwards."""
    return has_global_hooks() or any(
        getattr(module, name, None)
        for name in (
            "_forward_hooks",
            "_forward_pre_hooks",
            "_backward_hooks",
            "_backward_pre_hooks",
        )
    )


def replaced_method(module: nn.Module) -> str | None:
    """The name of a method that computes and that an instance has of its own; None if none."""
    for name, value in vars(module).items():
        methods = callable(value) and callable(getattr(type(module), name, None))
        if methods and (name in ("forward", "_call_impl") or not hasattr(nn.Module, name)):
            return name
    return None


def attribute(gm: fx.GraphModule, node: fx.Node) -> object:
    """The value behind a get_attr node."""
    value: object = gm
    for name in str(node.target).split("."):
        value = getattr(value, name)
    return value


def constant(gm: fx.GraphModule, node: fx.Node) -> Tensor | None:
    """The tensor behind a get_attr node, None where calls may find another one there.

    Whoever goes by what a tensor holds asks here; `attribute` is for its type and its shape.
    """
    value = attribute(gm, node) if node.op == "get_attr" and why_frozen(node) is None else None
    return value if isinstance(value, Tensor) else None


def averaged_dims(node: fx.Node, dims: int) -> tuple[set[int], bool] | None:
    """The spatial dimensions over which a node averages, and whether it keeps them.

    None if a node is no such mean.
    """
    if node.target not in MEANS or dims < 1 or set(node.kwargs) - {"dim", "keepdim"}:
        return None
    axes = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    axes = (axes,) if isinstance(axes, int) else axes
    if not isinstance(axes, (list, tuple)) or not all(isinstance(i, int) for i in axes):
        return None
    kept = node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False)
    places = {int(i) % (dims + 2) for i in axes if isinstance(i, int)}
    if kept not in (True, False) or len(node.args) > 3 or not places or min(places) < 2:
        return None
    return places, bool(kept)


def keeps_dims(node: fx.Node, dims: int) -> bool | None:
    """Whether a mean over space keeps the dimensions; None if a node is no such mean."""
    found = averaged_dims(node, dims)
    if found is None:
        return None
    places, kept = found
    return kept if kept or len(places) == dims else None
