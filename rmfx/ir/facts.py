"""Number of dimensions and channels of a value, where shapes are not known.

With example inputs the front-end leaves a shape at every node. Without them the layers themselves
tell: a `Conv2d` gives 4 dimensions (inputs are taken as batched) and its output channels, and
channelwise operations hand both on. The answers are kept per node, so a graph is walked once.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from rmfx.algebra.activation import is_activation
from rmfx.algebra.affine import CONVS, AffineConv
from rmfx.algebra.blockwise import Blockwise
from rmfx.errors import Refusal

from .callees import Callees
from .kinds import ADDS, BATCH_NORMS, CHANNELWISE, COMPARISONS, SCALES, SPREADING, SUBS, is_a
from .memo import on_demand, succeed

_SPATIAL = {
    1: (nn.Conv1d, nn.MaxPool1d, nn.AvgPool1d, nn.AdaptiveAvgPool1d),
    2: (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.BatchNorm2d),
    3: (nn.Conv3d, nn.MaxPool3d, nn.AvgPool3d, nn.AdaptiveAvgPool3d, nn.BatchNorm3d),
}


@dataclass(frozen=True)
class Facts:
    """What the layers tell of a value: number of dimensions and channels, None if unknown.

    `last` says that the channels are the last dimension, as behind a Linear layer.
    """

    rank: int | None = None
    channels: int | None = None
    last: bool = False


class Inference:
    """Answers about the nodes of one graph.

    Args:
        callees: what its nodes call.
        is_open: whether a size that was noted of a node's value, by its dimension, is another one
            at other sizes of the inputs.
    """

    def __init__(self, callees: Callees, is_open: Callable[[fx.Node, int], bool]) -> None:
        self._callees = callees
        self._is_open = is_open
        self._known: dict[fx.Node, Facts] = {}

    def succeed(self, node: fx.Node, other: fx.Node) -> None:
        """Take note that a node holds another one's value from now on."""
        succeed(self._known, node, other)

    def resize(self, node: fx.Node, channels: int) -> None:
        """Take note that a node's value has another number of channels from now on."""
        known = self._known.get(node)
        if known is not None and known.channels is not None:
            self._known[node] = replace(known, channels=channels)

    def rank(self, node: fx.Node) -> int | None:
        """Number of dimensions of a node's value, None if unknown."""
        shape = node.meta.get("shape")
        return len(shape) if shape is not None else self._facts(node).rank

    def channels(self, node: fx.Node, dims: int) -> int | None:
        """Channels of a value that layers of `dims` spatial dimensions read, None if unknown.

        What changes with the size of the network's inputs is no number of channels.
        """
        shape = node.meta.get("shape")
        if shape is not None and len(shape) > 1:
            axis = 1 if dims else len(shape) - 1
            found: int | None = shape[axis]
            return None if found is None or self._is_open(node, axis) else found
        facts = self._facts(node)
        same_axis = facts.last == (dims == 0) or facts.rank == 2
        return facts.channels if same_axis else None

    def without_channels(self, node: fx.Node) -> Refusal:
        """Why the channels of a value are not known."""
        if "shape" not in node.meta:
            cause = "the number of channels is unknown; pass example_inputs"
        else:
            cause = (
                f"no layer fixes its channels: in the shape {node.meta['shape']} their number "
                "changes with the size of the inputs; pass torch.export.export(model, "
                "example_inputs), which fixes it"
            )
        return Refusal(cause, (node.name,))

    def _facts(self, node: fx.Node) -> Facts:
        return on_demand(node, self._known, self._deduce)

    def _deduce(self, node: fx.Node) -> Facts:
        inputs = [self._known[n] for n in node.all_input_nodes if n.op != "get_attr"]
        if len(inputs) > 1 and node.target in SPREADING:
            return self._among_constants(node, _sum(inputs))
        if len(inputs) == 1 and node.target in COMPARISONS:
            return inputs[0]
        layer: Any = self._layer(node)
        if len(inputs) == 1 and node.op == "call_function":
            return self._arithmetic(node, inputs[0])
        if is_a(layer, nn.Flatten) and (layer.start_dim, layer.end_dim) == (1, -1):
            return Facts(rank=2)
        before = inputs[0] if len(inputs) == 1 else Facts()
        if self._keeps(layer) or is_a(layer, nn.Linear):
            rank, channels, last = before.rank, before.channels, before.last
        else:
            rank, channels, last = None, None, False
        dims = _dims_of(layer)
        if node.op == "placeholder":
            dims = next((d for d in map(_dims_of, map(self._layer, node.users)) if d), None)
            readers = [r for r in map(self._layer, node.users) if _channels_in(r)]
            channels, last = _channels_in(readers[0] if readers else None), _on_last(readers[:1])
        if isinstance(layer, AffineConv) and not layer.dims:
            rank = before.rank
        out = _channels_out(layer)
        if out is not None:
            channels, last = out, _on_last([layer]) or (last and type(layer) in BATCH_NORMS)
        return Facts(dims + 2 if dims else rank, channels, last)

    def _arithmetic(self, node: fx.Node, before: Facts) -> Facts:
        """Facts behind a scale, a shift, a padding or a slice, which keep the dimensions."""
        if node.target is F.pad or (node.target is operator.getitem and _slices(node)):
            return Facts(before.rank)
        known = node.target in (*ADDS, *SUBS, *SCALES)
        return self._among_constants(node, before) if known else Facts()

    def _among_constants(self, node: fx.Node, before: Facts) -> Facts:
        """Facts of a value that is combined with constants of the model, which may be larger."""
        if before.rank is None:
            return Facts()
        constants = [self._callees.attribute(n) for n in node.all_input_nodes if n.op == "get_attr"]
        sizes = [_channel_size(c, before) for c in constants]
        if None in sizes:
            return Facts()
        return before if set(sizes) <= {1, before.channels} else Facts(before.rank)

    def _keeps(self, layer: nn.Module | AffineConv | Blockwise | None) -> bool:
        """Whether a layer keeps the dimensions and channels of its input."""
        if isinstance(layer, Blockwise):
            return True
        return isinstance(layer, nn.Module) and (is_activation(layer) or is_a(layer, CHANNELWISE))

    def dtype(self, node: fx.Node) -> tuple[torch.dtype, torch.device] | None:
        """Type and device of a node's value, None if unknown."""
        here: fx.Node | None = node
        while here is not None:
            if "dtype" in here.meta:
                found: tuple[torch.dtype, torch.device] = here.meta["dtype"]
                return found
            made = self._callees.replacement(here)
            if made is not None and not isinstance(made, nn.Module):
                return made.dtype, made.device
            module = self._callees.module(here)
            weight = next(module.parameters(), None) if module is not None else None
            if weight is not None:
                return weight.dtype, weight.device
            here = self._source(here)
        return None

    def _source(self, node: fx.Node) -> fx.Node | None:
        """The one input of a layer that keeps its input's type."""
        inputs = [n for n in node.all_input_nodes if n.op != "get_attr"]
        return inputs[0] if self._keeps(self._layer(node)) and len(inputs) == 1 else None

    def _layer(self, node: fx.Node) -> nn.Module | AffineConv | Blockwise | None:
        made = self._callees.replacement(node)
        if made is not None:
            return made if isinstance(made, nn.Module) else made.layer
        return self._callees.module(node)


def _channel_size(constant: object, x: Facts) -> int | None:
    """Channels of a constant that broadcasts against x; None if it may add dimensions."""
    if not isinstance(constant, Tensor) or x.rank is None or constant.dim() > x.rank:
        return None
    axis = 1 if x.last else x.rank - 1  # counted from the end
    return int(constant.shape[-axis]) if constant.dim() >= axis else 1


def _slices(node: fx.Node) -> bool:
    """Whether an index is made of slices, which keep every dimension."""
    index = node.args[1]
    return isinstance(index, tuple) and all(isinstance(i, slice) or i is ... for i in index)


def _sum(inputs: list[Facts]) -> Facts:
    """Facts of a sum, which may broadcast: certain only where the operands agree."""
    ranks = {f.rank for f in inputs}
    channels = {(f.channels, f.last) for f in inputs}
    agreed = channels.pop() if len(channels) == 1 else (None, False)
    return Facts(ranks.pop() if len(ranks) == 1 else None, *agreed)


def _on_last(layers: Sequence[nn.Module | AffineConv | Blockwise | None]) -> bool:
    """Whether some layer's channels are the last dimension."""
    return any(
        isinstance(f, nn.Linear) or (isinstance(f, AffineConv) and not f.dims) for f in layers
    )


def _dims_of(layer: nn.Module | AffineConv | Blockwise | None) -> int | None:
    if isinstance(layer, AffineConv):
        return layer.dims or None
    return next((d for d, kinds in _SPATIAL.items() if type(layer) in kinds), None)


def _channels_out(layer: nn.Module | AffineConv | Blockwise | None) -> int | None:
    return _size(layer, "out_channels", "out_features", "num_features")


def _channels_in(layer: nn.Module | AffineConv | Blockwise | None) -> int | None:
    return _size(layer, "in_channels", "in_features", "num_features")


def _size(layer: nn.Module | AffineConv | Blockwise | None, *names: str) -> int | None:
    if isinstance(layer, (AffineConv, *CONVS, *BATCH_NORMS)):
        return next((int(getattr(layer, n)) for n in names if hasattr(layer, n)), None)
    return None
