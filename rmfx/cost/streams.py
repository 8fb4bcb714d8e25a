"""What a skip costs where values pass as a stream: the line of values that waits for its branch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import fx

from rmfx.algebra.affine import AffineConv
from rmfx.errors import Refusal
from rmfx.ir.elements import MaxPool
from rmfx.ir.joins import adds_itself, read_join
from rmfx.ir.laterals import Lateral
from rmfx.ir.net import Net
from rmfx.ir.notes import shape_of
from rmfx.removal.site import Chain, Site, find_sites


@dataclass(frozen=True)
class Skip:
    """An addition of two tensors, for hardware that streams.

    Attributes:
        join: name of the add in `rmfx.trace(model, example_inputs)`.
        fifo: values that wait for the other operand; None where that is not known.
    """

    join: str
    fifo: int | None


def skips(net: Net) -> Iterator[Skip]:
    """Every addition of two tensors, with the depth of its FIFO."""
    for node in net.graph.nodes:
        if read_join(node) is not None or adds_itself(net.source, node):
            yield Skip(node.name, _fifo(net, node))


def _fifo(net: Net, join: fx.Node) -> int | None:
    sites, shape = find_sites(net, join, keep_norms=False), shape_of(join)
    if sites is None or isinstance(sites, Refusal) or shape is None or None in shape:
        return None
    delays = [_delay(branch, sites[0]) for branch in sites[0].branches]
    size = shape[2:] if sites[0].dims else ()
    places = [_places(delay, size) for delay in delays]
    channels = shape[1] if sites[0].dims else shape[-1]
    return abs(places[0] - places[1]) * int(channels)


def _delay(branch: Chain, site: Site) -> tuple[list[float], list[int]] | None:
    """How far ahead of its first output a branch reads, and its stride; None for all of space."""
    ahead, stride = [0.0] * site.dims, [1] * site.dims
    for step in branch:
        layer, moves = step.layer, step.layer.geometry(1)
        if isinstance(layer, Lateral) and _resizes(layer):
            return None
        if isinstance(layer, MaxPool):
            kernel, strides, padding, dilation, _ = layer.signature
            reach = [d * (k - 1) - p for k, p, d in zip(kernel, padding, dilation, strict=True)]  # type: ignore[call-overload]
        elif isinstance(moves, AffineConv):
            spans = zip(moves.span, moves.padding, strict=True)
            reach, strides = [span - left for span, (left, _) in spans], moves.stride
        else:
            continue
        ahead = [a + s * r for a, s, r in zip(ahead, stride, reach, strict=True)]
        stride = [s * t for s, t in zip(stride, strides, strict=True)]  # type: ignore[call-overload]
    return ahead, stride


def _resizes(layer: Lateral) -> bool:
    """Whether a value is combined with one of another size: one that was pooled over all of it."""
    shapes = [shape_of(n) for n in (layer.value, *layer.others)]
    return any(s is not None and shapes[0] is not None and s[2:] != shapes[0][2:] for s in shapes)


def _places(delay: tuple[list[float], list[int]] | None, size: Sequence[int]) -> int:
    """Pixels of the join that pass before a branch gives its first."""
    if delay is None:
        return math.prod(size)
    total = 0
    for i, (ahead, stride) in enumerate(zip(*delay, strict=True)):
        total += math.ceil(max(ahead, 0) / stride) * math.prod(size[i + 1 :])
    return min(total, math.prod(size))
