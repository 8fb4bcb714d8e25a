"""Layers and tables without some of their rows or columns."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from rmfx.algebra.affine import MULTIPLYING, TRANSPOSED, AffineConv
from rmfx.algebra.products import sum_of_taps
from rmfx.ir.elements import Virtual
from rmfx.ir.net import Net
from rmfx.ir.nodes import input_of
from rmfx.ir.weights import weight_types


def put(net: Net, node: fx.Node, layer: AffineConv | nn.Module) -> None:
    """Let a node call another layer; its name and its target stay."""
    source, target = input_of(node), str(node.target)
    if source is None:
        raise TypeError(f"{node.name} reads more than one value")
    made: Virtual | nn.Module
    if isinstance(layer, AffineConv):
        (kind,) = weight_types(net, (node,))
        made = Virtual(layer, *kind)
    else:
        made = layer
    net.release([node])
    node.target = net.claim(target, made)
    node.args, node.kwargs = (source,), {}


def of_channels(chosen: Tensor, block: int) -> Tensor:
    """What is said of units, said of their channels."""
    return chosen.repeat_interleave(block)


def cut_layer(layer: AffineConv, outs: Tensor | None, ins: Tensor | None = None) -> AffineConv:
    """A layer without some of its channels.

    A group that gives nothing any more goes, with all that it reads; of the groups that stay every
    one must give as many channels as the others, and read as many.

    Args:
        layer: the layer.
        outs: (out,) booleans, all by default.
        ins: (in,) booleans, by default all that the groups which stay read.
    """
    n_in, n_out = layer.block
    outs = torch.ones(layer.out_channels, dtype=torch.bool) if outs is None else outs
    stay = outs.reshape(-1, n_out).any(1)
    ins = of_channels(stay, n_in) if ins is None else ins
    weight = _cut_weight(layer.weight, outs, ins)
    bias = layer.bias[outs.to(layer.bias.device)]
    return replace(layer, weight=weight, bias=bias, groups=int(stay.sum()))


def _cut_weight(weight: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Weights (rows, columns of a group, ...) without some rows and some columns.

    Args:
        weight: of a layer.
        rows: (rows,) booleans.
        columns: (groups · columns of a group,) booleans.
    """
    groups = columns.numel() // weight.shape[1]
    of_groups = rows.reshape(groups, -1), columns.reshape(groups, -1)
    sizes = torch.stack([part.sum(1) for part in of_groups], 1)[of_groups[0].any(1)]
    if len(sizes.unique(dim=0)) != 1:
        raise ValueError("of the groups that stay some would be larger than others")
    of_rows = of_groups[1].repeat_interleave(rows.numel() // groups, 0)[rows].to(weight.device)
    left = weight[rows.to(weight.device)]
    return left[of_rows].reshape(left.shape[0], -1, *weight.shape[2:])


def cut_module(module: nn.Module, outs: Tensor, ins: Tensor | None = None) -> nn.Module:
    """A copy of a layer, or of a channelwise module, without some of its channels.

    Args:
        module: the module.
        outs: (channels,) booleans, of what it gives.
        ins: (channels,) booleans, of what a linear layer reads, by default all that the groups
            which stay read.
    """
    made = copy.deepcopy(module)
    if isinstance(made, MULTIPLYING):
        _cut_linear(made, outs, ins)
    else:
        _cut_numbers(made, outs)
    return made


def _cut_numbers(module: nn.Module, keep: Tensor) -> None:
    """Cuts all that a module holds one number of for each channel."""
    total = keep.numel()
    for part in module.modules():
        for held in (part._parameters, part._buffers):
            for name, value in held.items():
                if value is not None and value.dim() and value.shape[0] == total:
                    held[name] = like(value.detach()[keep.to(value.device)], value)
        for name in ("num_features", "num_parameters"):
            if getattr(part, name, None) == total:
                setattr(part, name, int(keep.sum()))


def _cut_linear(module: Any, outs: Tensor, ins: Tensor | None) -> None:
    """Cuts a Linear layer or a convolution, which may be transposed."""
    groups = getattr(module, "groups", 1)
    stay = outs.reshape(groups, -1).any(1)
    transposed = isinstance(module, TRANSPOSED)
    total = module.weight.shape[0] if transposed else module.weight.shape[1] * groups
    ins = of_channels(stay, total // groups) if ins is None else ins
    rows, columns = (ins, outs) if transposed else (outs, ins)
    module.weight = like(_cut_weight(module.weight.detach(), rows, columns), module.weight)
    if module.bias is not None:
        module.bias = like(module.bias.detach()[outs.to(module.bias.device)], module.bias)
    if isinstance(module, nn.Linear):
        module.in_features, module.out_features = int(ins.sum()), int(outs.sum())
    else:
        module.in_channels, module.out_channels = int(ins.sum()), int(outs.sum())
        module.groups = int(stay.sum())


def like(value: Tensor, model: Tensor) -> Any:
    """A tensor, as a parameter where another one is."""
    if isinstance(model, nn.Parameter):
        return nn.Parameter(value, requires_grad=model.requires_grad)
    return value


def filters(module: nn.Module) -> Tensor:
    """The weights of a linear layer, transposed or not, as (out, in // groups, *kernel)."""
    own: Any = module
    weight: Tensor = own.weight.detach()
    if isinstance(module, TRANSPOSED):
        weight = weight.unflatten(0, (own.groups, -1)).transpose(1, 2).flatten(0, 1)
    return weight


def inputs_read(weight: Tensor, groups: int, outs: Tensor | None = None) -> Tensor:
    """Which inputs the outputs of a layer, or some of them, read: (in,) booleans.

    Args:
        weight: (out, in // groups, *kernel).
        groups: of the layer.
        outs: (out,) booleans, all by default.
    """
    used = weight.detach() != 0
    if outs is not None:
        used[~outs.to(used.device)] = False
    of_groups: Tensor = used.reshape(*used.shape[:2], -1).any(2).unflatten(0, (groups, -1))
    return of_groups.any(1).flatten().cpu()


@dataclass(frozen=True)
class Merge:
    """Input channel `source` is `factor` times input channel `target` of the same group."""

    source: int
    target: int
    factor: float


def cut_columns(
    layer: AffineConv, keep: Tensor, numbers: Tensor, merges: Sequence[Merge]
) -> AffineConv:
    """The same layer without some of its inputs; every group must lose the same number.

    Args:
        layer: the layer.
        keep: (in,) booleans.
        numbers: (in,) what a channel that goes always is; 0 where it is merged into another.
        merges: where the columns of other channels that go are added.
    """
    weight, bias = layer.weight.detach(), layer.bias.detach()
    if bool(numbers.any()):
        bias = bias.to(torch.float64) + sum_of_taps(layer, numbers)
    if merges:
        weight = weight.to(torch.float64, copy=True)
        of_groups, n_in = weight.unflatten(0, (layer.groups, -1)), layer.block[0]
        for merge in merges:
            group, target, source = merge.target // n_in, merge.target % n_in, merge.source % n_in
            of_groups[group, :, target] += merge.factor * of_groups[group, :, source]
    return cut_layer(replace(layer, weight=weight, bias=bias), None, keep)
