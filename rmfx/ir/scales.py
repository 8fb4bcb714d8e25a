"""Reading products and sums with constants, as linear layers that act on each channel alone."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable

import torch
from torch import Tensor, fx

from rmfx.algebra.affine import AffineConv
from rmfx.errors import Refusal

from .elements import Deferred
from .joins import operands
from .net import Net
from .nodes import describe, is_tensor_node, two_operands
from .notes import why_frozen

Factor = Callable[[int, int], Tensor | Refusal]


def read_scale(net: Net, node: fx.Node) -> Deferred | Refusal:
    """x·c, c·x, x/c, −x with a constant number or a tensor of the model, per channel."""
    divide = node.target in (operator.truediv, operator.itruediv, torch.div)
    if node.target in (operator.neg, torch.neg):
        return _constant(lambda c, dims: -torch.ones(c, dtype=torch.float64), None)
    if set(node.kwargs) - {"other", "input"} or len(node.args) + len(node.kwargs) != 2:
        return Refusal(describe(node) + " with options")
    a, b = two_operands(node)
    constant, x = (b, a) if is_tensor_node(a) else (a, b)
    if not is_tensor_node(x):
        return Refusal("there is no tensor to scale")
    if is_tensor_node(constant):
        return Refusal("a product of two tensors that both depend on the input")
    if divide and constant is a:
        return Refusal("division by a tensor that depends on the input")
    value = _value(net, constant)
    if isinstance(value, Refusal):
        return value
    rank = net.rank(x) if isinstance(x, fx.Node) else None

    def factor(channels: int, dims: int) -> Tensor | Refusal:
        c = _per_channel(value, channels, dims, rank)
        return 1 / c if divide and isinstance(c, Tensor) else c

    return _constant(factor, None)


def read_shift(net: Net, node: fx.Node) -> Deferred | Refusal:
    """x + c, x − c, c − x with a constant number or a tensor of the model, per channel."""
    terms = operands(node)
    if isinstance(terms, Refusal):
        return terms
    (a, factor_a), (b, factor_b) = terms
    if is_tensor_node(a) == is_tensor_node(b):
        return Refusal("it adds two tensors and was itself refused")
    first_is_tensor = is_tensor_node(a)
    constant, scale, sign = (b, factor_b, factor_a) if first_is_tensor else (a, factor_a, factor_b)
    x = a if first_is_tensor else b
    value = _value(net, constant)
    if isinstance(value, Refusal):
        return value
    rank = net.rank(x) if isinstance(x, fx.Node) else None

    def shift(channels: int, dims: int) -> Tensor | Refusal:
        c = _per_channel(value, channels, dims, rank)
        return c * scale if isinstance(c, Tensor) else c

    return _constant(lambda c, dims: torch.full((c,), sign, dtype=torch.float64), shift)


def _constant(factor: Factor, shift: Factor | None) -> Deferred:
    def build(channels: int, dims: int) -> AffineConv | Refusal:
        a = factor(channels, dims)
        b = shift(channels, dims) if shift else torch.zeros(channels, dtype=torch.float64)
        if isinstance(a, Refusal):
            return a
        if isinstance(b, Refusal):
            return b
        if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
            return Refusal("a constant that is not finite")
        return AffineConv.scale(a, b, dims=dims)

    return Deferred(build)


def _value(net: Net, constant: object) -> Tensor | Refusal:
    if isinstance(constant, (int, float)) and not isinstance(constant, bool):
        return torch.tensor(float(constant), dtype=torch.float64)
    if isinstance(constant, fx.Node) and why_frozen(constant):
        return Refusal(why_frozen(constant), (constant.name,))
    if isinstance(constant, fx.Node):
        value = net.constant(constant)
        if value is not None and not value.is_complex():  # a mask is 0 or 1
            return value.detach().to("cpu", torch.float64)
    return Refusal("a constant that is neither a number nor a real tensor of the model")


def _per_channel(value: Tensor, channels: int, dims: int, rank: int | None) -> Tensor | Refusal:
    """(channels,) from a tensor that broadcasts over batch and space.

    Args:
        rank: dimensions of the value it meets, None if unknown: it may be without a batch then.
    """
    shape = tuple(value.shape)
    before, own = shape[: -dims - 1], shape[-dims - 1 :]
    if rank is None and before and math.prod(before) == 1:
        return Refusal(
            f"a constant of shape {shape}, which may add dimensions; pass example_inputs"
        )
    if (rank is not None and len(shape) > rank) or math.prod(before) != 1:
        return Refusal(f"a constant of shape {shape} that differs from sample to sample")
    full = (1,) * (dims + 1 - len(own)) + own
    if full[0] not in (1, channels) or math.prod(full[1:]) != 1:
        return Refusal(f"a constant of shape {shape} that is not one number per channel")
    return value.reshape(-1).expand(channels).clone()
