"""From a site to the arrangements of a plain chain, the cheapest first."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import fx

from rmfx.algebra.affine import AffineConv
from rmfx.algebra.laws import chain as compose_chain
from rmfx.errors import Refusal
from rmfx.ir.elements import CHANNEL_BY_CHANNEL, Border, MaxPool
from rmfx.ir.laterals import Lateral

from .alignment import aligned
from .columns import (
    POINTWISE,
    Column,
    Linear,
    Normalised,
    Plan,
    Pointwise,
    Shared,
    Sided,
    groups_of,
    runs_of,
    taps_of,
    work_of,
)
from .placement import fitted, placements
from .site import Chain, Norm, Site, Step

NON_LINEAR = (*POINTWISE, Lateral, *CHANNEL_BY_CHANNEL)


def plans(site: Site) -> list[Plan] | Refusal:
    """Every exact arrangement that was found, cheapest first."""
    f, g = site.branches
    options: list[Plan] = []
    refusals: list[Refusal] = []
    for main, shortcut in ((f, g), (g, f)):
        if not _is_linear(shortcut) or any(isinstance(s.layer, MaxPool) for s in main):
            continue
        found = _beside(site, main, shortcut)
        if isinstance(found, Refusal):
            refusals.append(found)
        else:
            options += found
    merged = merge(site)
    if isinstance(merged, Plan):
        options.append(merged)
    if not options:
        beside = aligned(site, f, g)
        if isinstance(beside, Refusal):
            refusals.append(beside)
        else:
            options.append(beside)
    if not options:
        pools = (step.layer for step in f + g if isinstance(step.layer, MaxPool))
        return next((Refusal(p.reason, (p.node.name,)) for p in pools), refusals[0])
    return sorted(options, key=lambda plan: (plan.work, len(plan.columns)))


def _is_linear(chain: Chain) -> bool:
    return not any(isinstance(step.layer, NON_LINEAR) for step in chain)


# ---- two linear branches ------------------------------------------------------------------------
def merge(site: Site) -> Plan | Refusal:
    """Both branches as one layer, where both are linear and no border comes between."""
    for step in itertools.chain(*site.branches):
        name = step.nodes[-1].name if step.nodes else site.join.name
        if isinstance(step.layer, (*NON_LINEAR, Norm)):
            return Refusal("a branch is not linear", (name,))
        if step.tapped:
            return Refusal("a value inside a branch is read elsewhere too", (name,))
    main, other = (_as_one(site, branch) for branch in site.branches)
    if isinstance(main, Refusal):
        return main
    if isinstance(other, Refusal):
        return other
    other = _fitted(site, [main], other)
    steps = tuple(itertools.chain(*site.branches))
    columns = (Linear(main, other, steps=steps),)
    work = work_of(columns)
    if isinstance(work, Refusal):
        return work.at(site.join.name)
    return Plan(columns, work, layout="one layer")


def _as_one(site: Site, branch: Chain) -> AffineConv | Refusal:
    """A linear branch as one layer."""
    identity = AffineConv.identity(site.channels, site.dims)
    layer = compose_chain([step.affine for step in branch] or [identity])
    nodes = (n.name for step in branch for n in step.nodes)
    return layer.at(*nodes) if isinstance(layer, Refusal) else layer


def _fitted(site: Site, linear: Sequence[AffineConv], shortcut: AffineConv) -> AffineConv:
    """The shortcut with the branch's output size, where the two agree for the example."""
    shape = site.fork.meta.get("shape")
    if shape is None or None in shape or not site.sized:
        return shortcut
    return fitted(linear, shortcut, shape[2:] if site.dims else ())


# ---- a linear shortcut beside a chain -----------------------------------------------------------
def _beside(site: Site, main: Chain, shortcut: Chain) -> list[Plan] | Refusal:
    """A shortcut that is one linear map, at each place where it fits beside the main branch."""
    single = _as_one(site, shortcut)
    if isinstance(single, Refusal):
        return single
    main = _framed(site, main)
    linear, rigid = _geometry(site, main)
    single = _fitted(site, linear, single)
    places = placements(linear, single, rigid)
    if isinstance(places, Refusal):
        return places.at(site.join.name)
    value = shortcut[-1].value if shortcut else site.fork
    last = max((i for i, step in enumerate(shortcut) if step.tapped), default=-1)
    kept = frozenset(n for step in shortcut[: last + 1] for n in step.nodes)
    found: list[Plan] = []
    for j, beside in places:
        columns = _columns(main, beside, j, (site.fork, value), shortcut)
        place = f"shortcut in layer {j + 1} of {len(beside)}" if len(beside) > 1 else "one layer"
        for plan in _widths(columns):
            layout = f"{place}{plan.layout}"
            found.append(replace(plan, kept=kept, layout=layout))
    # Carrying the fork itself, as far as it goes, is best among equals: its sign may be known.
    found.reverse()
    return found or Refusal("the shortcut fits beside no layer of the branch", (site.join.name,))


def _geometry(site: Site, main: Chain) -> tuple[list[AffineConv], list[int]]:
    """The layers that move or resize the carry, and which of them are paddings."""
    layers: list[AffineConv] = []
    rigid: list[int] = []
    channels = site.channels
    for step in main:
        if isinstance(step.layer, Border):
            rigid.append(len(layers))
            layers.append(step.layer.affine(channels))
        elif isinstance(step.layer, AffineConv):
            layers.append(step.layer)
        channels = step.channels
    return layers, rigid


def _columns(
    main: Chain,
    beside: Sequence[AffineConv],
    j: int,
    values: tuple[fx.Node, fx.Node | None],
    shortcut: Chain,
) -> list[Column]:
    columns: list[Column] = []
    position = 0
    carry = 0
    for step in main:
        layer = step.layer
        origin: dict[str, Any] = {"steps": (step,), "taps": taps_of(step, 0)}
        if isinstance(layer, AffineConv):
            if position == j:
                origin["steps"] += shortcut
            columns.append(Linear(layer, beside[position], **origin))
            carry = beside[position].out_channels
            position += 1
        elif isinstance(layer, POINTWISE):
            # What is carried: the fork before the shortcut's map, its value behind it.
            carried = values[0] if position <= j else values[1]
            columns.append(Pointwise(layer, None, (step.channels, carry), carried, **origin))
        elif isinstance(layer, Lateral):
            columns.append(Sided(layer, 0, **origin))
        elif isinstance(layer, Border):
            columns.append(Shared(layer, **origin))
            position += 1
        elif isinstance(layer, Norm):
            columns.append(Normalised(layer, carry, **origin))
        else:
            raise TypeError("a carry does not pass a max pool")
    return columns


def _width(columns: Sequence[Column]) -> int:
    """Channels of the carry behind the last linear column."""
    return next(c.carry.out_channels for c in reversed(columns) if isinstance(c, Linear))


def _framed(site: Site, chain: Chain) -> Chain:
    """The chain with a linear layer at both ends; batch norm stays only between them."""
    steps = list(chain)
    if steps and isinstance(steps[-1].layer, Norm):
        steps[-1] = replace(steps[-1], layer=steps[-1].layer.affine)
        before = steps[-2] if len(steps) > 1 else None
        if before and isinstance(before.layer, AffineConv) and not before.tapped:
            merged = compose_chain([before.layer, steps[-1].affine])
            if isinstance(merged, AffineConv):
                nodes = before.nodes + steps[-1].nodes
                steps[-2:] = [replace(steps[-1], layer=merged, nodes=nodes)]
    if not steps or not isinstance(steps[0].layer, AffineConv):
        steps.insert(0, _identity_step(site.channels, site.dims))
    # A value that is read elsewhere must be there before ∇ adds to it.
    if not isinstance(steps[-1].layer, AffineConv) or steps[-1].tapped:
        steps.append(_identity_step(steps[-1].channels, site.dims))
    return tuple(steps)


def _identity_step(channels: int, dims: int) -> Step:
    return Step(AffineConv.identity(channels, dims), (), None, channels)


# ---- width of the carry --------------------------------------------------------------------------
def _widths(columns: list[Column]) -> Iterator[Plan]:
    """The arrangement with its carry as it is, and padded to each group width that occurs."""
    linear = [c for c in columns if isinstance(c, Linear)]
    groups = {1} | {c.main.block[0] for c in linear[1:-1] if c.main.block[0] == c.main.block[1]}
    for width in sorted(groups):
        if width > 1 and not any(c.carry.out_channels % width for c in linear[:-1]):
            continue  # nothing to pad
        padded = _padded(columns, width)
        work = work_of(padded)
        if not isinstance(work, Refusal):
            yield Plan(tuple(padded), work, layout=_layout(padded, width))


def _layout(columns: Sequence[Column], width: int) -> str:
    """How the carry stands beside the main block between the two ends."""
    if width > 1:
        return f", carry padded to groups of {width}"
    turns = ", in turns with the branch" if runs_of(columns) > 1 else ""
    inner = [c for c in columns if isinstance(c, Linear)][1:-1]
    fits = {groups_of(c) is not None for c in inner}
    if not fits:
        return turns
    how = "carry partly grouped" if len(fits) == 2 else "grouped" if True in fits else "dense"
    return f"{turns}, {how}"


def _padded(columns: list[Column], width: int) -> list[Column]:
    """The carry padded with zero channels to a multiple of `width` between the two ends."""
    if width == 1:
        return columns
    linear = [i for i, c in enumerate(columns) if isinstance(c, Linear)]
    result: list[Column] = []
    for i, column in enumerate(columns):
        if isinstance(column, Linear):
            carry = column.carry
            n_in = carry.in_channels if i == linear[0] else _up(carry.in_channels, width)
            n_out = carry.out_channels if i == linear[-1] else _up(carry.out_channels, width)
            result.append(replace(column, carry=carry.pad_channels(n_in, n_out)))
        elif isinstance(column, Pointwise):
            result.append(replace(column, widths=(column.widths[0], _width(result))))
        elif isinstance(column, Normalised):
            result.append(replace(column, carried=_width(result)))
        else:
            result.append(column)
    return result


def _up(n: int, width: int) -> int:
    return -(-n // width) * width
