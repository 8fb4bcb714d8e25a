"""What pruning should compute: the network as it was, with constants in place of some channels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from rmfx.algebra.affine import TRANSPOSED
from rmfx.ir.net import Net
from rmfx.pruning.families import Widths

CONVS = (F.conv1d, F.conv2d, F.conv3d)


class Masked(fx.Interpreter):
    """Runs a net with a number in place of each channel that goes wherever a layer mixes channels.

    Behind a transposed convolution it is the number's mean effect.

    Args:
        net: none of whose layers is virtual.
        widths: of the net.
        keep: (labels,) which stay.
        means: of the channels that layers read, by layer.
        borders: whether padding stays 0; else it holds the number, too.
    """

    def __init__(
        self,
        net: Net,
        widths: Widths,
        keep: Tensor,
        means: Mapping[fx.Node, Tensor],
        *,
        borders: bool = False,
    ) -> None:
        super().__init__(net.source, graph=net.graph)
        self.layers = {layer.node: layer for layer in widths.channels.layers}
        self.means, self._borders = means, borders
        self._widths, self._kept = widths, torch.cat((keep, keep.new_ones(1)))

    def gone(self, node: fx.Node) -> Tensor:
        """Which of the channels that a layer reads go, (in_channels,) booleans."""
        layer = self.layers[node]
        return ~self._kept[self._widths.places(layer.ins)] & layer.mixes

    def run_node(self, n: fx.Node) -> Any:
        if n not in self.layers or n not in self.means:
            return super().run_node(n)
        x, module = self.env[n.all_input_nodes[0]], self.layers[n].module
        gone, mean = self.gone(n), self.means[n].to(x)
        if isinstance(module, nn.Linear):
            return F.linear(torch.where(gone, mean, x), module.weight, module.bias)
        own: Any = module
        dims = x.dim() - 2
        gone, mean = (t.reshape(-1, *[1] * dims) for t in (gone, mean))
        if type(module) in TRANSPOSED:
            return own(torch.where(gone, 0.0, x)) + _response(own, torch.where(gone, mean, 0.0))
        pads = own._reversed_padding_repeated_twice
        x = F.pad(torch.where(gone, mean, x), pads)
        x = x if self._borders and own.groups == 1 else torch.where(gone, mean, x)
        return CONVS[dims - 1](x, own.weight, own.bias, own.stride, 0, own.dilation, own.groups)


def _response(layer: Any, constant: Tensor) -> Tensor:
    """What a transposed convolution makes of constant channels, on average inside."""
    wide = constant.expand(1, -1, *[12] * (constant.dim() - 1))
    inner: Tensor = layer(wide) - layer(torch.zeros_like(wide))
    for dim, step in enumerate(layer.stride, start=2):
        inner = inner.narrow(dim, 4 * step, 4 * step)
    return inner.mean(tuple(range(2, inner.dim())), keepdim=True)
