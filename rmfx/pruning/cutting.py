"""Carries out which channels go: every layer, table and slice of a net loses its part of them.

What a channel that goes was on average can go into the bias of the layers that read it: there it
is taken for a channel that always has this value, also where the layer pads. Where it should be 0
in the padding, the layer reads a channel of ones instead, which stands for all that have gone
(but a grouped layer does not).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from rmfx.algebra.affine import TRANSPOSED, AffineConv
from rmfx.algebra.laws import direct_sum
from rmfx.algebra.modules import from_conv
from rmfx.algebra.products import sum_of_taps
from rmfx.analysis.channel_labels import Channels
from rmfx.analysis.labels import PAD_ARGUMENTS, Edges, Labelled, Table
from rmfx.errors import Refusal, RmfxError
from rmfx.ir.elements import Virtual
from rmfx.ir.kinds import BATCH_NORMS
from rmfx.ir.net import Net
from rmfx.ir.nodes import slice_by_slice
from rmfx.ir.notes import set_shape, shape_of
from rmfx.report import META_KEY

from .families import Meter, Part, Size, Widths
from .slicing import cut_layer, cut_module, filters, like, of_channels


class Keep:
    """Which labels stay.

    Args:
        channels: of a net.
        gone: the roots of the labels that go.
    """

    def __init__(self, channels: Channels, gone: Tensor) -> None:
        self._channels = channels
        self._stays = torch.ones(channels.count, dtype=torch.bool)
        self._stays[gone] = False

    def __call__(self, ids: Tensor) -> Tensor:
        """Which of some labels stay, (labels,) booleans."""
        return self._stays[self._channels.roots(ids)]

    def count(self, ids: Tensor) -> int:
        return int(self(ids).sum())


def cut(
    net: Net,
    channels: Channels,
    gone: Tensor,
    responses: Mapping[fx.Node, Tensor],
    *,
    borders: bool = False,
) -> dict[str, Tensor]:
    """Cut channels out of a net.

    Args:
        net: to be changed.
        channels: of the net.
        gone: the roots of the labels that go; no layer may lose all.
        responses: for linear layers, what each channel that they read is to count for when it goes,
            (in_channels,); 0 where a layer is not named.
        borders: let padding stay 0 where channels go, at the price of a channel of ones for each
            layer that pads.

    Returns:
        The constants that have changed, by target.
    """
    keep = Keep(channels, gone)
    if len(gone):
        net.rewrites["cut"] += len(gone)
    for layer in channels.layers:
        if layer.node in responses:
            _compensate(net, layer, keep, responses[layer.node], borders=borders)
    constants: dict[str, Tensor] = {}
    for table in channels.tables:
        _cut_table(net, table, keep(table.ids), constants)
    for layer in channels.layers:
        _cut_layer(net, layer, keep(layer.ins), keep(layer.outs))
    for place in channels.cuts:
        _cut_place(place, keep)
    for node, value in channels.values.items():
        kept = keep(value.ids)
        if not bool(kept.all()):
            net.resize(node, value.axis, int(kept.sum()))
    return constants


# ---- responses ----------------------------------------------------------------------------------
def _compensate(net: Net, layer: Labelled, keep: Keep, response: Tensor, *, borders: bool) -> None:
    """Put what channels that go are taken for into a bias."""
    gone = ~keep(layer.ins) & layer.mixes
    if not bool((gone & (response.cpu() != 0)).any()):
        return
    module: Any = net.callee(layer.node)
    weight = filters(module).to(torch.float64)
    if borders and reads_ones(module, layer.carries.numel()):
        _read_ones(net, layer.node, torch.where(gone, response, 0.0).to(weight))
        return
    taps = weight.reshape(*weight.shape[:2], -1).sum(2)
    if isinstance(module, TRANSPOSED):
        # A place sees one tap of each stride in turn: this is their mean.
        taps = taps / math.prod(module.stride)
    summed = AffineConv.pointwise(taps, dims=0, groups=layer.carries.numel())
    shift = sum_of_taps(summed, torch.where(gone, response, 0.0))
    norm = norm_behind(net, layer.node)
    if module.bias is None and norm is not None:
        copied = _own(net, norm)
        copied.running_mean = copied.running_mean - shift.to(copied.running_mean)
        return
    copied = _own(net, layer.node)
    bias = shift.to(weight.device)
    if module.bias is not None:
        bias = bias + module.bias.detach().to(torch.float64)
    trained = module.weight.requires_grad
    copied.bias = nn.Parameter(bias.to(module.weight.dtype), requires_grad=trained)


def reads_ones(module: nn.Module, groups: int) -> bool:
    """Whether a layer reads a channel of ones for what has gone, where padding is to stay 0."""
    is_conv = isinstance(module, nn.modules.conv._ConvNd) and type(module) not in TRANSPOSED
    return groups == 1 and is_conv and any(getattr(module, "_reversed_padding_repeated_twice", ()))


def _read_ones(net: Net, node: fx.Node, constants: Tensor) -> None:
    """Let a layer read a channel of ones, with the weights of channels that are constant."""
    module = _own(net, node)
    weight = module.weight.detach()
    own = torch.einsum("oi...,i->o...", weight.to(torch.float64), constants).unsqueeze(1)
    module.weight = like(torch.cat((weight, own.to(weight)), 1), module.weight)
    module.in_channels += 1
    (source,) = node.all_input_nodes
    with net.graph.inserting_before(node):
        amounts = [0] * (2 * (weight.dim() - 2) + 1) + [1]
        ones = net.graph.call_function(F.pad, (source, amounts), {"value": 1.0})
    shape = shape_of(source)
    ones.meta = dict(source.meta)
    set_shape(ones, (shape[0], shape[1] + 1, *shape[2:]))
    node.args, node.kwargs = (ones,), {}


def norm_behind(net: Net, node: fx.Node) -> fx.Node | None:
    """The batch norm that alone reads a layer's value."""
    user = next(iter(node.users))
    module: Any = net.module(user)
    if len(node.users) > 1 or type(module) not in BATCH_NORMS or net.guard(user) is not None:
        return None
    if isinstance(net.module(node), nn.Linear) and net.rank(node) != 2:
        return None  # it normalises dimension 1, which does not hold the features
    return user if module.running_mean is not None else None


def with_ones(meter: Meter) -> Meter:
    """With the channel of ones that a layer which pads reads when it has lost channels."""

    def cost(part: Part, size: Size) -> float:
        reads = part.module is not None and reads_ones(part.module, part.carries.numel())
        if reads and size.ins < part.ins.numel():
            size = replace(size, ins=size.ins + 1)
        return meter(part, size)

    return cost


def with_biases(net: Net, widths: Widths, meter: Meter) -> Meter:
    """With the bias that a layer gets for the channels it has lost, if it had none."""
    gain = {
        part
        for part in widths.parts
        if part.module is not None
        and getattr(part.module, "bias", part.module) is None
        and part.carries.numel() < part.ins.numel()  # else it mixes no channels
        and norm_behind(net, part.node) is None
    }

    def cost(part: Part, size: Size) -> float:
        gets = part in gain and size.ins < part.ins.numel()
        return meter(part, size) + (size.outs if gets else 0)

    return cost


# ---- what is cut --------------------------------------------------------------------------------
def _own(net: Net, node: fx.Node) -> Any:
    """The module that a node calls, as a copy that may be changed."""
    if net.replacement(node) is None:
        module = net.module(node)
        if module is None:
            raise RmfxError(f"{node.name} calls no module")
        net.set(node, copy.deepcopy(module))
    return net.replacement(node)


def _cut_table(net: Net, table: Table, keep: Tensor, constants: dict[str, Tensor]) -> None:
    if bool(keep.all()):
        return
    if table.node.op == "get_attr":
        value: Any = net.attribute(table.node)
        rows = keep.nonzero().flatten().to(value.device)
        constants[str(table.node.target)] = like(
            value.detach().index_select(table.axis, rows), value
        )
    else:
        module: Any = net.callee(table.node)
        net.set(table.node, cut_module(module, keep))


def _cut_layer(net: Net, layer: Labelled, ins: Tensor, outs: Tensor) -> None:
    if bool(ins.all()) and bool(outs.all()):
        return
    if bool(layer.carries.any()):
        _cut_carrying(net, layer, ins, outs)
        return
    module: Any = net.callee(layer.node)
    ones = 0 if isinstance(module, nn.Linear) else module.in_channels - ins.numel()
    ins = torch.cat((ins, ins.new_ones(ones)))  # channels of ones stay
    net.set(layer.node, cut_module(module, outs, ins))


def _cut_carrying(net: Net, layer: Labelled, ins: Tensor, outs: Tensor) -> None:
    """A grouped convolution of which some groups work channel by channel."""
    module: Any = net.callee(layer.node)
    whole = from_conv(module)
    if isinstance(whole, Refusal):
        raise RmfxError(f"{layer.node.name}: {whole.reason}")
    own = ~layer.carries.repeat_interleave(layer.ins.numel() // layer.carries.numel())
    if bool(ins[own].any()) != bool(outs[own].any()):
        # The main block is there on one side only.
        made = cut_layer(whole.regroup(1), outs, ins)
    else:
        made = _direct_sum_of_runs(layer, whole, ins, outs)
    kind = (module.weight.dtype, module.weight.device)
    net.set(layer.node, Virtual(made, *kind))


def _direct_sum_of_runs(
    layer: Labelled, whole: AffineConv, ins: Tensor, outs: Tensor
) -> AffineConv:
    n_in, n_out = whole.block
    parts: list[AffineConv] = []
    for carry, run in groupby(range(layer.carries.numel()), lambda i: bool(layer.carries[i])):
        groups = torch.zeros(layer.carries.numel(), dtype=torch.bool)
        groups[list(run)] = True
        rows, columns = of_channels(groups, n_out), of_channels(groups, n_in)
        if not bool(outs[rows].any()):
            continue
        if carry:
            part = _channel_by_channel(cut_layer(whole, rows))
            parts.append(cut_layer(part, outs[rows]))
        else:
            parts.append(cut_layer(whole, outs & rows, ins & columns))
    made = direct_sum(*parts)
    if isinstance(made, Refusal):
        raise RmfxError(f"{layer.node.name}: {made.reason}")
    return made


def _channel_by_channel(layer: AffineConv) -> AffineConv:
    """A layer of which each output reads only its own place of its group, as a depthwise one."""
    rows = torch.arange(layer.out_channels)
    weight = layer.weight[rows, rows % layer.block[0]].unsqueeze(1)
    return replace(layer, weight=weight, groups=layer.out_channels)


def _cut_place(place: Edges, keep: Keep) -> None:
    """Let a node that names places of channels name those that they have now."""
    counts = [keep.count(part) for part in place.parts]
    node = place.node
    if place.adds:
        given: dict[str, Any] = dict(zip(PAD_ARGUMENTS, node.args[1:], strict=False)) | node.kwargs
        amounts = list(given["pad"])
        rank = len(shape_of(node))
        at = 2 * (rank - 1 - place.axis)
        amounts[at : at + 2] = counts
        node.args, node.kwargs = (node.args[0],), {**given, "pad": amounts}
        return
    index: Any = node.args[1]
    if place.rows is not None:
        kept = keep(place.ids)
        now = (kept.cumsum(0) - 1).tolist()
        left = [now[row] for row in place.rows if kept[row]]
        node.args = (node.args[0], tuple(left if isinstance(i, list) else i for i in index))
        return
    parts = slice_by_slice(index if isinstance(index, tuple) else (index,), len(shape_of(node)))
    parts[place.axis] = slice(counts[0], counts[0] + counts[1])
    node.args = (node.args[0], tuple(parts))


def without(
    net: Net,
    widths: Widths,
    keep: Tensor,
    means: Mapping[fx.Node, Tensor],
    *,
    borders: bool = False,
) -> fx.GraphModule:
    """A net without some of its labels; keep: (labels,) booleans, the rest as in `cut`."""
    constants = cut(net, widths.channels, widths.roots[~keep], means, borders=borders)
    gm = net.finish()
    gm.meta.pop(META_KEY, None)  # it names nodes that have lost channels
    for target, value in constants.items():
        path, _, name = target.rpartition(".")
        setattr(gm.get_submodule(path), name, value)
    return gm
