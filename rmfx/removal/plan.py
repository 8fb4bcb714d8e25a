"""From a site to the arrangements of a plain chain, the cheapest first."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from operator import itemgetter

from rmfx.algebra.affine import AffineConv
from rmfx.algebra.products import unmerged
from rmfx.errors import Refusal
from rmfx.ir.elements import ByChannel
from rmfx.ir.notes import shape_of
from rmfx.words import PADDED

from .alignment import aligned
from .assembly import Plan, plan_of
from .column import Column
from .columns import Linear, column_of
from .frames import frames
from .layout import described
from .placement import Beside, fitted, placements
from .site import Chain, Site
from .target import TIME, Target
from .tiling import hollow, in_any_order, taken_apart
from .widths import padded, widths_of


def plans(site: Site, target: Target = TIME) -> list[Plan] | Refusal:
    """Every exact arrangement that was found, cheapest first."""
    f, g = site.branches
    options: list[Plan] = []
    refusals: list[Refusal] = []
    for main, shortcut in ((f, g), (g, f)):
        pooled = any(isinstance(step.layer, ByChannel) for step in main)
        if pooled or not all(step.layer.is_linear for step in shortcut):
            continue
        found = _beside(site, main, shortcut, target)
        if isinstance(found, Refusal):
            refusals.append(found)
        else:
            options += found
    single = merge(site)
    if isinstance(single, Plan):
        options.append(single)
    if not options:
        beside = aligned(site, f, g, target)
        if isinstance(beside, Refusal):
            refusals.append(beside)
        else:
            options.append(beside)
    if not options:
        pools = (step.layer for step in f + g if isinstance(step.layer, ByChannel))
        return next((Refusal(p.reason, (p.node.name,)) for p in pools), refusals[0])
    return sorted(options, key=lambda plan: (plan.price, len(plan.columns)))


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
    plan = plan_of([Linear(main, other, steps=steps)], TIME, "one layer")
    return plan.at(site.join.name) if isinstance(plan, Refusal) else plan


def _as_one(site: Site, branch: Chain) -> AffineConv | Refusal:
    """A linear branch as one layer."""
    identity = AffineConv.identity(site.channels, site.dims)
    layer = unmerged([step.affine for step in branch] or [identity])
    nodes = (n.name for step in branch for n in step.nodes)
    return layer.at(*nodes) if isinstance(layer, Refusal) else layer


def _fitted(site: Site, linear: Sequence[AffineConv], shortcut: AffineConv) -> AffineConv:
    """The shortcut with the branch's output size, where the two agree for the example."""
    shape = shape_of(site.fork)
    if shape is None or None in shape or not site.sized:
        return shortcut
    return fitted(linear, shortcut, shape[2:] if site.dims else ())


# ---- a linear shortcut beside a chain -----------------------------------------------------------
def _beside(site: Site, main: Chain, shortcut: Chain, target: Target) -> list[Plan] | Refusal:
    """A linear shortcut at each place where its layers fit beside the main branch."""
    found: list[Plan] = []
    refusal = Refusal("the shortcut fits beside no layer of the branch", (site.join.name,))
    cheapest, forms = math.inf, list(frames(main, site.channels, site.dims))
    best = forms[0]
    for framed in forms:
        ways = _ways_beside(site, framed, shortcut)
        if isinstance(ways, Refusal):
            refusal = ways
            continue
        options = list(_arranged(site, framed, ways, shortcut, target))
        price = min((plan.price for plan in options), default=math.inf)
        cheapest, best = min((cheapest, best), (price, framed), key=itemgetter(0))
        found += options
    if found and target.rearranges:
        price_of = partial(_price, site, hollow(shortcut), target)
        for framed in dict.fromkeys((forms[0], best)):
            apart = taken_apart(in_any_order(framed), price_of)
            ways = _ways_beside(site, apart, shortcut)
            if not isinstance(ways, Refusal):
                found += _arranged(site, apart, ways, shortcut, target)
    # Carrying the fork itself, as far as it goes, is best among equals: its sign may be known.
    found.reverse()
    return found or refusal


def _price(site: Site, shortcut: Chain, target: Target, main: Chain) -> float:
    """Of the cheapest arrangement of a branch as it is."""
    ways = _ways_beside(site, main, shortcut)
    if isinstance(ways, Refusal):
        return math.inf
    options = _arranged(site, main, ways, shortcut, target)
    return min((plan.price for plan in options), default=math.inf)


def _arranged(
    site: Site, main: Chain, ways: Sequence[Beside], shortcut: Chain, target: Target
) -> Iterator[Plan]:
    """A branch as it is beside a linear shortcut, at each of some places."""
    last = max((i for i, step in enumerate(shortcut) if step.tapped), default=-1)
    kept = frozenset(n for step in shortcut[: last + 1] for n in step.nodes)
    for beside in ways:
        columns = _columns(site, main, beside, shortcut)
        place = _place([count for _, count in beside], bool(shortcut))
        for plan in _widths(columns, target):
            yield replace(plan, kept=kept, place=f"{place}{plan.place}")


def _ways_beside(site: Site, main: Chain, shortcut: Chain) -> Sequence[Beside] | Refusal:
    """Where the layers of a shortcut may stand beside those of a branch."""
    linear, rigid = _geometry(site, main)
    factors = [step.affine for step in shortcut] or [AffineConv.identity(site.channels, site.dims)]
    ways = placements(linear, factors, rigid, partial(_fitted, site))
    if isinstance(ways, Refusal):
        return ways.at(site.join.name)
    found = list(ways) if shortcut else list(itertools.islice(ways, 1))
    whole = _as_one(site, shortcut)
    return whole if not found and isinstance(whole, Refusal) else found


def _place(counts: Sequence[int], has_layers: bool) -> str:
    """Beside which layers of the branch those of the shortcut stand."""
    if len(counts) == 1:
        return "one layer"
    carried = f"carried past {len(counts)} layers"
    if not has_layers:
        return carried
    layers = [str(i + 1) for i, n in enumerate(counts) if n > (counts[i - 1] if i else 0)]
    which = f"layer{'s' if len(layers) > 1 else ''} {' and '.join(layers)}"
    return f"{carried}, the shortcut's own in {which}"


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


def _columns(site: Site, main: Chain, beside: Beside, shortcut: Chain) -> list[Column]:
    columns: list[Column] = []
    position, before = -1, 0  # of the last layer that moves or resizes the carry, and up to it
    for step in main:
        position += step.layer.geometry(step.channels) is not None
        carry, count = beside[position]
        # What is carried: the fork, then the value behind each layer of the shortcut.
        carried = shortcut[count - 1].value if count and shortcut else site.fork
        layers = (step.layer, carry if isinstance(step.layer, AffineConv) else None)
        widths = (step.channels, carry.out_channels)
        column = column_of((step, None), layers, widths, carried)
        if isinstance(column, Linear):
            column = replace(column, steps=(step, *shortcut[before:count]))
            before = count
        columns.append(column)
    return columns


def _widths(columns: list[Column], target: Target) -> Iterator[Plan]:
    """The arrangement with its carry as it is, and padded to fit beside groups."""
    own = None
    for widths in widths_of(columns):
        plan = plan_of(padded(columns, widths), target)
        if not isinstance(plan, Refusal):
            wider = f", {PADDED}" if own else ""
            yield replace(plan, place=f"{described(plan.columns, plan.layout)}{wider}")
        own = widths
