"""From a site to a plain chain: columns of paired layers, the cheapest arrangement, the build.

Both branches are written side by side, one *column* per layer of the plain chain:
    linear      f_i beside a Dirac tap, the shortcut's map, or the other branch's layer:
                the first column is a `stack` (Δ merged in), the last a `join` (∇ merged in),
                those between are direct sums, a single column is a `plus`
    activation  acts on one block of channels, or on both
    norm        a batch norm on the main block, an identity batch norm on the carry
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch import fx

from ._activation import Activation, Block, Blockwise
from ._affine import (
    AffineConv,
    common_block,
    direct_sum,
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
from ._site import Chain, Norm, Site, Step

POINTWISE = (Activation, Blockwise)


@dataclass(frozen=True, eq=False)
class Linear:
    """A linear column; `steps` are the layers of the site that it stands for."""

    main: AffineConv
    carry: AffineConv
    steps: tuple[Step, ...] = ()


@dataclass(frozen=True, eq=False)
class Pointwise:
    """An activation column; None leaves a block unchanged.

    `carried` is the node whose value the carry holds here, None if it is not a node's value.
    """

    main: Activation | Blockwise | None
    carry: Activation | Blockwise | None
    widths: tuple[int, int]
    steps: tuple[Step, ...] = ()
    carried: fx.Node | None = None

    @property
    def blocks(self) -> tuple[Block, ...]:
        return _blocks(self.widths[0], self.main) + _blocks(self.widths[1], self.carry)


def _blocks(width: int, layer: Activation | Blockwise | None) -> tuple[Block, ...]:
    return layer.blocks if isinstance(layer, Blockwise) else (Block(width, layer),)


@dataclass(frozen=True, eq=False)
class Normalised:
    """A batch norm on the main block, the identity on the carry."""

    main: Norm
    carried: int
    steps: tuple[Step, ...] = ()


Column = Linear | Pointwise | Normalised


@dataclass(frozen=True, eq=False)
class Plan:
    """An arrangement of a site, with its cost in multiply-adds per position of the fork."""

    columns: tuple[Column, ...]
    work: float


def plans(site: Site) -> list[Plan] | Refusal:
    """Every exact arrangement that was found, cheapest first."""
    f, g = site.branches
    options: list[Plan] = []
    refusals: list[Refusal] = []
    for main, shortcut in ((f, g), (g, f)):
        if not _is_linear(shortcut):
            continue
        found = _beside(site, main, shortcut)
        if isinstance(found, Refusal):
            refusals.append(found)
        else:
            options += found
    if not options:
        aligned = _aligned(site, f, g)
        if isinstance(aligned, Refusal):
            refusals.append(aligned)
        else:
            options.append(aligned)
    if not options:
        return refusals[0]
    return sorted(options, key=lambda plan: (plan.work, len(plan.columns)))


def _is_linear(chain: Chain) -> bool:
    return not any(isinstance(step.layer, POINTWISE) for step in chain)


# ---- a linear shortcut beside a chain -----------------------------------------------------------


def _beside(site: Site, main: Chain, shortcut: Chain) -> list[Plan] | Refusal:
    """A shortcut that is one linear map, at each place where it fits beside the main branch."""
    layers = [_affine(step) for step in shortcut]
    single = compose_chain(layers or [AffineConv.identity(site.channels, site.dims)])
    if isinstance(single, Refusal):
        return single.at(*(n.name for step in shortcut for n in step.nodes))
    main = _framed(site, main)
    linear = [step.layer for step in main if isinstance(step.layer, AffineConv)]
    shape = site.fork.meta.get("shape")
    if shape is not None and None not in shape:
        single = fitted(linear, single, shape[2:] if site.dims else ())
    places = placements(linear, single)
    if isinstance(places, Refusal):
        return places.at(site.join.name)
    value = shortcut[-1].value if shortcut else site.fork
    found: list[Plan] = []
    for j, beside in places:
        found += _widths(_columns(main, beside, j, (site.fork, value), shortcut))
    # Carrying the fork itself, as far as it goes, is best among equals: its sign may be known.
    found.reverse()
    return found or Refusal("the shortcut fits beside no layer of the branch", (site.join.name,))


def _columns(
    main: Chain,
    beside: Sequence[AffineConv],
    j: int,
    values: tuple[fx.Node, fx.Node | None],
    shortcut: Chain,
) -> list[Column]:
    columns: list[Column] = []
    position = 0
    for step in main:
        layer = step.layer
        if isinstance(layer, AffineConv):
            steps = (step, *shortcut) if position == j else (step,)
            columns.append(Linear(layer, beside[position], steps))
            position += 1
        elif isinstance(layer, POINTWISE):
            # What is carried: the fork before the shortcut's map, its value behind it.
            carried = values[0] if position <= j else values[1]
            widths = (_width(columns, "main"), _width(columns, "carry"))
            columns.append(Pointwise(layer, None, widths, (step,), carried))
        else:
            columns.append(Normalised(layer, _width(columns, "carry"), (step,)))
    return columns


def _width(columns: Sequence[Column], block: str) -> int:
    """Channels of a block behind the last linear column."""
    last = next(c for c in reversed(columns) if isinstance(c, Linear))
    return int(getattr(last, block).out_channels)


def _framed(site: Site, chain: Chain) -> Chain:
    """The chain with a linear layer at both ends; batch norm stays only between them."""
    steps = list(chain)
    if steps and isinstance(steps[-1].layer, Norm):
        steps[-1] = replace(steps[-1], layer=steps[-1].layer.affine)
        if len(steps) > 1 and isinstance(steps[-2].layer, AffineConv):
            merged = compose_chain([steps[-2].layer, _affine(steps[-1])])
            if isinstance(merged, AffineConv):
                nodes = steps[-2].nodes + steps[-1].nodes
                steps[-2:] = [Step(merged, nodes, steps[-1].value)]
    if not steps or not isinstance(steps[0].layer, AffineConv):
        steps.insert(0, _identity_step(site.channels, site.dims))
    if not isinstance(steps[-1].layer, AffineConv):
        channels = next(
            _affine(s).out_channels for s in reversed(steps) if not isinstance(s.layer, POINTWISE)
        )
        steps.append(_identity_step(channels, site.dims))
    return tuple(steps)


def _identity_step(channels: int, dims: int) -> Step:
    return Step(AffineConv.identity(channels, dims), (), None)


def _affine(step: Step) -> AffineConv:
    layer = step.layer.affine if isinstance(step.layer, Norm) else step.layer
    if isinstance(layer, POINTWISE):
        raise TypeError("an activation is not linear")
    return layer


# ---- two non-linear branches --------------------------------------------------------------------

Pair = tuple[Step | None, Step | None]


def _aligned(site: Site, f: Chain, g: Chain) -> Plan | Refusal:
    """Two chains side by side: a shortest alignment of their layers."""
    f, g = (tuple(replace(s, layer=_without_norm(s)) for s in chain) for chain in (f, g))
    pairs = _align(f, g)
    if pairs is None:
        return Refusal(
            "the two branches change size or stride at places that do not correspond",
            (site.join.name,),
        )
    columns: list[Column] = []
    widths = [site.channels, site.channels]
    for a, b in pairs:
        steps = tuple(s for s in (a, b) if s is not None)
        layers = [s.layer if s is not None else None for s in (a, b)]
        if any(isinstance(layer, AffineConv) for layer in layers):
            own = [
                layer if isinstance(layer, AffineConv) else AffineConv.identity(width, site.dims)
                for layer, width in zip(layers, widths, strict=True)
            ]
            widths = [layer.out_channels for layer in own]
            columns.append(Linear(own[0], own[1], steps))
        else:
            acts = [layer if isinstance(layer, POINTWISE) else None for layer in layers]
            columns.append(Pointwise(acts[0], acts[1], (widths[0], widths[1]), steps))
    if not isinstance(columns[0], Linear):
        start = AffineConv.identity(site.channels, site.dims)
        columns.insert(0, Linear(start, start))
    if not isinstance(columns[-1], Linear):
        ends = [AffineConv.identity(width, site.dims) for width in widths]
        columns.append(Linear(ends[0], ends[1]))
    work = work_of(columns)
    return work if isinstance(work, Refusal) else Plan(tuple(columns), work)


def _without_norm(step: Step) -> AffineConv | Activation | Blockwise:
    return step.layer if isinstance(step.layer, POINTWISE) else _affine(step)


def _align(f: Chain, g: Chain) -> list[Pair] | None:
    """The alignment with the fewest columns, None if there is none (edit distance)."""
    best: dict[tuple[int, int], tuple[float, list[Pair]]] = {(0, 0): (0.0, [])}
    for i, j in itertools.product(range(len(f) + 1), range(len(g) + 1)):
        if (i, j) not in best:
            continue
        cost, pairs = best[i, j]
        for step_f, step_g in ((1, 1), (1, 0), (0, 1)):
            to = (i + step_f, j + step_g)
            if to[0] > len(f) or to[1] > len(g):
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
        if isinstance(alone, POINTWISE):
            return 1.2
        return 1.0 if isinstance(alone, AffineConv) and alone.preserves_size else None
    if len(layers) != 2:
        return None
    first, second = layers
    if isinstance(first, POINTWISE) and isinstance(second, POINTWISE):
        return 1.0 if first.signature == second.signature else 1.1
    if isinstance(first, AffineConv) and isinstance(second, AffineConv):
        return None if isinstance(window_of([first, second]), Refusal) else 1.0
    return None


# ---- cost and width of the carry ----------------------------------------------------------------


def _widths(columns: list[Column]) -> Iterator[Plan]:
    """The arrangement with its carry as it is, and padded to each group width that occurs."""
    linear = [c for c in columns if isinstance(c, Linear)]
    groups = {1} | {c.main.block[0] for c in linear[1:-1] if c.main.block[0] == c.main.block[1]}
    for width in sorted(groups):
        padded = _padded(columns, width)
        work = work_of(padded)
        if not isinstance(work, Refusal):
            yield Plan(tuple(padded), work)


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
            result.append(replace(column, widths=(column.widths[0], _width(result, "carry"))))
        else:
            result.append(replace(column, carried=_width(result, "carry")))
    return result


def _up(n: int, width: int) -> int:
    return -(-n // width) * width


def work_of(columns: Sequence[Column]) -> float | Refusal:
    """Multiply-adds per position of the fork, without building any weight."""
    linear = [c for c in columns if isinstance(c, Linear)]
    total = 0.0
    for i, (column, area) in enumerate(
        zip(linear, area_after([c.main for c in linear]), strict=True)
    ):
        size = _size(column, first=i == 0, last=i == len(linear) - 1)
        if isinstance(size, Refusal):
            return size
        total += size * area
    return total


def _size(column: Linear, *, first: bool, last: bool) -> int | Refusal:
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
        return sum(outs) * ins[0] * taps
    if last:
        return outs[0] * sum(ins) * taps
    block = common_block([f.block for f in pair])
    grouped = block and all(f.groups % (block[0] // f.block[0]) == 0 for f in pair)
    return sum(outs) * (block[0] if block and grouped else sum(ins)) * taps


def build(columns: Sequence[Column]) -> list[AffineConv | Pointwise | Normalised] | Refusal:
    """The layers of the plain chain."""
    last = max(i for i, c in enumerate(columns) if isinstance(c, Linear))
    layers: list[AffineConv | Pointwise | Normalised] = []
    for i, column in enumerate(columns):
        if not isinstance(column, Linear):
            layers.append(column)
            continue
        law = plus if i == 0 == last else stack if i == 0 else join if i == last else direct_sum
        layer = law(column.main, column.carry)
        if isinstance(layer, Refusal):
            return layer
        layers.append(layer)
    return layers
