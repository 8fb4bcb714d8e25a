"""Calls that are operations of the dialect in another form become these."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from rmfx.ir.facts import facts_of
from rmfx.ir.fillings import filling
from rmfx.ir.kinds import ARITHMETIC, CHOICES_OF_TWO, FILLS, SELECTIONS, STACKS, SUMS, aten
from rmfx.ir.nodes import constant
from rmfx.ir.notes import (
    FOLLOWED,
    SHAPE,
    gives_number,
    set_shape,
    shape_of,
    type_of,
    why_frozen,
    without_notes,
)

from .calls import arguments_of


def becomes(node: fx.Node, target: Any) -> None:
    """Let a node call a function."""
    node.op, node.target = "call_function", target


def has_options(node: fx.Node) -> bool:
    """Whether arithmetic has options that the dialect's has not."""
    return "rounding_mode" in node.kwargs or "out" in node.kwargs


def arithmetic(gm: fx.GraphModule, node: fx.Node) -> None:
    """x + y, torch.add(x, y), x.add(y) and the like as torch.add(x, y), but not [x] * 2."""
    if not has_options(node) and not any(isinstance(a, (list, tuple)) for a in node.args):
        becomes(node, ARITHMETIC[node.target])


def subtraction_from(gm: fx.GraphModule, node: fx.Node) -> None:
    """torch.rsub(x, y) as y - x."""
    if len(node.args) == 2:
        node.args = node.args[::-1]
        becomes(node, torch.sub)


def selection(gm: fx.GraphModule, node: fx.Node) -> None:
    """x.maximum(y) and the like as torch.maximum(x, y)."""
    if not node.kwargs:
        becomes(node, SELECTIONS[node.target])


def choice_of_two(gm: fx.GraphModule, node: fx.Node) -> None:
    """`torch.max(a, b)`, which has other meanings with a dimension or alone."""
    tensors = [a for a in node.args if isinstance(a, fx.Node) and not gives_number(a)]
    if len(tensors) == len(node.args) == 2 and not node.kwargs:
        becomes(node, CHOICES_OF_TWO[node.target])


def choice(gm: fx.GraphModule, node: fx.Node) -> None:
    """torch.where(condition, x, y) and x.where(condition, y), all by place."""
    by_method = node.op == "call_method"
    names = ("input", "condition", "other") if by_method else ("condition", "input", "other")
    given = arguments_of(node, *names)
    if set(given) == set(names):
        x, y = (_as_number(gm, given[name]) for name in ("input", "other"))
        node.args, node.kwargs = (given["condition"], x, y), {}
        becomes(node, torch.where)


def _as_number(gm: fx.GraphModule, value: Any) -> Any:
    """A tensor without dimensions that holds a number, as that number."""
    found = filling(value) if isinstance(value, fx.Node) else None
    if found is not None and found.like is None and not found.sizes:
        return found.number
    held = constant(gm, value) if isinstance(value, fx.Node) else None
    if held is None or isinstance(held, nn.Parameter) or gm.meta.get(FOLLOWED):
        return value
    return value if held.is_complex() or held.dim() else held.item()


def masked_fill(gm: fx.GraphModule, node: fx.Node) -> None:
    """x.masked_fill(mask, number) as torch.where(mask, number, x)."""
    if has_number(gm, node):
        given = arguments_of(node, "input", "mask", "value")
        number = _as_number(gm, given["value"])
        node.args, node.kwargs = (given["mask"], number, given["input"]), {}
        becomes(node, torch.where)


def fill(gm: fx.GraphModule, node: fx.Node) -> None:
    """x.fill_(number) and x.zero_(), whose result alone is read, as torch.full_like(x, number)."""
    if has_number(gm, node):
        given = arguments_of(node, "input", "value")
        node.args, node.kwargs = (given["input"], given.get("value", 0)), {}
        becomes(node, torch.full_like)


def has_number(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a call puts a number in the place of real ones."""
    names = ("input", "value") if node.target in FILLS else ("input", "mask", "value")
    given = arguments_of(node, *names)
    x, number = given.get("input"), _as_number(gm, given.get("value", 0))
    # Among integers it would become one.
    is_real = isinstance(x, fx.Node) and facts_of(gm).is_real(x)
    return is_real and type(number) in (int, float) and set(given) <= set(names)


def concatenation(gm: fx.GraphModule, node: fx.Node) -> None:
    """torch.cat(tensors, dim), both by place."""
    given = arguments_of(node, "tensors", "dim")
    dim = given.pop("dim", given.pop("axis", 0))
    if set(given) == {"tensors"}:
        node.target, node.args, node.kwargs = torch.cat, (given["tensors"], dim), {}


def padding(gm: fx.GraphModule, node: fx.Node) -> None:
    """aten.pad(x, pad, mode, value) as F.pad(x, pad=…, mode=…, value=…)."""
    mode = ("mode",) if node.target is aten.pad.default else ()
    given = arguments_of(node, "input", "pad", *mode, "value")
    node.args, node.kwargs = (given.pop("input"),), given
    becomes(node, F.pad)


def add_product(gm: fx.GraphModule, node: fx.Node) -> None:
    """addcmul(x, a, b, value=v) as x + v·(a·b)."""
    given = arguments_of(node, "input", "tensor1", "tensor2")
    value = given.pop("value", 1)
    if set(given) != {"input", "tensor1", "tensor2"}:
        return
    with node.graph.inserting_before(node):
        product = node.graph.call_function(torch.mul, (given["tensor1"], given["tensor2"]))
    product.meta = without_notes(node, SHAPE)
    sources = [n for n in product.all_input_nodes if shape_of(n) is not None]
    if len(sources) == 2:
        shapes = [[1 if n is None else n for n in shape_of(s)] for s in sources]
        set_shape(product, tuple(torch.broadcast_shapes(*shapes)))
    node.target, node.args = torch.add, (given["input"], product)
    node.kwargs = {} if value == 1 else {"alpha": value}


def sum_of_stack(gm: fx.GraphModule, node: fx.Node) -> None:
    """torch.stack((a, b, …), d).sum(d) as a + b + …, and a mean as that over their number."""
    given = arguments_of(node, "input", "dim", "keepdim")
    stack, dim = given.pop("input", None), given.pop("dim", None)
    dim = dim[0] if isinstance(dim, (list, tuple)) and len(dim) == 1 else dim
    if given.pop("keepdim", False) or given or not isinstance(stack, fx.Node):
        return
    known = arguments_of(stack, "tensors", "dim")
    parts, same = known.get("tensors"), type(dim) is int and known.get("dim", 0) == dim
    if stack.target not in STACKS or why_frozen(stack) is not None or not same:
        return
    if not isinstance(parts, (list, tuple)) or len(parts) < 2 or not _are_alike(gm, parts):
        return
    total = parts[0]
    with node.graph.inserting_before(node):
        for part in parts[1:]:
            total = node.graph.call_function(torch.add, (total, part))
            total.meta = without_notes(node)
        if SUMS[node.target] == "mean":
            total = node.graph.call_function(torch.div, (total, len(parts)))
            total.meta = without_notes(node)
    node.replace_all_uses_with(total)
    node.graph.erase_node(node)


def _are_alike(gm: fx.GraphModule, parts: Sequence[Any]) -> bool:
    """Whether tensors hold real numbers of one type; integers are not added as they are summed."""
    nodes = [part for part in parts if isinstance(part, fx.Node) and why_frozen(part) is None]
    same = len(nodes) == len(parts) and len({type_of(n) for n in nodes}) == 1
    return same and all(facts_of(gm).is_real(node) for node in nodes)


def narrow(gm: fx.GraphModule, node: fx.Node) -> None:
    """x.narrow(dim, start, length) as x[…, start:][…, :length], or one slice by numbers."""
    given = arguments_of(node, "input", "dim", "start", "length")
    if len(given) != 4:
        return
    x, dim, start, length = (given[name] for name in ("input", "dim", "start", "length"))
    rank = facts_of(gm).rank(x) if isinstance(x, fx.Node) else None
    if not isinstance(dim, int) or (dim < 0 and rank is None):
        return
    before = [slice(None)] * (dim + (rank or 0) if dim < 0 else dim)
    part = slice(None, length)
    if type(start) is int and type(length) is int:
        part = slice(start or None, (start + length or None) if start < 0 else start + length)
    elif start != 0:  # a number that is computed may count from the end
        x = _sliced(node, x, (*before, slice(start, None)))
    node.op, node.target, node.kwargs = "call_function", operator.getitem, {}
    node.args = (x, (*before, part))


def _sliced(node: fx.Node, x: fx.Node, index: tuple[slice, ...]) -> fx.Node:
    """A slice before a node, of a size that is not known."""
    with node.graph.inserting_before(node):
        made = node.graph.call_function(operator.getitem, (x, index))
    made.meta = without_notes(node)
    shape = shape_of(x)
    at = len(index) - 1
    set_shape(made, None if shape is None else (*shape[:at], None, *shape[at + 1 :]))
    return made


def strided_slice(gm: fx.GraphModule, node: fx.Node) -> None:
    """aten.slice(x, dim, start, end, step) as x[…, start:end:step]."""
    given = arguments_of(node, "input", "dim", "start", "end", "step")
    dim, end, step = given.get("dim", 0), given.get("end"), given.get("step")
    if not isinstance(dim, int) or dim < 0:
        return
    end = None if isinstance(end, int) and end >= 2**62 else end
    part = slice(given.get("start") or None, end, None if step == 1 else step)
    node.target, node.kwargs = operator.getitem, {}
    node.args = (given["input"], (*[slice(None)] * dim, part))
