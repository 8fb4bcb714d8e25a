"""Calls that amount to a layer become calls of a module, and layers of other forms plain ones."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from rmfx.algebra.activation import is_activation
from rmfx.algebra.affine import CONVS
from rmfx.ir.callees import Calls
from rmfx.ir.facts import facts_of
from rmfx.ir.kinds import ELEMENTWISE, INSTANCE_NORMS, KEEPING_BATCH, VIEWS, is_a
from rmfx.ir.names import free_name, free_path
from rmfx.ir.nodes import constant, has_hooks, replaced_method
from rmfx.ir.notes import FIRST, SHAPE, gives_number, set_shape, shape_of, why_frozen, without_notes
from rmfx.ir.numbers import size_read

from .calls import CALLS, NORMS, OF_REAL_NUMBERS, arguments_of, batch_norm, gives_several

MISSING = object()


# ---- a call amounts to a module -----------------------------------------------------------------
def module_for(gm: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The module that a call amounts to, None if it has no fixed one."""
    call = CALLS.get(node.target)
    if gives_several(node.target) and not node.meta.get(FIRST):
        return None
    if call is None or len(node.args) > len(call.names):
        return None
    given = arguments_of(node, *call.names)
    x = given.pop("input", None)
    if not isinstance(x, fx.Node) or set(given) - set(call.names):
        return None
    if call.build in OF_REAL_NUMBERS and not facts_of(gm).is_real(x):
        return None
    resolved = {name: _constant(gm, value) for name, value in given.items()}
    if any(value is MISSING for value in resolved.values()):
        return None
    if call.build in NORMS:
        resolved["rank"] = facts_of(gm).rank(x)
    try:
        return call.build(resolved)
    # Arguments that the module does not take; some modules check theirs by assertions.
    except (TypeError, ValueError, AssertionError):
        return None


def _constant(gm: fx.GraphModule, value: Any) -> Any:
    """A node argument as a constant: numbers as they are, get_attr nodes as tensors."""
    if isinstance(value, fx.Node):
        found = constant(gm, value)
        return MISSING if found is None else found
    if isinstance(value, (list, tuple)):
        items = [_constant(gm, v) for v in value]
        return MISSING if any(v is MISSING for v in items) else type(value)(items)
    return value


def reshaped(gm: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """A view that is a reshape, as layers may give values in another memory format."""
    if node.target in VIEWS and _has_sizes(node):
        node.target = VIEWS[node.target]
    return _flatten_by_view(gm, node)


def _flatten_by_view(gm: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """`x.view(x.size(0), -1)` and its relatives are `nn.Flatten(1)`.

    The size may be that of any value before it that has the same batch.
    """
    if node.target not in ("view", "reshape", torch.reshape) or len(node.args) < 2:
        return None
    sizes = node.args[1] if isinstance(node.args[1], (list, tuple)) else node.args[1:]
    if len(sizes) != 2 or sizes[1] != -1 or not isinstance(sizes[0], fx.Node):
        return None
    x, (of, dim) = node.args[0], size_read(sizes[0])
    if not isinstance(x, fx.Node) or (facts_of(gm).rank(x) or 0) < 2:
        return None
    return nn.Flatten(1) if dim == 0 and of is not None and _shares_batch(gm, x, of) else None


def _shares_batch(gm: fx.GraphModule, value: fx.Node, source: fx.Node) -> bool:
    """Whether a value is made of another one alone, by layers that keep the batch."""
    left, seen = [value], {source}
    while left:
        node = left.pop()
        if node in seen:
            continue
        seen.add(node)
        given = [n for n in node.all_input_nodes if n.op != "get_attr"]
        if not given or not _keeps_batch(gm, node):
            return False
        left += given
    return True


def _keeps_batch(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node gives as many things as it reads: its first dimension is the batch."""
    module = Calls(gm).module(node)
    if module is not None:
        return is_activation(module) or is_a(module, KEEPING_BATCH)
    if node.target is torch.cat:
        return len(node.args) == 2 and isinstance(node.args[1], int) and node.args[1] > 0
    return node.op == "call_function" and node.target in ELEMENTWISE.values()


def _has_sizes(node: fx.Node) -> bool:
    """Whether a view is to sizes, not to another type."""
    sizes: Any = node.args[1:]
    sizes = sizes[0] if len(sizes) == 1 and isinstance(sizes[0], (list, tuple)) else sizes
    return bool(sizes) and not node.kwargs and all(_is_whole(n) for n in sizes)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) or (isinstance(value, fx.Node) and gives_number(value))


def call_module(
    gm: fx.GraphModule, node: fx.Node, module: nn.Module, source: Any, taken: set[str]
) -> None:
    """Let a node call a module that the graph gets for it."""
    name = free_path(gm, node, taken, module)
    gm.add_submodule(name, module.eval())
    node.op, node.target, node.args, node.kwargs = "call_module", name, (source,), {}


def input_of_call(node: fx.Node) -> Any:
    """The first argument of a call."""
    return node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("self"))


# ---- a module in another form -------------------------------------------------------------------
def pad_apart(gm: fx.GraphModule, calls: Sequence[fx.Node]) -> None:
    """Let a convolution that pads with other values than zeros be a padding and a convolution.

    Args:
        gm: the graph.
        calls: all calls of the convolution by its path.
    """
    target = str(calls[0].target)
    conv: Any = gm.get_submodule(target)
    alone = all(len(node.args) == 1 and why_frozen(node) is None for node in calls)
    if type(conv) not in CONVS[1:] or conv.padding_mode == "zeros" or not alone:
        return
    touched = has_hooks(conv) or replaced_method(conv) is not None
    flat = list(conv._reversed_padding_repeated_twice)
    if touched or not any(flat):
        return
    for node in calls:
        _pad_before(node, flat, conv.padding_mode)
    bare = copy.copy(conv)
    bare.padding, bare.padding_mode = (0,) * len(conv.kernel_size), "zeros"
    bare._reversed_padding_repeated_twice = [0] * len(flat)
    gm.set_submodule(target, bare)


def _pad_before(node: fx.Node, flat: list[int], mode: str) -> None:
    """Let a call read its padded input."""
    x = node.args[0]
    with node.graph.inserting_before(node):
        padded = node.graph.call_function(F.pad, (x, flat), {"mode": mode})
    padded.meta = without_notes(node, SHAPE)
    shape = shape_of(x) if isinstance(x, fx.Node) else None
    if shape is not None:
        pairs = list(zip(flat[::2], flat[1::2], strict=True))[::-1]
        size = (n if n is None else n + sum(p) for n, p in zip(shape[2:], pairs, strict=True))
        set_shape(padded, (*shape[:2], *size))
    node.args = (padded,)


def batch_norm_for(gm: fx.GraphModule, node: fx.Node) -> None:
    """Let an instance norm with running statistics be the batch norm that it is at inference."""
    norm: Any = gm.get_submodule(str(node.target))
    dims = INSTANCE_NORMS.index(type(norm)) + 1 if type(norm) in INSTANCE_NORMS else None
    is_linear = dims is not None and norm.track_running_stats and norm.running_mean is not None
    if dims is None or not is_linear or has_hooks(norm) or replaced_method(norm):
        return
    x = input_of_call(node)
    rank = facts_of(gm).rank(x) if isinstance(x, fx.Node) else None
    if len(node.args) != 1 or rank != dims + 2:  # others take inputs without a batch dimension
        return
    names = ("running_mean", "running_var", "weight", "bias", "eps")
    made = batch_norm({name: getattr(norm, name) for name in names} | {"rank": rank})
    if made is not None:
        gm.set_submodule(str(node.target), made.eval())


def detach_in_place(gm: fx.GraphModule, node: fx.Node, taken: set[str], *, keep: bool) -> None:
    """Let a node call a copy of its in-place module that does not write.

    Args:
        keep: whether other calls still need the module as it is.
    """
    target = str(node.target)
    module = copy.copy(gm.get_submodule(target))
    module.inplace = False  # type: ignore[assignment]
    if keep:
        target = free_name(gm, target, taken)
        gm.add_submodule(target, module)
        node.target = target
    else:
        gm.set_submodule(target, module)
