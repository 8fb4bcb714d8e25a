"""How much memory the values of a graph take while it runs, and what a skip costs on a stream.

Values live from the node that makes them to their last reader (linear scan). Views take nothing of
their own; a pointwise operation or an addition writes over an operand that nothing reads later, as
every runtime's planner does. In a plain chain that comes to two buffers.

On hardware that streams rows of pixels from layer to layer nothing is kept but a few rows in each
layer. A skip is different: the values of one operand wait in a FIFO until the other operand's
layers have seen enough rows below to give their first output. A layer gives its output n once it
has read its input at n·s + r, with r = span − padding before; r₁ + s₁·r₂ for two in a row. So the
FIFO of a join holds the difference of the two branches' r, counted in pixels of the join. Pooling
over all of space gives nothing before the last pixel.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import fx, nn

from ._activation import OWN_ACTIVATIONS, is_activation
from ._affine import AffineConv
from ._calls import ADDS, SUBS
from ._channels import adds_itself
from ._errors import Refusal
from ._graph import Net, Shape
from ._layers import CHANNEL_BY_CHANNEL, Lateral, MaxPool, read_join
from ._site import Chain, Norm, Site, find_sites

VIEWS = (nn.Flatten, nn.Unflatten, nn.Identity)


def size_of(node: fx.Node) -> int:
    """Bytes of a node's value, 0 where its shape is unknown or it is no tensor."""
    shape: Shape | None = node.meta.get("shape")
    if shape is None or "dtype" not in node.meta:
        return 0
    numbers = math.prod(n for n in shape if n is not None)
    return numbers * int(node.meta["dtype"][0].itemsize)


def live_bytes(gm: fx.GraphModule) -> dict[fx.Node, int]:
    """For every node of a traced graph the bytes of all values that live while it runs."""
    owners: dict[fx.Node, fx.Node] = {}  # whose memory a node's value stands in
    last: dict[fx.Node, fx.Node] = {}  # the last reader of that memory
    for node in gm.graph.nodes:
        owners[node] = owners[node.all_input_nodes[0]] if _is_view(gm, node) else node
        for read in node.all_input_nodes:
            last[owners[read]] = node
    alive: dict[fx.Node, int] = {}
    found: dict[fx.Node, int] = {}
    for node in gm.graph.nodes:
        dying = [n for n in alive if last.get(n) is node]
        reused = max((n for n in dying if _may_overwrite(gm, node, n)), key=size_of, default=None)
        if owners[node] is node and node.op not in ("get_attr", "output"):
            alive[node] = size_of(node)
        found[node] = sum(alive.values()) - (alive[reused] if reused else 0)
        for dead in dying:
            del alive[dead]
        if node in alive and node not in last:
            del alive[node]
    return found


def _is_view(gm: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return isinstance(gm.get_submodule(str(node.target)), VIEWS)
    return node.target is operator.getitem or node.target in ("view", "detach")


def _may_overwrite(gm: fx.GraphModule, node: fx.Node, operand: fx.Node) -> bool:
    """Whether a node's value can stand where an operand stood that nothing reads later."""
    if operand not in node.all_input_nodes or size_of(node) != size_of(operand):
        return False
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        return is_activation(module) or isinstance(module, OWN_ACTIVATIONS)
    return node.target in (*ADDS, *SUBS)


# ---- streams ------------------------------------------------------------------------------------


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
        if read_join(net, node) is not None or adds_itself(net.source, node):
            yield Skip(node.name, _fifo(net, node))


def _fifo(net: Net, join: fx.Node) -> int | None:
    sites, shape = find_sites(net, join, keep_norms=False), join.meta.get("shape")
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
        layer = step.layer.affine if isinstance(step.layer, Norm) else step.layer
        if isinstance(layer, Lateral) and _resizes(layer):
            return None
        if isinstance(layer, MaxPool):
            kernel, strides, padding, dilation, _ = layer.signature
            reach = [d * (k - 1) - p for k, p, d in zip(kernel, padding, dilation, strict=True)]  # type: ignore[call-overload]
        elif isinstance(layer, CHANNEL_BY_CHANNEL):
            reach, strides = [-before for before, _ in layer.pairs], [1] * site.dims
        elif isinstance(layer, AffineConv):
            spans = zip(layer.span, layer.padding, strict=True)
            reach, strides = [span - left for span, (left, _) in spans], layer.stride
        else:
            continue
        ahead = [a + s * r for a, s, r in zip(ahead, stride, reach, strict=True)]
        stride = [s * t for s, t in zip(stride, strides, strict=True)]  # type: ignore[call-overload]
    return ahead, stride


def _resizes(layer: Lateral) -> bool:
    """Whether a value is combined with one of another size: one that was pooled over all of it."""
    shapes = [n.meta.get("shape") for n in (layer.value, *layer.others)]
    return any(s is not None and shapes[0] is not None and s[2:] != shapes[0][2:] for s in shapes)


def _places(delay: tuple[list[float], list[int]] | None, size: Sequence[int]) -> int:
    """Pixels of the join that pass before a branch gives its first."""
    if delay is None:
        return math.prod(size)
    total = 0
    for i, (ahead, stride) in enumerate(zip(*delay, strict=True)):
        total += math.ceil(max(ahead, 0) / stride) * math.prod(size[i + 1 :])
    return min(total, math.prod(size))
