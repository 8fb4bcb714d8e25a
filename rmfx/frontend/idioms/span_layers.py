"""What acts on single axes of a value, or on each number alone, in another layout of its axes.

Each function reads a node that meets a value in some layout, and gives the layout of what comes out
and what to write in place of the node where the value has its axes in order; None where that is no
layer. The channels are the second axis of a value, or its last one.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from rmfx.algebra.activation import is_activation, is_per_channel
from rmfx.algebra.affine import CONVS
from rmfx.errors import fault
from rmfx.frontend.calls import Builder, arguments_of, batch_norm, conv, linear
from rmfx.ir.kinds import BATCH_NORMS, ELEMENTWISE, NO_OPS, is_a
from rmfx.ir.nodes import MEANS, constant, data_input, each, is_tensor_node, slice_by_slice
from rmfx.ir.notes import why_frozen

from .layouts import ONE, Part, Row, Rows, Size, in_straight, whole
from .spans import Spans, View

Write = Callable[[fx.GraphModule, fx.Node], None]
Found = tuple[View, Write]
CONSTANT = (None, "constant")  # the default of paddings
NORM_KEYS = ("running_mean", "running_var", "weight", "bias", "eps")


def leave(gm: fx.GraphModule, node: fx.Node) -> None:
    """Write nothing: the node does the same to the value as it is."""


def in_layout(spans: Spans, node: fx.Node) -> Found | None:
    """What a node is where the values that it reads have their axes in order, None if nothing."""
    sources = [n for n in node.all_input_nodes if is_tensor_node(n)]
    if why_frozen(node) is not None or not any(_is_moved(spans, n) for n in sources):
        return None
    if node.op == "call_module":
        return _layer(spans, node, sources[0]) if len(node.args) == 1 else None
    if node.target in MEANS:
        return _mean(spans, node)
    if node.target is operator.getitem:
        return _sliced(spans, node)
    if node.target is F.pad:
        return _padded_with_number(spans, node)
    if node.target in ELEMENTWISE.values():
        return _elementwise(spans, node, sources)
    return None


def _is_moved(spans: Spans, node: fx.Node) -> bool:
    return node in spans.views and not spans.views[node].is_straight


# ---- layers -------------------------------------------------------------------------------------
def _layer(spans: Spans, node: fx.Node, source: fx.Node) -> Found | None:
    module, view = spans.net.module(node), spans.view(source)
    if module is None or view is None or spans.net.guard(node) is not None:
        return None
    kinds = (nn.Linear, *CONVS[1:])
    if is_per_channel(module):
        return (view, leave) if view.axis_of(1, 1) == 1 else None
    if is_activation(module) or is_a(module, NO_OPS):
        return view, leave
    if type(module) is nn.Linear:
        return _linear(module, view)
    if type(module) in kinds:
        return _conv(node, module, view)
    return _norm(module, view) if type(module) in BATCH_NORMS[:3] else None


def _linear(module: nn.Linear, view: View) -> Found | None:
    rank, dim = len(view.axes), len(view.rows) - 1
    axis = view.axis_of(dim, 1, rank - 1)
    if axis is None or (axis != rank - 1 and rank > 5):
        return None
    behind = view.resized(dim, axis, Size(module.out_features))
    if axis == rank - 1:
        return behind, leave
    return behind, lambda gm, node: _pointwise(gm, node, module, rank)


def _pointwise(gm: fx.GraphModule, node: fx.Node, module: Any, rank: int) -> None:
    """Let a node call a convolution of one position, or a Linear layer, with a layer's weights."""
    weight = module.weight.detach().flatten(1)
    kernel = weight.reshape(*weight.shape, *[1] * (rank - 2))
    _put(gm, node, module, linear if rank == 2 else conv(rank - 2), kernel)


def _put(
    gm: fx.GraphModule,
    node: fx.Node,
    module: Any,
    build: Builder,
    weight: Tensor,
    options: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Let a node call a layer with the weights of its own in another shape, in as many groups."""
    own = nn.Parameter(weight, module.weight.requires_grad)
    given = {"weight": own, "bias": module.bias, "groups": getattr(module, "groups", 1), **options}
    made = build(given)
    if made is None:
        raise fault(node.name, f"no layer has a weight of {tuple(weight.shape)}")
    gm.set_submodule(str(node.target), made.eval())


def _conv(node: fx.Node, module: Any, view: View) -> Found | None:
    """A convolution along axes that are dimensions; along others it must look at one position."""
    rank = len(view.axes)
    window = _window(module)
    axis = view.axis_of(1, 1, rank - 1) if len(view.rows) == len(module.kernel_size) + 2 else None
    if axis is None or window is None or rank > 5:
        return None
    along: dict[int, int] = {}  # axis -> the convolution's own dimension
    for i, own in enumerate(window):
        free = [a for a in range(2, rank) if a not in along and axis == 1]
        at = None if own[:3] == (1, 1, 0) else view.axis_of(i + 2, *free)
        if at is not None:
            along[at] = i
        elif own[:3] != (1, 1, 0):
            return None
    if module.groups != 1 and (axis != 1 or axis == rank - 1):
        return None  # groups are of the second dimension, in front of others
    behind = view.resized(1, axis, Size(module.out_channels))
    for at, i in along.items():
        behind = behind.resized(i + 2, at, _size_behind(node, at, view.axes[at], window[i]))
    if axis == rank - 1:
        return behind, lambda gm, node: _pointwise(gm, node, module, 2)
    return behind, lambda gm, node: _turned(gm, node, module, rank, along)


def _window(module: Any) -> list[tuple[int, int, int, int]] | None:
    """Kernel, stride, padding and dilation per dimension."""
    if module.padding_mode != "zeros" or module.padding == "same":
        return None
    padding = 0 if module.padding == "valid" else module.padding
    options = (module.kernel_size, module.stride, padding, module.dilation)
    dims = len(module.kernel_size)
    return list(zip(*(each(option, dims) for option in options), strict=True))


def _size_behind(node: fx.Node, axis: int, size: Size, own: tuple[int, int, int, int]) -> Size:
    kernel, stride, padding, dilation = own
    growth = 2 * padding - dilation * (kernel - 1)
    if stride == 1 and growth == 0:
        return size
    if size.is_number and size.number + growth <= 0:
        return Size.of((node, "behind", axis))
    return _length(node, axis, size, (size.number + growth - 1) // stride + 1)


def _length(node: fx.Node, axis: int, size: Size, number: int) -> Size:
    """The size of an axis behind a node: a number if it was one, else one of its own."""
    return Size(number) if size.is_number else Size.of((node, "behind", axis))


def _turned(
    gm: fx.GraphModule, node: fx.Node, module: Any, rank: int, along: dict[int, int]
) -> None:
    """Let a node call a convolution whose kernel lies along other dimensions."""
    weight, dims = module.weight.detach(), len(module.kernel_size)
    order = [along[a] for a in sorted(along)]
    rest = [i for i in range(dims) if i not in order]
    moved = weight.permute(0, 1, *(i + 2 for i in (*order, *rest)))
    options = {}
    for name, neutral in (("stride", 1), ("padding", 0), ("dilation", 1)):
        own = each(0 if getattr(module, name) == "valid" else getattr(module, name), dims)
        options[name] = tuple(own[along[a]] if a in along else neutral for a in range(2, rank))
    kernel = (module.kernel_size[along[a]] if a in along else 1 for a in range(2, rank))
    turned = moved.reshape(*weight.shape[:2], *kernel)
    _put(gm, node, module, conv(rank - 2), turned, options)


def _norm(module: Any, view: View) -> Found | None:
    rank = len(view.axes)
    if view.axis_of(1, 1) is None or rank > 5:
        return None

    def write(gm: fx.GraphModule, node: fx.Node) -> None:
        given = {name: getattr(module, name) for name in NORM_KEYS}
        made = batch_norm(given | {"rank": rank})
        if made is not None:
            gm.set_submodule(str(node.target), made.eval())

    constant = module.running_mean is not None and module.running_var is not None
    return (view, write) if constant else None


# ---- operations ---------------------------------------------------------------------------------
def _mean(spans: Spans, node: fx.Node) -> Found | None:
    """A mean over dimensions that hold whole axes."""
    source: Any = node.args[0] if node.args else None
    view = spans.view(source)
    given: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    keeps = node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False)
    dims = (given,) if isinstance(given, int) else given
    known = isinstance(dims, (list, tuple)) and all(type(dim) is int for dim in dims)
    if view is None or not known or len(node.args) > 3 or set(node.kwargs) - {"dim", "keepdim"}:
        return None
    gone = {dim % len(view.rows) for dim in dims}
    parts = [part for dim in gone for part in view.rows[dim]]
    if not parts or any(whole(part.axis, view.axes[part.axis]) != (part,) for part in parts):
        return None
    axes = sorted(part.axis for part in parts)
    sizes = tuple(ONE if axis in axes else size for axis, size in enumerate(view.axes))
    rows = [() if dim in gone else row for dim, row in enumerate(view.rows)]
    kept = [row for dim, row in enumerate(rows) if keeps or dim not in gone]

    def write(gm: fx.GraphModule, node: fx.Node) -> None:
        node.op, node.target = "call_function", torch.mean
        node.args, node.kwargs = (node.args[0], axes), {"keepdim": True}

    return View(tuple(kept), sizes, view.origin), write


def _sliced(spans: Spans, node: fx.Node) -> Found | None:
    """Slices of dimensions that are whole axes, by numbers."""
    source, given = node.args
    index: Any = given if isinstance(given, tuple) else (given,)
    view = spans.view(source)  # type: ignore[arg-type]
    if view is None or not all(i is ... or _is_by_numbers(i) for i in index):
        return None
    slices = [slice(None)] * len(view.axes)
    behind = view
    for dim, s in enumerate(slice_by_slice(index, len(view.rows))):
        if s == slice(None):
            continue
        axis = view.axis_of(dim, *range(len(view.axes)))
        if axis is None:
            return None
        slices[axis], size = s, view.axes[axis]
        left = _length(node, axis, size, len(range(size.number)[s]))
        behind = behind.resized(dim, axis, left)

    def write(gm: fx.GraphModule, node: fx.Node) -> None:
        node.args = (node.args[0], tuple(slices))

    return behind, write


def _is_by_numbers(index: Any) -> bool:
    bounds = (index.start, index.stop, index.step) if isinstance(index, slice) else (index,)
    return isinstance(index, slice) and all(b is None or type(b) is int for b in bounds)


def _padded_with_number(spans: Spans, node: fx.Node) -> Found | None:
    """What puts one number around dimensions that are whole axes."""
    given = arguments_of(node, "input", "pad", "mode", "value")
    view, amounts = spans.view(given["input"]), given.get("pad")
    if view is None or not isinstance(amounts, (list, tuple)) or given.get("mode") not in CONSTANT:
        return None
    if not all(type(n) is int for n in amounts):
        return None
    straight: list[Any] = [0] * (2 * len(view.axes))
    behind = view
    for i in range(0, len(amounts), 2):
        dim, (before, after) = len(view.rows) - 1 - i // 2, amounts[i : i + 2]
        if before == after == 0:
            continue
        axis = view.axis_of(dim, *range(len(view.axes)))
        if axis is None:
            return None
        at = 2 * (len(view.axes) - 1 - axis)
        straight[at : at + 2] = before, after
        size = view.axes[axis]
        more = _length(node, axis, size, size.number + before + after)
        behind = behind.resized(dim, axis, more)

    def write(gm: fx.GraphModule, node: fx.Node) -> None:
        value = arguments_of(node, "input", "pad", "mode", "value").get("value")
        node.args, node.kwargs = (data_input(node), straight, "constant", value), {}

    return behind, write


def _elementwise(spans: Spans, node: fx.Node, sources: list[fx.Node]) -> Found | None:
    """What combines values place by place, all in one layout but where they are spread out."""
    views = [spans.view(n) for n in sources]
    known = [view for view in views if view is not None]
    if len(known) < len(views) or len({len(view.axes) for view in known}) > 1:
        return None
    rank = max(len(view.rows) for view in known)
    rows = _together([_padded(view.rows, rank) for view in known])
    axes = _together([tuple(whole(i, n) for i, n in enumerate(v.axes)) for v in known])
    if rows is None or axes is None:
        return None
    sizes = tuple(row[0].size if row else ONE for row in axes)
    constants = {n: spans.net.constant(n) for n in node.all_input_nodes if n.op == "get_attr"}
    moved = {n: _constant(value, rows, sizes) for n, value in constants.items()}
    if any(value is None for value in moved.values()):
        return None
    places = [n.name for n in moved]

    def write(gm: fx.GraphModule, node: fx.Node) -> None:
        for one in [n for n in node.all_input_nodes if n.name in places]:
            _put_constant(gm, node, one, rows, sizes)

    return View(rows, sizes, known[0].origin), write


def _padded(rows: Rows, rank: int) -> Rows:
    return ((),) * (rank - len(rows)) + rows


def _together(all_rows: list[Rows]) -> Rows | None:
    """The dimensions of values that are combined, of which some may have one position."""
    found: list[Row] = []
    for dim in zip(*all_rows, strict=True):
        large: set[tuple[Part, ...]] = {row for row in dim if row}
        if len(large) > 1:
            return None
        found.append(large.pop() if large else ())
    return tuple(found)


def _constant(value: Tensor | None, rows: Rows, sizes: tuple[Size, ...]) -> Tensor | None:
    return None if value is None else in_straight(value.detach(), rows, sizes)


def _put_constant(
    gm: fx.GraphModule, node: fx.Node, read: fx.Node, rows: Rows, sizes: tuple[Size, ...]
) -> None:
    """Let a node read a constant in another shape."""
    value = constant(gm, read)
    made = _constant(value, rows, sizes)
    if value is None or made is None or made.shape == value.shape:
        return
    number = 0
    while hasattr(gm, f"_straight_{number}"):
        number += 1
    gm.register_buffer(f"_straight_{number}", made)
    with gm.graph.inserting_before(node):
        node.replace_input_with(read, gm.graph.get_attr(f"_straight_{number}"))
