"""Rows of the report: what a site costs, and what it would cost once it is rewritten."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from torch import fx

from rmfx.analysis.multiply_adds import Expense, expense_of
from rmfx.errors import Refusal, WeightValueError
from rmfx.ir.names import module_path
from rmfx.ir.net import Net
from rmfx.ir.notes import SOURCE, positions, shape_of
from rmfx.report import SiteReport
from rmfx.words import PARALLEL, SKIP

from .assembly import Plan
from .columns import Linear, Pointwise, Sided, linear_of
from .order import Ordered
from .site import Site, find_sites, innermost
from .strategy import Settled
from .traffic import moved_beside


def expected_expense(site: Site, plan: Plan) -> Expense:
    """What the columns of a plan will cost, once they are built."""
    forms = iter(plan.layout.forms)
    moved, size, area, width = 0.0, 0, 1.0, site.channels
    beside: list[int | None] = []
    for column in plan.columns:
        read = width * area
        if isinstance(column, Linear):
            size += next(forms).weights
            area /= math.prod(column.main.stride)
            width = column.main.out_channels
            width += column.carry.out_channels if column is not plan.columns[-1] else 0
        elif isinstance(column, Ordered):
            if column.between(next(forms).runs).stays:
                continue
        elif isinstance(column, Pointwise):
            width = sum(column.widths)
        elif isinstance(column, Sided):
            width = sum(column.widths_behind((width, 0), site.dims))
        moved += read + width * area
        beside.append(moved_beside(column, width, site.dims))
    count = positions(shape_of(site.fork), site.dims)
    if count is None:
        return Expense(None, None, size)
    known = [n for n in beside if n is not None]
    whole = round(moved * count) + sum(known) if len(known) == len(beside) else None
    return Expense(round(plan.work * count), whole, size)


def row_of_match(net: Net, site: Site, settled: Settled, nodes: Sequence[fx.Node]) -> SiteReport:
    """The row of a site that can be removed, with what is expected of it.

    Args:
        nodes: those that go.
    """
    before = expense_of(net, nodes)
    after = expected_expense(site, settled.plan)
    carries = [c.carry.out_channels for c in linear_of(settled.plan.columns[:-1])]
    return SiteReport(
        place=module_path(site.join),
        source=site.join.meta.get(SOURCE),
        join=site.join.name,
        node=None,
        status="removed",
        strategy=settled.strategy,
        exactness=settled.exactness,
        gain=settled.gain,
        bits=settled.bits,
        layout=settled.plan.place,
        shape=shape_of(site.join),
        carry=max(carries, default=0),
        macs_before=before.macs,
        macs_after=after.macs,
        moved_before=before.moved,
        moved_after=after.moved,
        params_before=before.parameters,
        params_after=after.parameters,
        kind=_kind(site),
    )


def with_expense(row: SiteReport, after: Expense) -> SiteReport:
    """The row with what the site costs now."""
    return replace(
        row, macs_after=after.macs, moved_after=after.moved, params_after=after.parameters
    )


def row_of_refusal(net: Net, node: fx.Node, refusal: Refusal, *, whole: bool) -> SiteReport:
    """The row of a site that stays.

    Args:
        whole: whether the node still holds what it held, and nothing beside it.
    """
    return SiteReport(
        place=module_path(node),
        source=node.meta.get(SOURCE),
        join=node.name,
        node=node.name if whole else None,
        status="kept" if refusal.by_choice else "other" if refusal.apart else "refused",
        reason=str(refusal),
        shape=shape_of(node),
        kind="" if refusal.apart else _kind_of_join(net, node),
    )


def _kind(site: Site) -> str:
    """Whether a sum has a shortcut."""
    return PARALLEL if site.shortcut is None else SKIP


def _kind_of_join(net: Net, join: fx.Node) -> str:
    """The same of a sum that stays, as far as it can be read."""
    try:
        sites = find_sites(net, join, keep_norms=False)
    except WeightValueError:  # the reason why it stays, perhaps
        return SKIP
    return _kind(innermost(sites)) if isinstance(sites, list) else SKIP
