"""From a site to the arrangements of a plain chain, the cheapest first."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import fx

from rmfx.algebra.affine import AffineConv
from rmfx.algebra.laws import chain as compose_chain
from rmfx.errors import Refusal
from rmfx.ir.elements import MaxPool
from rmfx.ir.notes import shape_of

from .alignment import aligned
from .assembly import Plan, groups_of, runs_of, work_of
from .columns import Column, Linear, column_of, linear_of
from .placement import fitted, placements
from .site import Chain, Norm, Site, Step, merged


def plans(site: Site) -> list[Plan] | Refusal:
    """Every exact arrangement that was found, cheapest first."""
    f, g = site.branches
    options: list[Plan] = []
    refusals: list[Refusal] = []
    for main, shortcut in ((f, g), (g, f)):
        pooled = any(isinstance(step.layer, MaxPool) for step in main)
        if pooled or not all(step.layer.is_linear for step in shortcut):
            continue
        found = _beside(site, main, shortcut)
        if isinstance(found, Refusal):
            refusals.append(found)
        else:
            options += found
    single = merge(site)
    if isinstance(single, Plan):
        options.append(single)
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


# ---- two linear branches ------------------------------------------------------------------------
def merge(site: Site) -> Plan | Refusal:
    """Both branches as one layer, where both are linear and no border comes between."""
    for step in itertools.chain(*site.branches):
        name = step.nodes[-1].name if step.nodes else site.join.name
        if not isinstance(step.layer, AffineConv):
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
    shape = shape_of(site.fork)
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
        moves = step.layer.geometry(channels)
        if isinstance(moves, AffineConv):
            if not step.layer.is_linear:
                rigid.append(len(layers))
            layers.append(moves)
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
    position = -1  # of the last layer that moves or resizes the carry
    for step in main:
        position += step.layer.geometry(step.channels) is not None
        carry = beside[position]
        # What is carried: the fork before the shortcut's map, its value behind it.
        carried = values[0] if position < j else values[1]
        layers = (step.layer, carry if isinstance(step.layer, AffineConv) else None)
        widths = (step.channels, carry.out_channels)
        column = column_of((step, None), layers, widths, carried)
        if isinstance(column, Linear) and position == j:
            column = replace(column, steps=(step, *shortcut))
        columns.append(column)
    return columns


def _framed(site: Site, chain: Chain) -> Chain:
    """The chain with a linear layer at both ends; batch norm stays only between them."""
    steps = list(chain)
    if steps and isinstance(steps[-1].layer, Norm):
        steps[-1] = replace(steps[-1], layer=steps[-1].layer.affine)
        whole = merged(*steps[-2:]) if len(steps) > 1 else None
        steps[-2:] = [whole] if whole else steps[-2:]
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
    linear = linear_of(columns)
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
    fits = {groups_of(column) is not None for column in linear_of(columns)[1:-1]}
    if not fits:
        return turns
    how = "carry partly grouped" if len(fits) == 2 else "grouped" if True in fits else "dense"
    return f"{turns}, {how}"


def _padded(columns: list[Column], width: int) -> list[Column]:
    """The carry padded with zero channels to a multiple of `width` between the two ends."""
    if width == 1:
        return columns
    last = linear_of(columns)[-1]
    before = linear_of(columns)[0].carry.in_channels
    result: list[Column] = []
    for column in columns:
        behind = before
        if isinstance(column, Linear):
            own = column.carry.out_channels
            behind = own if column is last else _up(own, width)
        result.append(column.padded(before, behind))
        before = behind
    return result


def _up(n: int, width: int) -> int:
    return -(-n // width) * width
