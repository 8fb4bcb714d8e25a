"""Whether weights can be computed with, and of which types layers hold them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, fx
from torch.nn.parameter import is_lazy

from rmfx.algebra.affine import is_finite
from rmfx.errors import WeightError

from .elements import Virtual
from .kinds import BATCH_NORMS, is_ordinary
from .net import Net
from .nodes import is_tensor_node
from .notes import type_of
from .selections import may_select

NARROW = (torch.float16, torch.bfloat16)
Kind = tuple[torch.dtype, torch.device]


def check_weight(name: str, value: Tensor) -> None:
    """Raise WeightError unless `value` can be computed with."""
    if is_lazy(value):
        raise WeightError(f"{name}: the weight is not initialised; run the model once first")
    if value.is_meta:
        raise WeightError(
            f"{name}: the weight is on the meta device and has no values; load the weights first"
        )
    if not is_ordinary(value):
        return  # it stays as it is, in a layer that stays as it is
    if value.is_complex():
        raise WeightError(f"{name}: complex weights ({value.dtype}) are not supported")
    if value.is_quantized:
        raise WeightError(f"{name}: quantized weights are not supported; convert before quantising")
    if value.is_floating_point() and not is_finite(value):
        raise WeightError(f"{name}: the weight holds NaN or Inf; repair or reload the checkpoint")


def weight_types(net: Net, nodes: Iterable[fx.Node]) -> set[Kind]:
    """Types and devices of all weights that some nodes use.

    A batch norm in float32 takes values of half that width, too, computes in its own type and gives
    back theirs: there it counts as one of their type. Under autocast such values come from layers
    with weights of its own type, and it is one of those.
    """
    kinds: set[Kind] = set()
    norms: list[tuple[set[Kind], Kind | None]] = []
    for node in nodes:
        made, module = net.replacement(node), net.module(node)
        if isinstance(made, Virtual):
            kinds.add((made.dtype, made.device))
        elif module is not None:
            tensors = (*module.parameters(), *module.buffers())
            own = {(t.dtype, t.device) for t in tensors if t.is_floating_point()}
            if isinstance(module, BATCH_NORMS):
                norms.append((own, type_of(node)))
            else:
                kinds |= own
        constants = () if may_select(net, node) else node.all_input_nodes
        for constant in constants:
            if not is_tensor_node(constant) and constant.op == "get_attr":
                value = net.attribute(constant)
                # Masks and whole numbers take the type of what they meet.
                if isinstance(value, torch.Tensor) and value.dim() and value.is_floating_point():
                    kinds.add((value.dtype, value.device))
    return kinds.union(*(_as_norm(own, given, kinds) for own, given in norms))


def _as_norm(own: set[Kind], given: Kind | None, others: set[Kind]) -> set[Kind]:
    """The types that a batch norm counts as, beside weights of other layers."""
    if own <= others:
        return own
    if given is not None:
        return {given}
    narrow = {place for dtype, place in others if dtype in NARROW}
    return {(dtype, place) for dtype, place in own if dtype != torch.float32 or place not in narrow}
