"""Batch norm in eval mode is a scale and a shift per channel, and merges with the layer beside it.

    conv, BN:  W' = t·W,  b' = t·b + β − t·μ,  t = γ/√(σ² + ε)           always
    BN, conv:  W' = W·t,  b' = b + Σ W·(β − t·μ)                         if the conv does not pad
    x       =  BN(x) with γ = √(σ² + ε), β = μ                           for any μ and σ²

Forms handled: BatchNorm1d/2d/3d and SyncBatchNorm next to Conv1d/2d/3d or Linear; behind Linear
only where dimension 1 holds the features: on 2-D inputs, and on tokens flattened to 2-D for it,
`bn(y.flatten(0, 1)).reshape_as(y)` (LeViT). The conv before it comes first, the one behind second.

Refused: batch norm without running statistics, which normalises by the batch; layers shared by
several calls, tied, hooked or parametrized; a conv whose output is also read elsewhere; a padded
conv after a batch norm, which would read the shift where it now reads zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from rmfx.algebra.affine import AffineConv
from rmfx.algebra.laws import in_turn
from rmfx.algebra.modules import from_batch_norm
from rmfx.algebra.products import compose
from rmfx.data.moments import Moments
from rmfx.errors import OptionError, Refusal
from rmfx.ir.driver import apply_rule
from rmfx.ir.elements import Virtual
from rmfx.ir.kinds import BATCH_NORMS
from rmfx.ir.net import Net
from rmfx.ir.nodes import input_of
from rmfx.ir.notes import OF_VALUE, notes_of, why_frozen
from rmfx.ir.reading import demands_of, read, read_affine
from rmfx.ir.weights import weight_types

RESHAPES = (
    "reshape_as",
    "view_as",
    torch.ops.aten.reshape_as.default,
    torch.ops.aten.view_as.default,
)


def identity_norm(
    module: nn.Module, carried: int, moments: Moments | None, runs: int = 1
) -> nn.Module:
    """A copy of a batch norm, widened by `carried` channels on which it is the identity.

    Args:
        moments: of the carried values; mean 0 and variance 1 if None. Channels beyond those
            measured (zero padding of the carry) get mean 0 and variance 1.
        runs: in so many its own channels and the carried ones take turns.

    Raises:
        OptionError: the moments are not finite in the type of the batch norm.
    """
    eps = float(module.eps)  # type: ignore[arg-type]
    mean, variance = (
        torch.zeros(carried, dtype=torch.float64),
        torch.ones(carried, dtype=torch.float64),
    )
    if moments is not None and len(moments.mean) <= carried:
        mean[: len(moments.mean)] = moments.mean.cpu()
        variance[: len(moments.mean)] = moments.variance.cpu()
    own_mean: Tensor = module.running_mean  # type: ignore[assignment]
    n = own_mean.numel()
    weight = module.weight if isinstance(module.weight, Tensor) else torch.ones_like(own_mean)
    bias = module.bias if isinstance(module.bias, Tensor) else torch.zeros_like(own_mean)
    wide = type(module)(n + carried, eps=eps, momentum=module.momentum)
    wide = wide.to(own_mean.device, own_mean.dtype)
    # γ follows from the variance as it is stored, so that rounding cancels.
    stored = variance.to(own_mean.dtype).to(torch.float64)
    if not (stored.isfinite().all() and mean.to(own_mean.dtype).isfinite().all()):
        raise OptionError(
            "on the calibration data the network computes NaN, Inf or numbers whose variance is "
            f"beyond {own_mean.dtype}; pass data on which it does not"
        )
    gamma = torch.sqrt(stored + eps)
    with torch.no_grad():
        for target, own, carry in (
            (wide.weight, weight, gamma),
            (wide.bias, bias, mean),
            (wide.running_mean, own_mean, mean),
            (wide.running_var, module.running_var, stored),
        ):
            target.copy_(in_turn([own.detach(), carry.to(own_mean)], runs))  # type: ignore[operator]
    return wide.eval()


def insert_norm(net: Net, conv: fx.Node, moments: Moments) -> None:
    """Put a batch norm behind a convolution that changes nothing; moments: of its outputs."""
    module: Any = net.module(conv)
    kind = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[module.weight.dim() - 3]
    empty = kind(0).to(module.weight.device, module.weight.dtype)
    norm = identity_norm(empty, module.out_channels, moments)
    with net.graph.inserting_after(conv):
        made = net.put(norm, conv, f"{conv.target}_norm", conv)
    conv.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)
    net.rewrites["insert_norm"] += 1


@dataclass(frozen=True, eq=False)
class Pair:
    """Two linear nodes in a row, and the layer they amount to."""

    first: fx.Node
    second: fx.Node
    layer: Virtual


class BatchNormRule:
    """Merge a batch norm with the conv before it, else with the conv after it."""

    def match(self, net: Net, node: fx.Node) -> Pair | Refusal | None:
        if type(net.module(node)) not in BATCH_NORMS:
            return None
        before = input_of(node)
        pair: Pair | Refusal = Refusal("there is no linear layer next to it")
        if before is not None and _is_weighted(net, before):
            pair = merge_pair(net, before, node)
        after = next(iter(node.users))
        if isinstance(pair, Refusal) and _is_weighted(net, after):
            other = merge_pair(net, node, after)
            pair = other if isinstance(other, Pair) else pair
        return pair

    def rewrite(self, net: Net, node: fx.Node, match: Pair) -> None:
        demanded = demands_of(net, (match.first, match.second))
        net.merge(match.first, match.second, match.layer, demanded)


@dataclass(frozen=True, eq=False)
class Tokens:
    """A batch norm of flattened tokens between a Linear layer and the node that unflattens."""

    linear: fx.Node
    flatten: fx.Node
    norm: fx.Node
    layer: Virtual


class TokenNormRule:
    """Merge a batch norm of flattened tokens with the Linear layer before them."""

    def match(self, net: Net, node: fx.Node) -> Tokens | None:
        if node.target not in RESHAPES or len(node.args) != 2 or node.kwargs:
            return None
        norm, linear = node.args
        if not isinstance(norm, fx.Node) or not isinstance(linear, fx.Node):
            return None
        flatten = input_of(norm)
        if type(net.module(norm)) not in BATCH_NORMS or flatten is None:
            return None
        if input_of(flatten) is not linear or set(linear.users) != {flatten, node}:
            return None
        if set(flatten.users) != {norm} or set(norm.users) != {node} or net.guard(norm):
            return None
        if any(why_frozen(n) for n in (linear, flatten, norm, node)):
            return None
        if not _joins_tokens(net, flatten, net.rank(linear)):
            return None
        layer = _of_features(net, linear, norm)
        kinds = weight_types(net, (linear, norm))
        if layer is None or len(kinds) != 1:
            return None
        return Tokens(linear, flatten, norm, Virtual(layer, *kinds.pop()))

    def rewrite(self, net: Net, node: fx.Node, match: Tokens) -> None:
        linear = match.linear
        net.merge(linear, match.norm, match.layer, demands_of(net, (linear, match.norm)))
        node.replace_all_uses_with(linear)
        linear.meta |= notes_of(node, *OF_VALUE)
        net.make_stand_for(linear, net.stands_for(node))
        net.release([match.flatten])
        net.graph.erase_node(node)
        net.graph.erase_node(match.flatten)


def _joins_tokens(net: Net, flatten: fx.Node, rank: int | None) -> bool:
    """Whether a node flattens all dimensions but the last."""
    module = net.module(flatten)
    if type(module) is not nn.Flatten or rank is None or net.guard(flatten):
        return False
    end = module.end_dim + rank if module.end_dim < 0 else module.end_dim
    return module.start_dim % rank == 0 and end == rank - 2


def _of_features(net: Net, linear: fx.Node, norm: fx.Node) -> AffineConv | None:
    """A Linear layer and the batch norm of its features as one layer."""
    inner, module = read(net, linear), net.module(norm)
    if not isinstance(inner, AffineConv) or inner.dims or module is None:
        return None
    outer = from_batch_norm(module, 0)
    if isinstance(outer, Refusal) or outer.in_channels != inner.out_channels:
        return None
    merged = compose(outer, inner)
    return merged if isinstance(merged, AffineConv) else None


def fold(net: Net) -> None:
    """Fold every batch norm of a net that can be folded."""
    apply_rule(net, TokenNormRule())
    apply_rule(net, BatchNormRule())


def _is_weighted(net: Net, node: fx.Node) -> bool:
    return node.op == "call_module" and isinstance(read(net, node), AffineConv)


def merge_pair(net: Net, first: fx.Node, second: fx.Node) -> Pair | Refusal:
    """Two neighbouring nodes as one layer, where that is exact."""
    if len(first.users) != 1:
        others = [u.name for u in first.users if u is not second]
        return Refusal(f"its value is also read by {', '.join(others)}", (first.name,))
    inner, outer = read_affine(net, first), read_affine(net, second)
    if isinstance(inner, Refusal):
        return inner
    if isinstance(outer, Refusal):
        return outer
    merged = compose(outer, inner)
    if isinstance(merged, Refusal):
        return merged.at(first.name, second.name)
    kinds = weight_types(net, (first, second))
    if len(kinds) != 1:
        found = ", ".join(sorted(map(str, kinds)))
        return Refusal(f"the weights are of mixed types: {found}", (first.name, second.name))
    return Pair(first, second, Virtual(merged, *kinds.pop()))
