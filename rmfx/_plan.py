"""From a site to a plain chain: columns of paired layers, the cheapest arrangement, the build.

Both branches are written side by side, one *column* per layer of the plain chain:
    linear      f_i beside a Dirac tap, the shortcut's map, or the other branch's layer:
                the first column is a `stack` (Δ merged in), the last a `join` (∇ merged in),
                those between are direct sums, a single column is a `plus`
    activation  acts on one block of channels, or on both
    norm        a batch norm on the main block, an identity batch norm on the carry
    lateral     a product, a sum or a concatenation with other tensors, on one block: the other
                block meets ones, zeros or nothing
    shared      padding with other values than zeros, or a max pool, which both blocks get
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from ._activation import Activation, Block, Blockwise
from ._affine import (
    AffineConv,
    common_block,
    direct_sum,
    in_turn,
    join,
    plus,
    stack,
    window_of,
)
from ._affine import (
    chain as compose_chain,
)
from ._carry import area_after, fitted, placements
from ._errors import Refusal
from ._graph import between
from ._layers import CHANNEL_BY_CHANNEL, Border, Lateral, MaxPool
from ._site import Chain, Norm, Site, Step

POINTWISE = (Activation, Blockwise)
NON_LINEAR = (*POINTWISE, Lateral, *CHANNEL_BY_CHANNEL)


Tap = tuple[fx.Node, int]


@dataclass(frozen=True, eq=False, kw_only=True)
class _Column:
    """What all columns have.

    Attributes:
        steps: the layers of the site that it stands for.
        taps: nodes whose value it holds and others read, each with its block (0 or 1).
    """

    steps: tuple[Step, ...] = ()
    taps: tuple[Tap, ...] = ()


@dataclass(frozen=True, eq=False)
class Linear(_Column):
    """A linear column."""

    main: AffineConv
    carry: AffineConv


@dataclass(frozen=True, eq=False)
class Pointwise(_Column):
    """An activation column; None leaves a block unchanged.

    `carried` is the node whose value the carry holds here, None if it is not a node's value. In so
    many `runs` the blocks take turns.
    """

    main: Activation | Blockwise | None
    carry: Activation | Blockwise | None
    widths: tuple[int, int]
    carried: fx.Node | None = None
    runs: int = 1

    @property
    def blocks(self) -> tuple[Block, ...]:
        main, carry = (width // self.runs for width in self.widths)
        return (_blocks(main, self.main) + _blocks(carry, self.carry)) * self.runs

    @property
    def may_take_turns(self) -> bool:
        """Whether the same function applies to all channels of a block."""
        layers = [layer for layer in (self.main, self.carry) if layer is not None]
        return not any(isinstance(f, Blockwise) or f.is_per_channel for f in layers)


def _blocks(width: int, layer: Activation | Blockwise | None) -> tuple[Block, ...]:
    return layer.blocks if isinstance(layer, Blockwise) else (Block(width, layer),)


@dataclass(frozen=True, eq=False)
class Normalised(_Column):
    """A batch norm on the main block, the identity on the carry; `runs` as in `Pointwise`."""

    main: Norm
    carried: int
    runs: int = 1


@dataclass(frozen=True, eq=False)
class Sided(_Column):
    """A combination with other tensors, of the main block (0) or of the carry (1)."""

    lateral: Lateral
    block: int


@dataclass(frozen=True, eq=False)
class Shared(_Column):
    """A padding or a max pool, of both blocks alike."""

    layer: Border | MaxPool


Column = Linear | Pointwise | Normalised | Sided | Shared
Layer = AffineConv | Pointwise | Normalised | Sided | Shared


@dataclass(frozen=True, eq=False)
class Plan:
    """An arrangement of a site.

    Attributes:
        columns: the layers of the plain chain.
        work: its multiply-adds per position of the fork.
        kept: nodes of the shortcut that stay, because others read what they give.
        layout: what sets it apart from the others.
    """

    columns: tuple[Column, ...]
    work: float
    kept: frozenset[fx.Node] = frozenset()
    layout: str = ""


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
        aligned = _aligned(site, f, g)
        if isinstance(aligned, Refusal):
            refusals.append(aligned)
        else:
            options.append(aligned)
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
    layer = compose_chain([_affine(step) for step in branch] or [identity])
    nodes = (n.name for step in branch for n in step.nodes)
    return layer.at(*nodes) if isinstance(layer, Refusal) else layer


def _fitted(site: Site, linear: Sequence[AffineConv], shortcut: AffineConv) -> AffineConv:
    """The shortcut with the branch's output size, where the two agree for the example."""
    shape = site.fork.meta.get("shape")
    if shape is None or None in shape:
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
        origin: dict[str, Any] = {"steps": (step,), "taps": _taps(step, 0)}
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


def _taps(step: Step, block: int) -> tuple[Tap, ...]:
    return ((step.value, block),) if step.tapped and step.value is not None else ()


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
            merged = compose_chain([before.layer, _affine(steps[-1])])
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


def _affine(step: Step) -> AffineConv:
    layer = step.layer.affine if isinstance(step.layer, Norm) else step.layer
    if not isinstance(layer, AffineConv):
        raise TypeError("only linear layers have a linear form")
    return layer


# ---- two non-linear branches --------------------------------------------------------------------

Pair = tuple[Step | None, Step | None]
Waits = tuple[Sequence[int], Sequence[int]]


def _aligned(site: Site, f: Chain, g: Chain) -> Plan | Refusal:
    """Two chains side by side: a shortest alignment of their layers."""
    f, g = (tuple(replace(s, layer=_without_norm(s)) for s in chain) for chain in (f, g))
    if may_reorder(f + g):
        written = next((n for n in between(site.fork, site.join) if n.meta.get("frozen")), None)
        if written is not None:
            return Refusal(written.meta["frozen"], (written.name,))
    waits = (_waits(site.fork, f, g), _waits(site.fork, g, f))
    pairs = _align(f, g, waits)
    if pairs is None:
        return _unaligned(site, f, g, waits)
    columns: list[Column] = []
    widths = [site.channels, site.channels]
    for pair in pairs:
        columns.append(_paired(pair, widths, site.dims))
        widths = [step.channels if step else n for step, n in zip(pair, widths, strict=True)]
    if not isinstance(columns[0], Linear):
        start = AffineConv.identity(site.channels, site.dims)
        columns.insert(0, Linear(start, start))
    if not isinstance(columns[-1], Linear) or columns[-1].taps:
        ends = [AffineConv.identity(width, site.dims) for width in widths]
        columns.append(Linear(ends[0], ends[1]))
    work = work_of(columns)
    if isinstance(work, Refusal):
        return work
    return Plan(tuple(columns), work, layout="the branches side by side")


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


def _paired(pair: Pair, widths: Sequence[int], dims: int) -> Column:
    """The column of two layers that stand side by side; None leaves its block as it is."""
    origin: dict[str, Any] = {
        "steps": tuple(step for step in pair if step is not None),
        "taps": tuple(tap for i, step in enumerate(pair) if step for tap in _taps(step, i)),
    }
    layers = [step.layer if step is not None else None for step in pair]
    for block, layer in enumerate(layers):
        if isinstance(layer, Lateral):
            return Sided(layer, block, **origin)
        if isinstance(layer, CHANNEL_BY_CHANNEL):
            return Shared(layer, **origin)
    if not any(isinstance(layer, AffineConv) for layer in layers):
        acts = [layer if isinstance(layer, POINTWISE) else None for layer in layers]
        return Pointwise(acts[0], acts[1], (widths[0], widths[1]), **origin)
    main, carry = (
        layer if isinstance(layer, AffineConv) else AffineConv.identity(width, dims)
        for layer, width in zip(layers, widths, strict=True)
    )
    return Linear(main, carry, **origin)


def _without_norm(step: Step) -> AffineConv | Activation | Blockwise | Lateral | Border | MaxPool:
    return _affine(step) if isinstance(step.layer, Norm) else step.layer


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
            price = _price(*pair)
            if price is not None and (to not in best or cost + price < best[to][0]):
                best[to] = (cost + price, [*pairs, pair])
    found = best.get((len(f), len(g)))
    return found[1] if found else None


def _price(a: Step | None, b: Step | None) -> float | None:
    """Cost of a column, None where it would not be exact."""
    layers = [s.layer for s in (a, b) if s is not None]
    if len(layers) == 1:
        alone = layers[0]
        if isinstance(alone, (*POINTWISE, Lateral)):
            return 1.2
        return 1.0 if isinstance(alone, AffineConv) and alone.preserves_size else None
    if len(layers) != 2:
        return None
    first, second = layers
    if isinstance(first, POINTWISE) and isinstance(second, POINTWISE):
        return 1.0 if first.signature == second.signature else 1.1
    if isinstance(first, AffineConv) and isinstance(second, AffineConv):
        return None if isinstance(window_of([first, second]), Refusal) else 1.0
    if isinstance(first, CHANNEL_BY_CHANNEL) and isinstance(second, CHANNEL_BY_CHANNEL):
        return 1.0 if first.signature == second.signature else None
    return None


# ---- cost and width of the carry ----------------------------------------------------------------


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
    fits = {_groups_of(c) is not None for c in inner}
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


def work_of(columns: Sequence[Column]) -> float | Refusal:
    """Multiply-adds per position of the fork, without building any weight."""
    sizes = sizes_of(columns)
    if isinstance(sizes, Refusal):
        return sizes
    areas = area_after([c.main for c in columns if isinstance(c, Linear)])
    return float(sum(size * area for size, area in zip(sizes, areas, strict=True)))


def sizes_of(columns: Sequence[Column]) -> list[int] | Refusal:
    """Weights of each linear column once it is built."""
    linear = [c for c in columns if isinstance(c, Linear)]
    runs, last = runs_of(columns), len(linear) - 1
    sizes: list[int] = []
    for i, column in enumerate(linear):
        size = _size(column, first=i == 0, last=i == last, runs=runs)
        if isinstance(size, Refusal):
            return size
        sizes.append(size)
    return sizes


def _size(column: Linear, *, first: bool, last: bool, runs: int) -> int | Refusal:
    """Weights of a linear column once it is built."""
    pair = (column.main, column.carry)
    window = window_of(pair)
    if isinstance(window, Refusal):
        return window
    taps = math.prod(window[2])
    ins, outs = [f.in_channels for f in pair], [f.out_channels for f in pair]
    if first and last:
        return outs[0] * ins[0] // math.gcd(*(f.groups for f in pair)) * taps
    if first:
        return sum(outs) * ins[0] // runs * taps
    if last:
        return outs[0] * sum(ins) * taps
    return sum(outs) * (_groups_of(column) or sum(ins)) * taps


def _groups_of(column: Linear) -> int | None:
    """Inputs of a group where main block and carry are one grouped layer; None if it is dense."""
    pair = (column.main, column.carry)
    block = common_block([f.block for f in pair])
    fits = block and all(f.groups % (block[0] // f.block[0]) == 0 for f in pair)
    return block[0] if block and fits else None


def runs_of(columns: Sequence[Column]) -> int:
    """In how many runs main block and carry take turns behind the first layer; 1: they do not.

    One below the other, a depthwise layer and a carry are a dense layer. With what each group gives
    put together they are a grouped one. So they stand where whatever comes before the next layer
    acts on each channel alone, and that layer is dense and can read channels in any order.
    """
    linear = [(i, c) for i, c in enumerate(columns) if isinstance(c, Linear)]
    if len(linear) < 2:
        return 1
    (first, start), (second, end) = linear[:2]
    if len(linear) > 2 and _groups_of(end) is not None:
        return 1
    between = columns[first:second]
    if not start.main.dims or any(c.taps or isinstance(c, Sided) for c in between):
        return 1
    if not all(c.may_take_turns for c in between if isinstance(c, Pointwise)):
        return 1
    return math.gcd(start.main.groups, start.carry.groups)


def build(columns: Sequence[Column]) -> list[Layer] | Refusal:
    """The layers of the plain chain."""
    linear = [i for i, c in enumerate(columns) if isinstance(c, Linear)]
    first, last, runs = linear[0], linear[-1], runs_of(columns)
    order: Tensor | None = None  # in which the next linear layer meets what it reads
    layers: list[Layer] = []
    for i, column in enumerate(columns):
        if not isinstance(column, Linear):
            if order is not None and isinstance(column, (Pointwise, Normalised)):
                column = replace(column, runs=runs)
            layers.append(column)
            continue
        pair = (column.main, column.carry)
        if first == last:
            layer = plus(*pair)
        elif i == first:
            layer = stack(*pair, runs=runs)
        else:
            layer = join(*pair) if i == last else direct_sum(*pair)
        if isinstance(layer, Refusal):
            return layer
        layers.append(layer if order is None else layer.reading(order))
        order = None
        if i == first and runs > 1:
            main, carry = (f.out_channels for f in pair)
            order = in_turn([torch.arange(main), main + torch.arange(carry)], runs)
    return layers
