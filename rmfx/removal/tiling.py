"""Dense layers of a branch taken apart, so that a carry beside them costs fewer multiply-adds.

A carry of C channels beside a dense layer costs C weights for each tap and each channel that the
layer reads or gives. Exactly the same is computed by a layer of less per channel, between layers
that copy each channel or sum a few, which have one group for each channel:

    taps    f = Σ ∘ core, where the core gives a channel for each output and tap and Σ adds them,
            each shifted to its place; or f = core ∘ copies, where each channel is read at every
            tap. The bias stands behind all, so that zeros at a border stay zeros.
    tiles   f = Σ ∘ core ∘ copies, where the core has a group for each part of the inputs and part
            of the outputs: copies give each part of the inputs to all parts of the outputs, Σ adds
            what those give. Between them channels change their order.

Values get wider, and a layer becomes three. So this is done only where multiply-adds are all that
counts, where it saves some beside the carry at hand, and for one layer after the other.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from rmfx.algebra.affine import AffineConv
from rmfx.algebra.layer import Layer

from .order import Order
from .recording import unrecorded
from .site import Chain, Step

MOST_PARTS = 8  # of inputs or outputs: values get as many times as wide


@dataclass(frozen=True, eq=False)
class Parts:
    """A layer taken apart: what stands before its core, and behind it."""

    before: Sequence[Layer]
    core: AffineConv
    behind: Sequence[Layer]


Way = Callable[[AffineConv], Parts]


def taken_apart(chain: Chain, price: Callable[[Chain], float]) -> Chain:
    """The chain with each dense layer in the form that makes the whole cheapest, taps first.

    Args:
        price: of a chain beside its carry; asked of chains without weights.
    """
    for ways_of in (_by_taps, _by_tiles):
        empty = hollow(chain)
        with unrecorded():  # these numbers are none of the weights'
            chosen = _cheapest(empty, ways_of, price)
        chain = _apart(chain, chosen)
    return chain


def _cheapest(
    chain: Chain, ways_of: Callable[..., Iterator[Way]], price: Callable[[Chain], float]
) -> list[Way | None]:
    """The way to take each layer apart, None where it stays, found layer by layer."""
    chosen: list[Way | None] = [None] * len(chain)
    least = price(chain)
    for i, step in enumerate(chain):
        for way in ways_of(step.layer, (i == 0, i == len(chain) - 1)):
            ways = [*chosen[:i], way, *chosen[i + 1 :]]
            found = price(_apart(chain, ways))
            if found < least:
                least, chosen = found, ways
    return chosen


def in_any_order(chain: Chain) -> Chain:
    """The chain with a place behind each linear layer where channels may change their order."""
    steps: list[Step] = []
    for step, behind in zip(chain, [*chain[1:], None], strict=True):
        steps.append(step)
        ordered = behind is None or isinstance(behind.layer, Order)
        if isinstance(step.layer, AffineConv) and step.layer.dims and not ordered:
            steps.append(Step(Order(), (), None, step.channels))
    return tuple(steps)


def _apart(chain: Sequence[Step], ways: Sequence[Way | None]) -> Chain:
    """The chain with some layers taken apart."""
    steps: list[Step] = []
    for step, way in zip(chain, ways, strict=True):
        steps += [step] if way is None else _steps_of(step, way(step.affine))
    return tuple(steps)


def _steps_of(step: Step, parts: Parts) -> list[Step]:
    """The parts of a layer as steps: the core takes its place, the last one holds its value."""
    path = _path_of(step)
    roles = [
        *((layer, "copies") for layer in parts.before),
        (parts.core, ""),
        *((layer, "sum") for layer in parts.behind),
    ]
    made, channels = list[Step](), step.affine.in_channels
    for layer, role in roles:
        channels = layer.channels_behind(channels, step.affine.dims)
        nodes = () if role else step.nodes
        made.append(Step(layer, nodes, None, channels, path=f"{path}_{role}" if role else ""))
    last = replace(made[-1], value=step.value, tapped=step.tapped, pooled=step.pooled)
    return [*made[:-1], last]


def _path_of(step: Step) -> str:
    """Of the module that a step stands for."""
    modules = [str(node.target) for node in step.nodes if node.op == "call_module"]
    return modules[0] if modules else "layer"


def hollow(chain: Chain) -> Chain:
    """The chain with numbers without memory, for whoever asks for shapes only."""
    return tuple(map(_hollow, chain))


def _hollow(step: Step) -> Step:
    layer = step.layer
    if not isinstance(layer, AffineConv):
        return step
    number = torch.zeros((), dtype=layer.weight.dtype, device=layer.weight.device)
    weight = number.expand(tuple(layer.weight.shape))
    bias = (number + float(layer.has_bias)).expand(layer.out_channels)
    return replace(step, layer=replace(layer, weight=weight, bias=bias))


# ---- taps ---------------------------------------------------------------------------------------
def _by_taps(layer: Layer, ends: tuple[bool, bool]) -> Iterator[Way]:
    """Ways to move taps out of a dense layer: along one axis, along all, or some to each side."""
    if not isinstance(layer, AffineConv) or layer.groups > 1:
        return
    axes = [axis for axis, taps in enumerate(layer.kernel) if taps > 1]
    sets = dict.fromkeys((tuple(axes[-1:]), tuple(axes))) if axes else ()
    for chosen in sets:
        yield partial(_taps_apart, before=(), behind=chosen)
        yield partial(_taps_apart, before=chosen, behind=())
    if len(axes) > 1:
        yield partial(_taps_apart, before=axes[-1:], behind=axes[:-1])


def _taps_apart(layer: AffineConv, before: Collection[int], behind: Collection[int]) -> Parts:
    """A dense layer with the taps along some axes in copies or in a sum."""
    dims, (n_out, n_in) = layer.dims, layer.weight.shape[:2]
    rest = [axis for axis in range(dims) if axis not in (*before, *behind)]
    order = [0, *(a + 2 for a in behind), 1, *(a + 2 for a in before), *(a + 2 for a in rest)]
    ins, outs = (math.prod(layer.kernel[a] for a in axes) for axes in (before, behind))
    kernel = [layer.kernel[a] if a in rest else 1 for a in range(dims)]
    weight = layer.weight.permute(order).reshape(n_out * outs, n_in * ins, *kernel)
    core = replace(_along(layer, rest), weight=weight, bias=layer.bias)
    copies = [_one_tap_each(layer, n_in, before)] if before else []
    if not behind:
        return Parts(copies, core, [])
    sums = _one_tap_each(layer, n_out, behind)
    weight = sums.weight.reshape(n_out, outs, *sums.kernel)
    core = replace(core, bias=layer.bias.new_zeros(n_out * outs))
    return Parts(copies, core, [replace(sums, weight=weight, bias=layer.bias)])


def _along(layer: AffineConv, axes: Collection[int]) -> AffineConv:
    """Where a layer reads along some axes, and one position along the others."""
    window = zip(layer.stride, layer.padding, layer.dilation, strict=True)
    places = [w if axis in axes else (1, (0, 0), 1) for axis, w in enumerate(window)]
    stride, padding, dilation = (tuple(part) for part in zip(*places, strict=True))
    return replace(layer, stride=stride, padding=padding, dilation=dilation)


def _one_tap_each(layer: AffineConv, channels: int, axes: Collection[int]) -> AffineConv:
    """Each channel at every tap of some axes."""
    kernel = [taps if axis in axes else 1 for axis, taps in enumerate(layer.kernel)]
    count = math.prod(kernel)
    one_hot = torch.eye(count, dtype=torch.bfloat16, device=layer.weight.device)
    weight = one_hot.reshape(count, 1, *kernel).repeat(channels, *[1] * (layer.dims + 1))
    bias = layer.bias.new_zeros(len(weight))
    return replace(_along(layer, axes), weight=weight, bias=bias, groups=channels)


# ---- tiles --------------------------------------------------------------------------------------
def _by_tiles(layer: Layer, ends: tuple[bool, bool]) -> Iterator[Way]:
    """Ways to cut a dense layer into tiles: by inputs in front, by outputs at the end."""
    if not isinstance(layer, AffineConv) or layer.groups > 1 or not layer.dims or all(ends):
        return
    n_out, n_in = layer.weight.shape[:2]
    counts = list(range(2, MOST_PARTS + 1))
    parts: Iterator[tuple[int, int]]
    if ends[0]:
        parts = ((n, 1) for n in counts)
    elif ends[1]:
        parts = ((1, n) for n in counts)
    else:  # square tiles, beside which a carry is more such groups
        parts = (
            (a, b) for a, b in itertools.product([1, *counts], repeat=2) if n_in * b == n_out * a
        )
    for ins, outs in parts:
        if ins * outs > 1 and n_in % ins == 0 == n_out % outs:
            yield partial(_tiled, ins=ins, outs=outs)


def _tiled(layer: AffineConv, ins: int, outs: int) -> Parts:
    """A dense layer as tiles: so many parts of its inputs by so many of its outputs."""
    n_out, n_in = layer.weight.shape[:2]
    tiles = layer.weight.reshape(outs, n_out // outs, ins, n_in // ins, *layer.kernel)
    weight = tiles.transpose(1, 2).reshape(n_out * ins, n_in // ins, *layer.kernel)
    bias = layer.bias if ins == 1 else layer.bias.new_zeros(n_out * ins)
    core = replace(layer, weight=weight, bias=bias, groups=ins * outs)
    before: list[Layer] = []
    if outs > 1:
        copies = AffineConv.pointwise(_ones(layer, n_in * outs, 1), dims=layer.dims, groups=n_in)
        before = [copies, Order.shuffle(n_in * outs, groups=n_in)]
    if ins == 1:
        return Parts(before, core, [])
    ones = _ones(layer, n_out, ins)
    sums = AffineConv.pointwise(ones, layer.bias, dims=layer.dims, groups=n_out)
    order = Order.shuffle(n_out * ins, groups=ins, blocks=outs)
    return Parts(before, core, [order, sums])


def _ones(like: AffineConv, *sizes: int) -> Tensor:
    """Ones in the smallest type, which widens that of no neighbour."""
    return torch.ones(sizes, dtype=torch.bfloat16, device=like.weight.device)
