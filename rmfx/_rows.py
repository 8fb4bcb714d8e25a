"""Rows of the report: what a site costs, and what it would cost once it is rewritten."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import cast

from torch import Tensor, fx, nn

from ._activation import Blockwise
from ._affine import MULTIPLYING
from ._carry import area_after
from ._columns import Column, Linear, Pointwise, sizes_of
from ._errors import Refusal, RmfxError
from ._graph import Net, Shape, Virtual, positions
from ._names import module_path
from ._site import Site
from ._strategy import Settled
from .report import SiteReport


@dataclass(frozen=True)
class Expense:
    """What some nodes cost; None where shapes are unknown.

    Attributes:
        macs: multiply-adds.
        moved: values read and written between layers.
        parameters: of the layers.
    """

    macs: int | None
    moved: int | None
    parameters: int


def expense_of(net: Net, nodes: Iterable[fx.Node], dims: int) -> Expense:
    """What some nodes of a net cost."""
    macs: int | None = 0
    moved: int | None = 0
    size = 0
    for node in nodes:
        taps, own = _weights(net, node)
        size += own
        if taps and macs is not None:
            count = positions(node.meta.get("shape"), dims)
            macs = None if count is None else macs + taps * count
        sizes = [_numel(n.meta.get("shape")) for n in (*node.all_input_nodes, node)]
        known = [n for n in sizes if n is not None]
        moved = None if moved is None or len(known) < len(sizes) else moved + sum(known)
    return Expense(macs, moved, size)


def _weights(net: Net, node: fx.Node) -> tuple[int, int]:
    """Multiply-adds of a node per position, and its parameters."""
    made, module = net.replacement(node), net.module(node)
    layer = made.layer if isinstance(made, Virtual) else None
    if isinstance(layer, Blockwise):
        return 0, sum(b.width for b in layer.blocks)
    if layer is not None:
        taps = layer.weight.numel()
        return taps, taps + (layer.out_channels if layer.has_bias else 0)
    own = made if isinstance(made, nn.Module) else module
    if own is None:
        return 0, 0
    taps = cast("Tensor", own.weight).numel() if isinstance(own, MULTIPLYING) else 0
    return taps, sum(p.numel() for p in own.parameters())


def _numel(shape: Shape | None) -> int | None:
    if shape is None or None in shape:
        return None
    return math.prod(n for n in shape if n is not None)


def expected_expense(site: Site, columns: Sequence[Column]) -> Expense:
    """What the columns of a plan will cost, once they are built."""
    linear = [c for c in columns if isinstance(c, Linear)]
    sizes = sizes_of(columns)
    if isinstance(sizes, Refusal):  # the plan was made with the same laws
        raise RmfxError(f"a planned layer cannot be built: {sizes.reason}")
    built = zip(sizes, area_after([c.main for c in linear]), strict=True)
    work, moved, size, area, width = 0.0, 0.0, 0, 1.0, site.channels
    for column in columns:
        moved += width * area
        if isinstance(column, Linear):
            weights, area = next(built)
            work += weights * area
            size += weights
            width = column.main.out_channels
            width += column.carry.out_channels if column is not linear[-1] else 0
        elif isinstance(column, Pointwise):
            width = sum(column.widths)
        moved += width * area
    count = positions(site.fork.meta.get("shape"), site.dims)
    if count is None:
        return Expense(None, None, size)
    return Expense(round(work * count), round(moved * count), size)


def row_of_match(net: Net, site: Site, settled: Settled, nodes: Sequence[fx.Node]) -> SiteReport:
    """The row of a site that can be removed, with what is expected of it.

    Args:
        nodes: those that go.
    """
    before = expense_of(net, [*nodes], site.dims)
    after = expected_expense(site, settled.plan.columns)
    carries = [c.carry.out_channels for c in settled.plan.columns[:-1] if isinstance(c, Linear)]
    return SiteReport(
        place=module_path(site.join),
        source=site.join.meta.get("source"),
        join=site.join.name,
        node=None,
        status="removed",
        strategy=settled.strategy,
        exactness=settled.exactness,
        gain=settled.gain,
        bits=settled.bits,
        layout=settled.plan.layout,
        shape=site.join.meta.get("shape"),
        carry=max(carries, default=0),
        macs_before=before.macs,
        macs_after=after.macs,
        moved_before=before.moved,
        moved_after=after.moved,
        params_before=before.parameters,
        params_after=after.parameters,
    )


def with_expense(row: SiteReport, after: Expense) -> SiteReport:
    """The row with what the site costs now."""
    return replace(
        row, macs_after=after.macs, moved_after=after.moved, params_after=after.parameters
    )


def row_of_refusal(node: fx.Node, refusal: Refusal, *, whole: bool) -> SiteReport:
    """The row of a site that stays.

    Args:
        whole: whether the node still holds what it held, and nothing beside it.
    """
    return SiteReport(
        place=module_path(node),
        source=node.meta.get("source"),
        join=node.name,
        node=node.name if whole else None,
        status="kept" if refusal.by_choice else "refused",
        reason=str(refusal),
        shape=node.meta.get("shape"),
    )
