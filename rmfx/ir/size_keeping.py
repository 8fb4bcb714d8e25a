"""Which nodes give values of the sizes that they read: pointwise operators, norms and no-ops."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload, OpOverloadPacket

from rmfx.algebra.activation import is_activation

from .functions import torch_name
from .kinds import (
    BATCH_NORMS,
    CAST_OPERATORS,
    CASTS,
    INSTANCE_NORMS,
    KEEP_SIZE,
    NO_OPS,
    aten,
    is_a,
)
from .net import Net

LAYERS = (
    *(*BATCH_NORMS, *INSTANCE_NORMS, *NO_OPS, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm),
    *(nn.LocalResponseNorm, nn.CrossMapLRN2d, nn.Softmax, nn.LogSoftmax, nn.Softmin, nn.Softmax2d),
    *(nn.ChannelShuffle, nn.Hardtanh),
)
NAMES = frozenset(
    ("clone", "detach", "contiguous", "alias", "dropout", "feature_dropout", "alpha_dropout")
    + ("feature_alpha_dropout", "dropout1d", "dropout2d", "dropout3d", "softmax", "log_softmax")
    + ("softmin", "layer_norm", "group_norm", "instance_norm", "batch_norm", "rms_norm")
    + ("native_batch_norm", "normalize", "local_response_norm", "flip", "roll", "cumsum", "cumprod")
    + ("channel_shuffle", "zeros_like", "ones_like", "full_like", "empty_like", "rand_like")
    + ("randn_like", "requires_grad_", "detach_", "bernoulli", "gumbel_softmax")
    + ("fake_quantize_per_tensor_affine", "fake_quantize_per_channel_affine", "type_as")
    + ("logcumsumexp", "cummax", "cummin", "renorm", "pin_memory")
)
SYMBOLS = {"and_": "bitwise_and", "or_": "bitwise_or", "xor": "bitwise_xor"} | {
    "invert": "bitwise_not",
    "inv": "bitwise_not",
    "truediv": "div",
    "mod": "remainder",
    "floordiv": "floor_divide",
    "iadd": "add",
    "isub": "sub",
    "imul": "mul",
    "itruediv": "div",
}
POINTWISE = ("masked_fill", "where", "floor_divide")  # of which not every overload has the tag
CASTING = (*CASTS, "cpu", "cuda")


def meets(net: Net, node: fx.Node) -> bool:
    """Whether a node that reads several tensors combines them place by place, or joins them."""
    found = node.target in KEEP_SIZE or _is_pointwise(operator_name(node))
    return found and not _spreads(net, node)


def _spreads(net: Net, node: fx.Node) -> bool:
    """Whether a node reads a constant of more than one number, which may spread out the others."""
    held = [net.attribute(n) for n in node.all_input_nodes if n.op == "get_attr"]
    return any(not isinstance(value, Tensor) or value.numel() > 1 for value in held)


def keeps_sizes(net: Net, node: fx.Node) -> bool:
    """Whether a node that reads one tensor, constants aside, gives one of its sizes."""
    if node.op == "call_module":
        module = net.module(node)
        return module is not None and (is_activation(module) or is_a(module, LAYERS))
    name = operator_name(node)
    if node.target in CAST_OPERATORS or (node.op == "call_method" and name in CASTING):
        return True
    return name in NAMES or (_is_pointwise(name) and not _spreads(net, node))


def operator_name(node: fx.Node) -> str:
    """The name of what a node calls, "" unless it is of torch or of Python's `operator`."""
    if node.op == "call_function" and getattr(node.target, "__module__", "") == "_operator":
        name = str(getattr(node.target, "__name__", ""))
        return SYMBOLS.get(name, name)
    return torch_name(node).partition(".")[0]


@lru_cache(maxsize=1024)
def _is_pointwise(name: str) -> bool:
    """Whether torch's operator of a name works place by place, whatever its arguments."""
    if name in POINTWISE:
        return True
    packet = getattr(aten, name, None) if name.isidentifier() else None
    if not isinstance(packet, OpOverloadPacket):
        return False
    every = [getattr(packet, overload) for overload in packet.overloads()]
    own = [op for op in every if _is_of_tensors(op)]
    return bool(own) and all(torch.Tag.pointwise in op.tags for op in own)


def _is_of_tensors(op: OpOverload) -> bool:
    arguments = op._schema.arguments
    reads = any(str(a.type) in ("Tensor", "Optional[Tensor]") for a in arguments)
    return reads and not any(a.is_out for a in arguments)


def meets_constant(net: Net, node: fx.Node) -> bool:
    """Whether a node combines values with a constant that differs from place to place."""
    held = (net.attribute(x) for x in node.all_input_nodes if x.op == "get_attr")
    shapes = (tuple(x.shape) for x in held if isinstance(x, Tensor) and x.dim() > 1)
    return any(max(shape[0], *shape[2:], 1) > 1 for shape in shapes)
