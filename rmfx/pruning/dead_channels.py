"""Channels that carry nothing of their own go, exactly.

With x_c channel c of the value that a layer W reads, and W_c the columns it is multiplied by:

    unused       W_c = 0                  goes
    zero         x_c = 0                  goes
    constant     x_c = k, W does not pad  goes,  b' = b + k·Σ W_c
    constant     x_c = k, W pads          goes,  W_r' = W_r + (k / k_r)·W_c,  r another constant
    duplicate    x_c = x_r                goes,  W_r' = W_r + W_c

A padded layer reads 0 beyond the border where a constant would go on, so there a constant is no
bias; but all constants are multiples of one of them, which stays. A channel goes if it goes at
every layer that reads it; the layer that made it and the channelwise layers between lose its rows.
Zero and constant are proven by ranges, duplicates by equal rows and equal parameters behind them.

Forms handled: convolutions and Linear as makers and readers, with groups where every group loses
the same number or a whole group goes; between them pointwise activations (per channel too), batch
norm, depthwise layers, pools, means over space, scales by a number, crops, zero padding, dropout,
and flattening before Linear, where a channel is a block of columns.

Refused, so all channels stay: values that reach an add, a product, a concatenation, an output or
any other operation; values that in-place operations share; layers that are shared, tied, hooked or
parametrized. One channel stays in every layer and group.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from rmfx.algebra.affine import AffineConv
from rmfx.analysis.constant_channels import PinnedRanges
from rmfx.analysis.regions import Inner, Leaf, Region, find_region
from rmfx.ir.net import Net

from .slicing import Merge, cut_columns, cut_layer, cut_module, inputs_read, of_channels, put

FAIR = 1 / 64  # how small a constant may be beside those that it stands in for
Need = tuple[int, int]  # a leaf that pads, and one of its groups


@dataclass(frozen=True, eq=False)
class View:
    """What one reader makes of the units of a region.

    Attributes:
        leaf: the reader.
        numbers: (channels,) the number that a channel always is, 0 if it is none.
        spent: (units,) whether a unit can go without another's help.
        rim: (units,) the number of a unit that is constant but meets padding, else 0.
        wants: (units,) whether a unit can go only with the help of a constant that stays.
        group: (units,) of the reader, in which a unit is read.
    """

    leaf: Leaf
    numbers: Tensor
    spent: Tensor
    rim: Tensor
    wants: Tensor
    group: Tensor


@dataclass(eq=False)
class Plan:
    """Which units of a region go, and what takes their place at which reader.

    Attributes:
        goes: (units,) booleans.
        twins: unit that goes -> the unit that equals it.
        helped: for each reader, unit that goes -> the constant unit that takes it over.
    """

    goes: Tensor
    twins: dict[int, int] = field(default_factory=dict)
    helped: list[dict[int, int]] = field(default_factory=list)


# ---- what may go --------------------------------------------------------------------------------


def _view(ranges: PinnedRanges, leaf: Leaf, units: int) -> View:
    layer, block = leaf.layer, leaf.block
    used = inputs_read(layer.weight, layer.groups)
    is_number, numbers = ranges.numbers(leaf.value, layer.in_channels, layer.dims)
    spent = ~used | (is_number & ((numbers == 0) | (not layer.pads)))
    spent = spent.reshape(units, block).all(1)
    helpful = layer.pads and block == 1
    rim = numbers if helpful else torch.zeros(units, dtype=torch.float64)
    group = torch.arange(units) * block // layer.block[0]
    return View(leaf, numbers, spent, rim, (rim != 0) & ~spent, group)


def _plan(region: Region, ranges: PinnedRanges) -> Plan | None:
    """What can go from a region, None if nothing can."""
    views = [_view(ranges, leaf, region.units) for leaf in region.leaves]
    spent = torch.stack([v.spent for v in views]).all(0)
    constant = torch.stack([v.spent | v.wants for v in views]).all(0) & ~spent
    plan = Plan(spent.clone())
    _send_constants(plan, views, constant)
    _send_twins(plan, region, views, ~spent & ~constant)
    _even_out(plan, region)
    if not bool(plan.goes.any()):
        return None
    plan.helped = [_helpers(plan, view) for view in views]
    return plan


def _send_constants(plan: Plan, views: list[View], constant: Tensor) -> None:
    """Let constants go at padded readers, but for as few as can stand in for all of them."""
    candidates = constant.nonzero().flatten().tolist()
    if not candidates:
        return
    wanted = {u: _needs(views, u) for u in candidates}
    largest: dict[Need, float] = {}
    for u, needs in wanted.items():
        for i, group in needs:
            size = abs(float(views[i].rim[u]))
            largest[i, group] = max(size, largest.get((i, group), 0.0))
    kept = (~plan.goes & ~constant).nonzero().flatten().tolist()
    open_needs = set(largest).difference(*(_offers(views, u, largest) for u in kept))
    offers = {u: _offers(views, u, largest) for u in candidates}
    plan.goes |= constant
    while open_needs:
        best = max(candidates, key=lambda u: (len(offers[u] & open_needs), _strength(views, u), -u))
        plan.goes[best] = False
        open_needs -= offers[best]


def _needs(views: list[View], unit: int) -> set[Need]:
    """Where a unit can go only if a constant stays."""
    return {(i, int(v.group[unit])) for i, v in enumerate(views) if v.wants[unit]}


def _offers(views: list[View], unit: int, largest: Mapping[Need, float]) -> set[Need]:
    """Where a unit is a constant of which the others are moderate multiples.

    A tiny one would need huge weights, and may be rounded to nothing where it is computed.
    """
    at = [((i, int(v.group[unit])), abs(float(v.rim[unit]))) for i, v in enumerate(views)]
    return {need for need, size in at if need in largest and size >= FAIR * largest[need]}


def _strength(views: list[View], unit: int) -> float:
    """Large constants help best: the factors stay small."""
    return max(abs(float(v.rim[unit])) for v in views)


def _helpers(plan: Plan, view: View) -> dict[int, int]:
    """For the constant units that go: the largest constant of the group that stays."""
    stays = ~plan.goes & (view.rim != 0)
    best: dict[int, int] = {}
    for u in stays.nonzero().flatten().tolist():
        group = int(view.group[u])
        if group not in best or abs(view.rim[u]) > abs(view.rim[best[group]]):
            best[group] = u
    gone = (plan.goes & view.wants).nonzero().flatten().tolist()
    return {u: best[int(view.group[u])] for u in gone if u not in plan.twins}


def _send_twins(plan: Plan, region: Region, views: list[View], live: Tensor) -> None:
    """Let units go that equal another one, in the same group of every grouped layer."""
    if int(live.sum()) < 2:
        return
    first: dict[tuple[object, ...], int] = {}
    rows = _signatures(region).numpy()
    groups = [v.group.tolist() for v in views]
    own = region.units // region.layer.groups
    for u in live.nonzero().flatten().tolist():
        key = (rows[u].tobytes(), u // own, *(g[u] for g in groups))
        twin = first.setdefault(key, u)
        if twin != u:
            plan.twins[u] = twin
            plan.goes[u] = True


def _signatures(region: Region) -> Tensor:
    """All that makes a unit what it is, (units, bytes)."""
    tables = [region.layer.weight, region.layer.bias]
    for part in region.inner:
        if isinstance(part.layer, AffineConv):
            tables += [part.layer.weight, part.layer.bias]
        elif part.layer is not None:
            held = (*part.layer.parameters(), *part.layer.buffers())
            tables += [t for t in held if t.dim() and t.shape[0] == region.units * part.block]
    return torch.cat([_as_bytes(t, region.units) for t in tables], 1)


def _as_bytes(table: Tensor, units: int) -> Tensor:
    rows = table.detach().cpu().reshape(units, -1)
    rows = rows.to(torch.uint8) if rows.dtype == torch.bool else rows + 0  # −0 is 0
    return rows.contiguous().view(torch.uint8)


def _even_out(plan: Plan, region: Region) -> None:
    """Let units stay until every group of every layer loses the same number, and not all."""
    counts = sorted({region.layer.groups, *(leaf.layer.groups for leaf in region.leaves)})
    before = -1
    while before != int(plan.goes.sum()):
        before = int(plan.goes.sum())
        for groups in counts:
            goes = plan.goes.view(groups, -1)  # writes to plan.goes
            stay = (~goes).sum(1)
            missing = stay.max().clamp(min=1) - stay
            nth = goes.long().cumsum(1)
            goes &= nth > missing.reshape(-1, 1)
    plan.twins = {u: twin for u, twin in plan.twins.items() if plan.goes[u]}


# ---- the rewrite --------------------------------------------------------------------------------


def _cut(net: Net, region: Region, plan: Plan, ranges: PinnedRanges) -> None:
    """Carry out a plan."""
    keep = ~plan.goes
    # All ranges first: what is found out later would concern fewer channels.
    for part in region.inner:
        ranges.of(part.node)
    for leaf, helped in zip(region.leaves, plan.helped, strict=True):
        put(net, leaf.node, _cut_leaf(region, plan, leaf, helped, ranges))
    for part in region.inner:
        _cut_inner(net, part, keep)
    put(net, region.producer, cut_layer(region.layer, of_channels(keep, region.block)))
    maker = Inner(region.producer, region.block, region.layer.dims)
    for part in (maker, *region.inner):
        ranges.keep(part.node, of_channels(keep, part.block))
        net.resize(part.node, 1 if part.dims else -1, int(keep.sum()) * part.block)


def _cut_leaf(
    region: Region, plan: Plan, leaf: Leaf, helped: Mapping[int, int], ranges: PinnedRanges
) -> AffineConv:
    layer, block = leaf.layer, leaf.block
    _, numbers = ranges.numbers(leaf.value, layer.in_channels, layer.dims)
    folded = plan.goes.clone()
    folded[list(plan.twins)] = False
    merges = [
        Merge(u * block + j, twin * block + j, 1.0)
        for u, twin in plan.twins.items()
        for j in range(block)
    ]
    merges += [Merge(u, r, float(numbers[u] / numbers[r])) for u, r in helped.items()]
    shift = torch.where(of_channels(folded, block), numbers, 0.0)
    shift = torch.zeros_like(shift) if layer.pads else shift
    return cut_columns(layer, of_channels(~plan.goes, block), shift, merges)


def _cut_inner(net: Net, part: Inner, keep: Tensor) -> None:
    rows = of_channels(keep, part.block)
    if isinstance(part.layer, AffineConv):
        put(net, part.node, cut_layer(part.layer, rows))
    elif part.layer is not None:
        put(net, part.node, cut_module(part.layer, rows))


class Cleaner:
    """Plans and cuts regions until nothing is left to do.

    Forward first, because what goes before a layer decides what its outputs are; then backward,
    because what goes behind a layer decides which of its inputs are used; then wherever something
    has changed.

    Attributes:
        changed: nodes whose value has fewer channels than before.
    """

    def __init__(self, net: Net, ranges: PinnedRanges) -> None:
        self._net = net
        self._ranges = ranges
        self._feeds: dict[fx.Node, set[fx.Node]] = {}
        self._due: set[fx.Node] = set()
        self.changed: set[fx.Node] = set()

    def run(self) -> None:
        order = [node for node in self._net.graph.nodes if node.op == "call_module"]
        self._due = set(order)
        while self._due:
            for node in (*order, *reversed(order)):
                if node in self._due:
                    self._due.discard(node)
                    self._visit(node)

    def _visit(self, producer: fx.Node) -> None:
        region = self._clean(producer, 1)
        if region is None:
            return
        sizes = {leaf.layer.block[0] for leaf in region.leaves if leaf.layer.groups > 1}
        for block in sorted(sizes - {1}):
            self._clean(producer, block)

    def _clean(self, producer: fx.Node, block: int) -> Region | None:
        """Cut what can go, in units of `block` channels; returns the region as it is then."""
        region = find_region(self._net, producer, block)
        if region is None:
            return None
        for leaf in region.leaves:
            self._feeds.setdefault(leaf.node, set()).add(producer)
        plan = _plan(region, self._ranges)
        if plan is None:
            return region
        _cut(self._net, region, plan, self._ranges)
        self._net.rewrites["dead_channels"] += 1
        self.changed |= {producer, *(part.node for part in region.inner)}
        self._due |= {producer, *(leaf.node for leaf in region.leaves)}
        self._due |= self._feeds.get(producer, set())
        return find_region(self._net, producer, block)
