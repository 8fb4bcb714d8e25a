"""The places, names and shapes of the nodes that stand for a site once it is rewritten."""

from __future__ import annotations

from torch import fx

from rmfx.algebra.affine import AffineConv
from rmfx.ir.laterals import added_channels
from rmfx.ir.names import module_path
from rmfx.ir.net import Net
from rmfx.ir.notes import Shape

from .columns import Column, Linear, Shared, Sided
from .site import Site


def in_type_of(join: fx.Node, value: fx.Node) -> fx.Node:
    """The value in the type of the join, where autocast lets it add values of two types."""
    types = {n.meta["dtype"][0] for n in join.all_input_nodes if "dtype" in n.meta}
    if len(types) < 2:
        return value
    with join.graph.inserting_before(join):
        cast = join.graph.call_method("to", (value, join.meta["dtype"][0]))
    cast.meta = dict(join.meta)
    value.meta.pop("dtype", None)  # that of the join, which a layer under autocast does not give
    return cast


def label_of(site: Site, column: Column, index: int) -> tuple[str, fx.Node]:
    """Module path for a column's layer, and the node whose name and place it takes."""
    nodes = [n for step in column.steps for n in step.nodes if n.op == "call_module"]
    if isinstance(column, Sided):
        return "", column.lateral.node
    if isinstance(column, Shared):
        return "", column.layer.node
    if nodes:
        return str(nodes[0].target), nodes[0]
    place = module_path(site.join)
    role = "duplicate" if index == 0 else "merge"
    return (f"{place}.{role}" if place else f"{site.join.name}_{role}"), site.join


def widths_behind(net: Net, column: Column, widths: tuple[int, int], dims: int) -> tuple[int, int]:
    """Channels of both blocks behind a column."""
    if isinstance(column, Linear):
        return column.main.out_channels, column.carry.out_channels
    if not isinstance(column, Sided):
        return widths
    added = added_channels(net, column.lateral, dims)
    main, carry = widths
    return (main + added, carry) if column.block == 0 else (main, carry + added)


def note_column_shape(
    site: Site, column: Column, source: fx.Node, made: fx.Node, width: int
) -> None:
    """The shape of a column's node, where that of its input is known."""
    shape: Shape | None = source.meta.get("shape")
    if shape is not None and not isinstance(column, (Sided, Shared)):
        layer = column.main if isinstance(column, Linear) else None
        own = layer or AffineConv.identity(width, site.dims)
        made.meta["shape"] = _shape_after(own, shape, width)
    made.meta["dtype"] = (site.dtype, site.device)


def _shape_after(layer: AffineConv, shape: Shape, width: int) -> Shape:
    if not layer.dims:
        return (*shape[:-1], width)
    size = (
        None if n is None else (n + a) // s
        for n, a, s in zip(shape[2:], layer.growth, layer.stride, strict=True)
    )
    return (shape[0], width, *size)
