"""Batch norm folding and its inverse: in eval mode it is a scale and a shift per channel.

    conv, BN:  W' = t·W,  b' = t·b + β − t·μ,  t = γ/√(σ² + ε)           always
    BN, conv:  W' = W·t,  b' = b + Σ W·(β − t·μ)                         if the conv does not pad

Forms handled: BatchNorm1d/2d/3d and SyncBatchNorm next to Conv1d/2d/3d or Linear; behind Linear
only where dimension 1 holds the features: on 2-D inputs, and on tokens flattened to 2-D for it,
`bn(y.flatten(0, 1)).reshape_as(y)` (LeViT).
Refused: batch norm without running statistics; layers shared by several calls, tied, hooked or
parametrized; a conv whose output is also read elsewhere; a padded conv after a batch norm, which
would read the shift where it now reads zeros.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from rmfx._affine import CONVS, AffineConv
from rmfx._algebra import compose
from rmfx._batches import check_batches
from rmfx._calls import BATCH_NORMS
from rmfx._errors import Refusal
from rmfx._graph import Net, Virtual
from rmfx._layers import input_of, read, read_affine
from rmfx._names import is_named, patterns_of
from rmfx._rewrite import apply_rule
from rmfx._site import weight_types
from rmfx._state import undisturbed
from rmfx._verification import checked
from rmfx.frontend import trace

from .calibration import identity_norm, measure

RESHAPES = (
    "reshape_as",
    "view_as",
    torch.ops.aten.reshape_as.default,
    torch.ops.aten.view_as.default,
)


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
        net.merge(match.first, match.second, match.layer)


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
        if any(n.meta.get("frozen") for n in (linear, flatten, norm, node)):
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
        net.merge(linear, match.norm, match.layer)
        node.replace_all_uses_with(linear)
        linear.meta |= {key: node.meta[key] for key in ("shape", "dtype") if key in node.meta}
        net.values[linear] = net.values.pop(node, node.name)
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
    outer = AffineConv.from_batch_norm(module, 0)
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


@undisturbed
def fold_batch_norm(
    model: nn.Module | Any, example_inputs: Any = None, *, verify: bool = True
) -> fx.GraphModule:
    """Fold every batch norm that stands next to a linear layer into it.

    Args:
        model: `nn.Module`, `GraphModule` or `ExportedProgram` in eval mode; not changed.
        example_inputs: a tensor or a tuple of arguments, optional; with them, batch norm after
            `nn.Linear` can be folded too.
        verify: compare the result with the model, on random inputs of several sizes, before it is
            returned; see `rmfx.verify`. Needs example inputs.

    Returns:
        A new module that computes the same; what could not be folded stays as it is.

    Raises:
        RmfxError: the model cannot be traced or its weights cannot be used.

    Example:
        >>> import rmfx, torch
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)).eval()
        >>> [type(m).__name__ for m in rmfx.fold_batch_norm(model).children()]
        ['Conv2d']
    """
    net = Net(trace(model, example_inputs))
    fold(net)
    made = net.finish()
    return checked("fold_batch_norm", model, net.source, made, example_inputs, wanted=verify)


@undisturbed
def insert_batch_norm(
    model: nn.Module | Any,
    data: Iterable[Any],
    *,
    layers: str | Sequence[str] = ("*",),
    verify: bool = True,
) -> fx.GraphModule:
    """Put a batch norm behind every convolution that has none, without changing the output.

    With γ = √(σ² + ε) and β = μ a batch norm is the identity for any μ and σ²; they are measured on
    the data, so that training that goes on from there starts well. A network whose batch norm was
    folded, as `remove_residuals` leaves it, can be trained and pruned like one that never was.

    Args:
        model: `nn.Module`, `GraphModule` or `ExportedProgram` in eval mode; not changed.
        data: batches of inputs, each a tensor or a tuple of arguments.
        layers: patterns such as "layer4.*" of the paths of convolutions.
        verify: compare the result with the model before it is returned; see `rmfx.verify`.

    Returns:
        A new module that computes the same up to rounding.

    Raises:
        ShapeError: there is no batch, or the model does not run on one.
        RmfxError: the model cannot be traced or its weights cannot be used.

    Example:
        >>> import rmfx, torch
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU()).eval()
        >>> x = torch.randn(4, 3, 8, 8)
        >>> [type(m).__name__ for m in rmfx.insert_batch_norm(model, [x]).children()]
        ['Conv2d', 'BatchNorm2d', 'ReLU']
    """
    check_batches("data", data, pairs=False)
    batches = list(data)
    net = Net(trace(model, batches[0] if batches else None))
    convs = [str(n.target) for n in net.graph.nodes if type(net.module(n)) in CONVS[1:]]
    if convs:
        layers = patterns_of("layers", layers, convs)
    wanted = {n.name for n in net.graph.nodes if _has_no_norm(net, n, layers)}
    found = measure(net.source, batches, wanted=lambda node: node.name in wanted).moments
    for node in list(net.graph.nodes):
        module: Any = net.module(node)
        if node.name not in found:
            continue
        kind = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[module.weight.dim() - 3]
        empty = kind(0).to(module.weight.device, module.weight.dtype)
        norm = identity_norm(empty, module.out_channels, found[node.name])
        with net.graph.inserting_after(node):
            made = net.put(norm, node, f"{node.target}_norm", node)
        node.replace_all_uses_with(made, delete_user_cb=lambda user, made=made: user is not made)
    normed = net.finish()
    return checked("insert_batch_norm", model, net.source, normed, batches[0], wanted=verify)


def _has_no_norm(net: Net, node: fx.Node, layers: Sequence[str]) -> bool:
    """Whether a node is a convolution that no batch norm reads."""
    module = net.module(node)
    named = is_named(str(node.target), layers)
    if type(module) not in CONVS[1:] or not named or net.rank(node) != module.weight.dim():  # type: ignore[union-attr, operator]
        return False
    return not any(type(net.module(user)) in BATCH_NORMS for user in node.users)
