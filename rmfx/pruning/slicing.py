"""Layers and tables without some of their rows or columns."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from rmfx.algebra.affine import AffineConv
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


def cut_rows(layer: AffineConv, keep: Tensor) -> AffineConv:
    """A layer without some of its outputs; every group must lose the same number.

    Args:
        layer: the layer.
        keep: (out,) booleans.
    """
    keep = keep.to(layer.weight.device)
    return replace(layer, weight=layer.weight[keep], bias=layer.bias[keep])


def cut_groups(layer: AffineConv, keep: Tensor) -> AffineConv:
    """A layer without some of its groups; keep: (units,) booleans, a unit is some groups."""
    keep = of_channels(keep, layer.groups // keep.numel())
    rows = cut_rows(layer, of_channels(keep, layer.block[1]))
    return replace(rows, groups=int(keep.sum()))


def cut_module(module: nn.Module, keep: Tensor) -> nn.Module:
    """A copy of a channelwise module without some channels; keep: (channels,) booleans."""
    made = copy.deepcopy(module)
    total = keep.numel()
    for part in made.modules():
        for held in (part._parameters, part._buffers):
            for name, value in held.items():
                if value is not None and value.dim() and value.shape[0] == total:
                    rows = value.detach()[keep.to(value.device)]
                    held[name] = _like_parameter(rows, value)
        for name in ("num_features", "num_parameters"):
            if getattr(part, name, None) == total:
                setattr(part, name, int(keep.sum()))
    return made


def _like_parameter(rows: Tensor, value: Tensor) -> Any:
    if isinstance(value, nn.Parameter):
        return nn.Parameter(rows, requires_grad=value.requires_grad)
    return rows


def columns(layer: AffineConv) -> Tensor:
    """The weights that each input channel is multiplied by: (in, out // groups, taps)."""
    n_in, n_out = layer.block
    weight = layer.weight.detach().reshape(layer.groups, n_out, n_in, -1)
    return weight.transpose(1, 2).reshape(layer.in_channels, n_out, -1)


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
    n_in, n_out = layer.block
    device = layer.weight.device
    own, bias = columns(layer), layer.bias
    if merges:
        own = own.to(torch.float64)
        factor = torch.tensor([m.factor for m in merges], dtype=torch.float64, device=device)
        added = own[[m.source for m in merges]] * factor.reshape(-1, 1, 1)
        own = own.index_add(0, torch.tensor([m.target for m in merges], device=device), added)
    if bool(numbers.any()):
        gone = numbers.nonzero().flatten().to(device)
        effect = own[gone].to(torch.float64).sum(2) * numbers.to(device)[gone].reshape(-1, 1)
        shift = bias.to(torch.float64).reshape(layer.groups, n_out)
        bias = shift.index_add(0, gone // n_in, effect).flatten()
    left = own[keep.to(device)].reshape(layer.groups, -1, n_out, own.shape[-1])
    weight = left.transpose(1, 2).reshape(layer.out_channels, -1, *layer.kernel)
    return replace(layer, weight=weight, bias=bias.detach())
