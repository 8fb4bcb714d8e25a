"""Number of dimensions and channels of a value, where shapes are not known.

With example inputs the front-end leaves a shape at every node. Without them the layers themselves
tell: a `Conv2d` gives 4 dimensions (inputs are taken as batched) and its output channels, and
channelwise operations hand both on. The answers are kept per node, so a graph is walked once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import fx, nn

from ._activation import Blockwise, is_activation
from ._affine import CONVS, AffineConv
from ._dialect import ADDS, BATCH_NORMS, CHANNELWISE, SUBS

if TYPE_CHECKING:
    from ._graph import Net

_SPATIAL = {
    1: (nn.Conv1d, nn.MaxPool1d, nn.AvgPool1d, nn.AdaptiveAvgPool1d),
    2: (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.BatchNorm2d),
    3: (nn.Conv3d, nn.MaxPool3d, nn.AvgPool3d, nn.AdaptiveAvgPool3d, nn.BatchNorm3d),
}


class Inference:
    """Answers about the nodes of one `Net`."""

    def __init__(self, net: Net) -> None:
        self._net = net
        self._ranks: dict[fx.Node, int | None] = {}
        self._channels: dict[fx.Node, int | None] = {}

    def rank(self, node: fx.Node) -> int | None:
        """Number of dimensions of a node's value, None if unknown."""
        return self._walk(node, self._ranks, self._own_rank)

    def channels(self, node: fx.Node, dims: int) -> int | None:
        """Channels of a value that layers of `dims` spatial dimensions read, None if unknown."""
        shape = node.meta.get("shape")
        if shape is not None and len(shape) > 1:
            return shape[1] if dims else shape[-1]
        return self._walk(node, self._channels, self._own_channels)

    def _walk(self, node: fx.Node, known: dict, own) -> int | None:  # type: ignore[type-arg,no-untyped-def]
        path = []
        here: fx.Node | None = node
        value = None
        while here is not None:
            if here in known:
                value = known[here]
                break
            path.append(here)
            value = own(here)
            if value is not None:
                break
            here = self._handed_on_from(here)
        for passed in path:
            known[passed] = value
        return value

    def dtype(self, node: fx.Node) -> tuple[torch.dtype, torch.device] | None:
        """Type and device of a node's value, None if unknown."""
        here: fx.Node | None = node
        while here is not None:
            if "dtype" in here.meta:
                found: tuple[torch.dtype, torch.device] = here.meta["dtype"]
                return found
            made = self._net.replacement(here)
            if made is not None and not isinstance(made, nn.Module):
                return made.dtype, made.device
            module = self._net.module(here)
            weight = next(module.parameters(), None) if module is not None else None
            if weight is not None:
                return weight.dtype, weight.device
            here = self._handed_on_from(here)
        return None

    def _module(self, node: fx.Node) -> nn.Module | AffineConv | Blockwise | None:
        made = self._net.replacement(node)
        if made is not None:
            return made if isinstance(made, nn.Module) else made.layer
        return self._net.module(node)

    def _handed_on_from(self, node: fx.Node) -> fx.Node | None:
        """The input whose rank and channels a node keeps."""
        inputs = [n for n in node.all_input_nodes if n.op != "get_attr"]
        if node.op == "call_function" and node.target in (*ADDS, *SUBS):
            return inputs[0] if inputs else None
        layer = self._module(node)
        keeps = isinstance(layer, nn.Module) and (
            is_activation(layer) or isinstance(layer, (*CHANNELWISE, nn.Linear))
        )
        keeps = keeps or isinstance(layer, Blockwise)
        if keeps or (isinstance(layer, AffineConv) and layer.dims == 0):
            return inputs[0] if len(inputs) == 1 else None
        return None

    def _own_rank(self, node: fx.Node) -> int | None:
        shape = node.meta.get("shape")
        if shape is not None:
            return len(shape)
        found = self._dims_of(node)
        if found:
            return found + 2
        module = self._module(node)
        if isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1):
            return 2
        if node.op == "placeholder":
            return next((d + 2 for d in map(self._dims_of, node.users) if d), None)
        return None

    def _dims_of(self, node: fx.Node) -> int | None:
        layer = self._module(node)
        if isinstance(layer, AffineConv):
            return layer.dims or None
        return next((d for d, kinds in _SPATIAL.items() if type(layer) in kinds), None)

    def _own_channels(self, node: fx.Node) -> int | None:
        found = self._channels_of(node, "out_channels", "out_features", "num_features")
        if found is None and node.op == "placeholder":
            names = ("in_channels", "in_features", "num_features")
            found = next((c for c in (self._channels_of(u, *names) for u in node.users) if c), None)
        return found

    def _channels_of(self, node: fx.Node, *names: str) -> int | None:
        layer = self._module(node)
        if isinstance(layer, (AffineConv, *CONVS, *BATCH_NORMS)):
            return next((int(getattr(layer, n)) for n in names if hasattr(layer, n)), None)
        return None
