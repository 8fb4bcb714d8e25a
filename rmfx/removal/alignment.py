"""Two branches that are not linear, side by side: an alignment with the fewest columns."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

from torch import fx

from rmfx.algebra.affine import AffineConv
from rmfx.errors import Refusal
from rmfx.ir.laterals import Lateral
from rmfx.ir.nodes import between
from rmfx.ir.notes import why_frozen

from .assembly import Plan, plan_of
from .column import Column
from .columns import Linear, Pair, column_of, price_of
from .site import Chain, Norm, Site, Step
from .target import Target

Waits = tuple[Sequence[int], Sequence[int]]


def aligned(site: Site, f: Chain, g: Chain, target: Target) -> Plan | Refusal:
    """Two chains side by side: a shortest alignment of their layers."""
    f, g = (tuple(map(_without_norm, chain)) for chain in (f, g))
    if may_reorder(f + g):
        written = next((n for n in between(site.fork, site.join) if why_frozen(n)), None)
        if written is not None:
            return Refusal(why_frozen(written), (written.name,))
    waits = (_waits(site.fork, f, g), _waits(site.fork, g, f))
    pairs = _align(f, g, waits)
    if pairs is None:
        return _unaligned(site, f, g, waits)
    columns: list[Column] = []
    widths = (site.channels, site.channels)
    for pair in pairs:
        layers = [step.layer if step else None for step in pair]
        columns.append(column_of(pair, layers, widths))
        main, carry = (step.channels if step else n for step, n in zip(pair, widths, strict=True))
        widths = (main, carry)
    if not isinstance(columns[0], Linear):
        start = AffineConv.identity(site.channels, site.dims)
        columns.insert(0, Linear(start, start))
    if not isinstance(columns[-1], Linear) or columns[-1].taps:
        ends = [AffineConv.identity(width, site.dims) for width in widths]
        columns.append(Linear(ends[0], ends[1]))
    return plan_of(columns, target, "the branches side by side")


def _unaligned(site: Site, f: Chain, g: Chain, waits: Waits) -> Refusal:
    """Why two chains cannot stand side by side."""
    if _align(f, g, ([0] * len(f), [0] * len(g))) is None:
        cause = "the two branches change size or stride at places that do not correspond"
        return Refusal(cause, (site.join.name,))
    late = next(step.layer for step, n in zip(f + g, (*waits[0], *waits[1]), strict=True) if n)
    names = [other.name for other in late.others] if isinstance(late, Lateral) else []
    cause = "one branch reads this of the other one, which has changed its size by then"
    return Refusal(cause, (*names, site.join.name))


def may_reorder(steps: Sequence[Step]) -> bool:
    """Whether what others read of a branch may come to stand behind them.

    It does so where its column has to wait for what the other branch is combined with.
    """
    return any(isinstance(s.layer, Lateral) for s in steps) and any(s.tapped for s in steps)


def _waits(fork: fx.Node, chain: Chain, beside: Chain) -> list[int]:
    """For each step of a chain how many steps of the other one must stand before it.

    It may combine the value with what was computed from the other chain.
    """
    tapped = [i for i, step in enumerate(beside) if step.tapped]
    found = []
    for step in chain:
        needed: set[fx.Node] = set()
        if tapped and isinstance(step.layer, Lateral):
            needed = _ancestors(step.layer.others, fork)
        found.append(max((i + 1 for i in tapped if beside[i].value in needed), default=0))
    return found


def _ancestors(nodes: Sequence[fx.Node], start: fx.Node) -> set[fx.Node]:
    """Some nodes and all that they depend on behind `start`."""
    found, waiting = set(nodes), list(nodes)
    while waiting:
        fresh = [n for n in waiting.pop().all_input_nodes if n not in found and start < n]
        found.update(fresh)
        waiting += fresh
    return found


def _without_norm(step: Step) -> Step:
    return replace(step, layer=step.affine) if isinstance(step.layer, Norm) else step


def _align(f: Chain, g: Chain, waits: Waits) -> list[Pair] | None:
    """The alignment with the fewest columns, None if there is none (edit distance).

    Args:
        waits: how many steps of g must stand before each of f, and the other way round.
    """
    best: dict[tuple[int, int], tuple[float, list[Pair]]] = {(0, 0): (0.0, [])}
    for i, j in itertools.product(range(len(f) + 1), range(len(g) + 1)):
        if (i, j) not in best:
            continue
        cost, pairs = best[i, j]
        for step_f, step_g in ((1, 1), (1, 0), (0, 1)):
            to = (i + step_f, j + step_g)
            if to[0] > len(f) or to[1] > len(g):
                continue
            if (step_f and waits[0][i] > j) or (step_g and waits[1][j] > i):
                continue
            pair = (f[i] if step_f else None, g[j] if step_g else None)
            price = price_of(pair)
            if price is not None and (to not in best or cost + price < best[to][0]):
                best[to] = (cost + price, [*pairs, pair])
    found = best.get((len(f), len(g)))
    return found[1] if found else None
