"""Plans: the columns of a plain chain, the layers that they become, and what they cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import fx

from rmfx.algebra.blockwise import all_means
from rmfx.errors import Refusal

from .column import Column
from .columns import Built, Linear, Pointwise, linear_of
from .layout import Layout, built, layout_of
from .order import Ordered
from .target import Target


@dataclass(frozen=True, eq=False)
class Plan:
    """An arrangement of a site.

    Attributes:
        columns: the layers of the plain chain.
        layout: how the two blocks stand in them, and what that costs.
        target: what the layout was chosen for.
        kept: nodes of the shortcut that stay, because others read what they give.
        place: what sets it apart from the others.
    """

    columns: tuple[Column, ...]
    layout: Layout
    target: Target
    kept: frozenset[fx.Node] = frozenset()
    place: str = ""

    @property
    def work(self) -> float:
        """Multiply-adds per position of the fork."""
        return self.layout.work

    @property
    def price(self) -> float:
        """What it is chosen by."""
        return self.layout.price

    @property
    def beyond(self) -> float:
        """Multiply-adds, per position of the fork, for activations that differ between channels."""
        total, area = 0.0, 1.0
        for column in self.columns:
            if isinstance(column, Linear):
                area /= math.prod(column.main.stride)
            if isinstance(column, Pointwise):
                means = column.means or all_means(column.blocks)[0]
                total += self.target.beyond.get(means, 0.0) * area * sum(column.widths)
        return total

    def with_columns(self, columns: Sequence[Column]) -> Plan | Refusal:
        """The same with other columns, in their own cheapest layout."""
        plan = plan_of(columns, self.target, self.place)
        return plan if isinstance(plan, Refusal) else replace(plan, kept=self.kept)

    def with_weights(self) -> Plan | Refusal:
        """The same with the products of what stands in one column."""
        columns = list[Column]()
        for column in self.columns:
            made = column.merged() if isinstance(column, Linear) else column
            if isinstance(made, Refusal):
                return made
            columns.append(made)
        return replace(self, columns=tuple(columns))


def plan_of(columns: Sequence[Column], target: Target, place: str = "") -> Plan | Refusal:
    """Some columns in their cheapest layout, without building any weight."""
    layout = layout_of(columns, target)
    if isinstance(layout, Refusal):
        return layout
    return Plan(tuple(columns), layout, target, place=place)


def build(plan: Plan) -> list[Column] | Refusal:
    """The columns with every linear one as the layer that it becomes."""
    linear = linear_of(plan.columns)
    forms, runs = iter(plan.layout.forms), 1
    made: list[Column] = []
    for column in plan.columns:
        if isinstance(column, Ordered):
            column = column.between(next(forms).runs)
            runs = column.runs
            made += [] if column.stays else [column]
            continue
        if not isinstance(column, Linear):
            made.append(replace(column, runs=runs) if runs > 1 else column)
            continue
        form = next(forms)
        layer = built(column, form, (column is linear[0], column is linear[-1]))
        if isinstance(layer, Refusal):
            return layer
        pair, runs = (column.main, column.carry), form.runs[1]
        made.append(Built(*pair, layer, steps=column.steps, taps=column.taps, runs=runs))
    return made
