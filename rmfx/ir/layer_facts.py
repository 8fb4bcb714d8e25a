"""What layers tell of values where nothing else is known: dimensions, types, sizes that stay."""

from __future__ import annotations

import operator

import torch
import torch.nn.functional as F
from torch import fx, nn

from rmfx.algebra.activation import is_activation
from rmfx.algebra.affine import MULTIPLYING

from .kinds import ADDS, BATCH_NORMS, CHANNELWISE, KEEPING_ORDER, SCALES, SUBS, is_a
from .notes import shape_of
from .open_sizes import OpenSizes

KEEPING = (*ADDS, *SUBS, *SCALES)  # operations that keep the type of real numbers


# What keeps the order of dimensions, too.
IN_ORDER = (
    *(*KEEPING, torch.cat, torch.maximum, torch.minimum, operator.getitem, F.pad, F.interpolate),
    *("contiguous", "clone", torch.clone),
)


def is_real(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a value is known to hold floating point numbers."""
    here: fx.Node | None = node
    while here is not None:
        if "dtype" in here.meta:
            found: bool = here.meta["dtype"][0].is_floating_point
            return found
        if _has_weights(gm, here) or any(_has_weights(gm, user) for user in here.users):
            return True
        layer = gm.get_submodule(str(here.target)) if here.op == "call_module" else None
        is_layer = layer is not None and (is_activation(layer) or is_a(layer, CHANNELWISE))
        here = _source(here) if is_layer or here.target in KEEPING else None
    return False


def is_layers_size(gm: fx.GraphModule, value: fx.Node, dim: int) -> bool:
    """Whether it is a layer that fixes a size of a value, not the network's input.

    Args:
        dim: of the size, counted from the front.
    """
    here: fx.Node | None = value
    while here is not None:
        layer = gm.get_submodule(str(here.target)) if here.op == "call_module" else None
        shape = value.meta.get("shape", ())
        if is_a(layer, (nn.Linear, nn.LayerNorm)):
            return dim == len(shape) - 1
        if is_a(layer, (*MULTIPLYING, *BATCH_NORMS)):
            return dim == 1
        if here.op == "placeholder":
            # Channels of an input are fixed where the network runs with no others.
            return dim == 1 and not OpenSizes(gm).sizes_of_inputs(here.name, 1)
        known = layer is not None and (is_activation(layer) or is_a(layer, KEEPING_ORDER))
        here = _source(here) if known or here.target in IN_ORDER else None
    return False


def _has_weights(gm: fx.GraphModule, node: fx.Node) -> bool:
    kinds = (*MULTIPLYING, *BATCH_NORMS)
    return node.op == "call_module" and is_a(gm.get_submodule(str(node.target)), kinds)


def _source(node: fx.Node) -> fx.Node | None:
    """The first tensor that a node reads."""
    return next((n for n in node.all_input_nodes if n.op != "get_attr"), None)


def rank_of(gm: fx.GraphModule, node: fx.Node | None) -> int | None:
    """Number of dimensions of a node's value, from its shape or from the layer before it."""
    while node is not None:
        shape = shape_of(node)
        if shape is not None:
            return len(shape)
        if node.op == "call_module":
            module = gm.get_submodule(str(node.target))
            for dims in (1, 2, 3):
                kinds = tuple(getattr(nn, f"{k}{dims}d") for k in ("Conv", "MaxPool", "AvgPool"))
                if is_a(module, kinds):
                    return dims + 2
            if is_a(module, (nn.BatchNorm2d, nn.BatchNorm3d)):
                return 4 if is_a(module, nn.BatchNorm2d) else 5
            if not is_activation(module) and not is_a(module, (*CHANNELWISE, nn.Linear)):
                return None
        elif node.target not in (torch.add, torch.sub, torch.mul, torch.div, torch.neg):
            return None
        node = _source(node)
    return None
