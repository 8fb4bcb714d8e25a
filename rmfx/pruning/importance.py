"""How much each filter matters: one number for every label that may go.

taylor            mean over samples of |sum over positions of (a - mean a)·dL/da|, where the
                  channel a is read (Molchanov et al., 2019, with the mean taken out, since the
                  mean can go into the next bias)
activation        standard deviation of the channel where it is read, times the norm of the
                  weights that read it
bn_scale          |γ| of the batch norm behind each layer (network slimming, Liu et al., 2017)
l1, l2            norm of each filter with its batch norm folded (Li et al., 2017)
geometric_median  distance of each filter to the others of its layer (He et al., 2019)
random            the control
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from rmfx.algebra.affine import CONVS
from rmfx.analysis.labels import Labelled
from rmfx.data.batches import Batches, Loss, inputs_of, loss_on, output_on
from rmfx.data.moments import Moments
from rmfx.errors import OptionError
from rmfx.frontend.memory import writes_undone
from rmfx.ir.net import Net

from .cutting import norm_behind
from .families import Widths
from .slicing import filters

Custom = Callable[[fx.GraphModule], Mapping[str, Tensor]]


class Readers(fx.Interpreter):
    """Runs a net and looks at what its linear layers read.

    Args:
        net: none of whose layers is virtual.
        layers: to look at.
        look: called with each layer and its input; what it gives is read instead.
    """

    def __init__(
        self, net: Net, layers: Iterable[Labelled], look: Callable[[Labelled, Tensor], Tensor]
    ) -> None:
        super().__init__(net.source, graph=net.graph)
        self._layers = {layer.node: layer for layer in layers}
        self._look = look

    def run_node(self, n: fx.Node) -> Any:
        layer = self._layers.get(n)
        if layer is None:
            return super().run_node(n)
        source = n.all_input_nodes[0]
        value = self.env[source]
        self.env[source] = self._look(layer, value)
        try:
            return super().run_node(n)
        finally:
            self.env[source] = value


def readers_of(widths: Widths) -> list[Labelled]:
    """The layers that mix channels which may go with others."""
    end = len(widths.roots)
    return [
        layer
        for layer in widths.channels.layers
        if bool((layer.mixes & (widths.places(layer.ins) < end)).any())
    ]


def _by_channel(layer: Labelled, value: Tensor) -> Tensor:
    """A value as (batch, channels, positions)."""
    axis = value.dim() - 1 if isinstance(layer.module, nn.Linear) else 1
    return value.movedim(axis, 1).flatten(2) if value.dim() > 2 else value.unsqueeze(2)


class Responses:
    """Mean and variance of every channel that a reader reads, over batches.

    Args:
        net: the net.
        widths: what may go.
        data: batches of (inputs, anything).
        step: called with a few words before each batch.
    """

    def __init__(
        self, net: Net, widths: Widths, data: Batches, step: Callable[[str], object]
    ) -> None:
        self._moments: dict[fx.Node, Moments] = {}
        runner = Readers(net, readers_of(widths), self._add)
        with torch.no_grad(), writes_undone(net.source):
            for i, batch in enumerate(data):
                step(f"responses, batch {i + 1}")
                output_on(runner.run, inputs_of(batch))
        if not self._moments and readers_of(widths):
            raise OptionError("data holds no batches")
        if not all(bool(one.mean.isfinite().all()) for one in self._moments.values()):
            raise OptionError("the network computes NaN or Inf on the data")

    def _add(self, layer: Labelled, value: Tensor) -> Tensor:
        rows = _by_channel(layer, value).transpose(0, 1).flatten(1)
        self._moments.setdefault(layer.node, Moments()).add(rows)
        return value

    @property
    def means(self) -> dict[fx.Node, Tensor]:
        """Mean of each channel that a layer reads, (in_channels,)."""
        return {node: found.mean for node, found in self._moments.items()}

    def deviation(self, node: fx.Node) -> Tensor:
        """Standard deviation of each channel that a layer reads, (in_channels,)."""
        return self._moments[node].variance.sqrt()


# ---- by data ------------------------------------------------------------------------------------
def taylor(
    net: Net,
    widths: Widths,
    data: Batches,
    loss: Loss,
    means: Mapping[fx.Node, Tensor],
    step: Callable[[str], object],
) -> Tensor:
    """First-order change of the loss, per sample, if a channel were its mean: (labels,)."""
    found = torch.zeros(len(widths.roots) + 1, dtype=torch.float64)
    if not readers_of(widths):
        return found[:-1]
    taken: list[tuple[Labelled, Tensor, Tensor]] = []

    def look(layer: Labelled, value: Tensor) -> Tensor:
        probe = torch.zeros_like(value, requires_grad=True)
        taken.append((layer, value.detach(), probe))
        return value + probe

    runner, samples = Readers(net, readers_of(widths), look), 0
    with torch.enable_grad(), writes_undone(net.source):
        for i, (inputs, target) in enumerate(data):
            step(f"importance, batch {i + 1}")
            taken.clear()
            value = loss_on(loss, output_on(runner.run, inputs), target)
            slopes = torch.autograd.grad(value, [probe for *_, probe in taken])
            change, count = _changes(widths, taken, slopes, means)
            found += change.abs().sum(0)
            samples += count
    if not bool(found.isfinite().all()):
        raise OptionError("the loss, or its gradient, is NaN or Inf on the data")
    return found[:-1] / samples


def _changes(
    widths: Widths,
    taken: list[tuple[Labelled, Tensor, Tensor]],
    slopes: tuple[Tensor, ...],
    means: Mapping[fx.Node, Tensor],
) -> tuple[Tensor, int]:
    """The change for each sample and label: (samples, labels + 1), and how many samples."""
    change = torch.zeros(0)
    for (layer, value, _), slope in zip(taken, slopes, strict=True):
        x, g = _by_channel(layer, value), _by_channel(layer, slope)
        mean = means[layer.node].to(x).reshape(1, -1, 1)
        own = ((x - mean) * g).sum(2).to("cpu", torch.float64)
        own[:, ~layer.mixes] = 0
        if not change.numel():
            change = torch.zeros(len(own), len(widths.roots) + 1, dtype=torch.float64)
        change.index_add_(1, widths.places(layer.ins), own)
    return change, len(change)


def activation(net: Net, widths: Widths, responses: Responses) -> Tensor:
    """How much the readers would notice: (labels,)."""
    found = torch.zeros(len(widths.roots) + 1, dtype=torch.float64)
    for layer in readers_of(widths):
        own = filters(layer.module).to("cpu", torch.float64)
        squares = own.square().reshape(*own.shape[:2], -1).sum(2)
        norms = squares.unflatten(0, (layer.carries.numel(), -1)).sum(1).flatten().sqrt()
        effect = responses.deviation(layer.node).cpu() * norms * layer.mixes
        found.index_add_(0, widths.places(layer.ins), effect)
    return found[:-1]


# ---- by weights ---------------------------------------------------------------------------------
def by_weight(net: Net, widths: Widths, name: str) -> Tensor:
    """A number for each filter, summed over the layers that make a label: (labels,)."""
    rules: dict[str, Callable[[Net, Labelled], Tensor]] = {
        "bn_scale": _scales,
        "l1": lambda net, layer: _filters(net, layer).abs().sum(1),
        "l2": lambda net, layer: _filters(net, layer).square().sum(1).sqrt(),
        "geometric_median": lambda net, layer: _distances(_filters(net, layer)),
    }
    end = len(widths.roots)
    makers = [f for f in widths.channels.layers if bool((widths.places(f.outs) < end).any())]
    made = {str(layer.node.target): rules[name](net, layer) for layer in makers}
    return by_layer(widths, made)


def by_layer(widths: Widths, made: Mapping[str, Tensor]) -> Tensor:
    """Numbers for the outputs of layers, as one number for each label.

    Raises:
        OptionError: a layer is not known, or has another number of outputs.
    """
    found = torch.zeros(len(widths.roots) + 1, dtype=torch.float64)
    layers = {str(layer.node.target): layer for layer in widths.channels.layers}
    if not isinstance(made, Mapping) or not all(isinstance(v, Tensor) for v in made.values()):
        raise OptionError("importance must give a dict of tensors, by paths of layers")
    for path, values in made.items():
        outs = layers[path].outs if path in layers else None
        if outs is None or values.shape != outs.shape:
            wanted = "no such layer" if outs is None else f"it has {outs.numel()} outputs"
            raise OptionError(f"importance of {path}: {tuple(values.shape)} numbers, but {wanted}")
        if not bool(values.isfinite().all()):
            raise OptionError(f"importance of {path}: NaN or Inf")
        found.index_add_(0, widths.places(outs), values.detach().to("cpu", torch.float64))
    return found[:-1]


def _filters(net: Net, layer: Labelled) -> Tensor:
    """The filters of a layer with the batch norm behind it folded, (outputs, weights)."""
    rows = filters(layer.module).to("cpu", torch.float64).flatten(1)
    norm = norm_behind(net, layer.node)
    if norm is None:
        return rows
    statistics: Any = net.module(norm)
    scale: Tensor = (statistics.running_var.to("cpu", torch.float64) + statistics.eps).rsqrt()
    if statistics.weight is not None:
        scale = scale * statistics.weight.detach().cpu()
    return rows * scale.reshape(-1, 1)


def _scales(net: Net, layer: Labelled) -> Tensor:
    norm = norm_behind(net, layer.node)
    module: Any = None if norm is None else net.module(norm)
    if module is None or module.weight is None:
        is_conv = type(layer.module) in CONVS[1:]
        more = ", or call rmfx.insert_batch_norm first" if is_conv else ""
        raise OptionError(
            f"{layer.node.target}: no batch norm with a scale reads it alone, so there is no "
            f"bn_scale; choose another importance, protect this layer{more}"
        )
    scale: Tensor = module.weight.detach().abs()
    return scale


def _distances(filters: Tensor) -> Tensor:
    distances: Tensor = torch.cdist(filters, filters)
    return distances.sum(1)
