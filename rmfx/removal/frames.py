"""The forms of a branch that a carry may run beside.

A plain chain begins with a linear layer that makes two blocks of one (Δ merged in) and ends with
one that makes one of two (∇ merged in). Where the branch has none there, or one that others read,
an identity is put in. Two more forms compute the same and may be cheaper beside a carry:

    alone    Δ and ∇ are layers of their own beside a grouped one, which they would make dense, or
             one of narrow groups: a depthwise layer beside a carry is a depthwise layer
    copies   h comes t times from the layer that makes it, so that a dense layer of M inputs and
             t·M outputs is t groups of M each, beside which a carry of whole groups fits
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

from rmfx.algebra.activation import Activation
from rmfx.algebra.affine import AffineConv

from .order import Order
from .site import Chain, Norm, Step, merged

MOST_COPIES = 4  # of a value: more would cost more where it is made than they save


def frames(main: Chain, channels: int, dims: int) -> Iterator[Chain]:
    """Every form of a branch, from a fork of some channels."""
    framed = _with_indices(_framed(main, channels, dims))
    may_part = [(False, True)[: 1 + _is_grouped(step)] for step in (framed[0], framed[-1])]
    for start, end in itertools.product(*may_part):
        first = (_identity(channels, dims),) * start
        last = (_identity(framed[-1].channels, dims),) * end
        yield from _copied((*first, *framed, *last))


def _framed(chain: Chain, channels: int, dims: int) -> Chain:
    """The chain with a linear layer at both ends; batch norm stays only between them."""
    steps = list(chain)
    if steps and isinstance(steps[-1].layer, Norm):
        steps[-1] = replace(steps[-1], layer=steps[-1].layer.affine)
        whole = merged(*steps[-2:]) if len(steps) > 1 else None
        steps[-2:] = [whole] if whole else steps[-2:]
    if not steps or not isinstance(steps[0].layer, AffineConv):
        steps.insert(0, _identity(channels, dims))
    # A value that is read elsewhere must be there before ∇ adds to it.
    if not isinstance(steps[-1].layer, AffineConv) or steps[-1].tapped:
        steps.append(_identity(steps[-1].channels, dims))
    return tuple(steps)


def _with_indices(chain: Chain) -> Chain:
    """The chain with an index into channels as what it is, between layers."""
    inner = [replace(step, layer=_index(step) or step.layer) for step in chain[1:-1]]
    return (chain[0], *inner, *chain[1:][-1:])


def _index(step: Step) -> Order | None:
    """Which channels a step takes, where it is an index that does nothing else."""
    layer = step.layer
    if not isinstance(layer, AffineConv) or [node.op for node in step.nodes] != ["call_function"]:
        return None
    moves = not layer.reads_one_position or any(map(any, layer.padding)) or layer.has_bias
    ones = layer.weight == 1
    if moves or not layer.dims or not bool((ones | (layer.weight == 0)).all()):
        return None
    if layer.groups > 1 or not bool((ones.flatten(1).sum(1) == 1).all()):
        return None
    return Order(tuple(ones.flatten(1).int().argmax(1).tolist()))


def _identity(channels: int, dims: int) -> Step:
    return Step(AffineConv.identity(channels, dims), (), None, channels)


def _is_grouped(step: Step) -> bool:
    return isinstance(step.layer, AffineConv) and step.layer.groups > 1 and bool(step.nodes)


def _copied(chain: Chain) -> Iterator[Chain]:
    """The chain as it is, and with copies of every value that they may be made of."""
    yield chain
    steps, start = list(chain), 0
    for i, step in enumerate(chain[:-1]):
        if not isinstance(step.layer, AffineConv):
            continue
        if i > 0:
            steps[start : i + 1] = _with_copies(steps[start], steps[start + 1 : i], step)
        start = i
    if any(new is not old for new, old in zip(steps, chain, strict=True)):
        yield tuple(steps)


def _with_copies(first: Step, between: list[Step], last: Step) -> list[Step]:
    """A dense layer, activations, and a dense layer of t times as many outputs as inputs."""
    unchanged = [first, *between, last]
    layers = (first.layer, last.layer)
    if not all(isinstance(f, AffineConv) and f.groups == 1 and f.dims for f in layers):
        return unchanged
    acts = [step.layer for step in between]
    uniform = all(isinstance(act, Activation) and not act.is_per_channel for act in acts)
    count, rest = divmod(last.channels, first.channels)
    tapped = any(step.tapped for step in unchanged[:-1])
    if not uniform or tapped or rest or not 1 < count <= MOST_COPIES:
        return unchanged
    width, maker = count * first.channels, first.affine
    weight = maker.weight.repeat(count, *[1] * (maker.weight.dim() - 1))
    maker = replace(maker, weight=weight, bias=maker.bias.repeat(count))
    made = [replace(step, channels=width) for step in between]
    reader = replace(last, layer=replace(last.affine, groups=count))
    return [replace(first, layer=maker, channels=width), *made, reader]
