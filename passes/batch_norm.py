"""Batch norm folding and its inverse; `rmfx.rules.batch_norm` has the algebra of both."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import fx, nn

from rmfx.algebra.affine import CONVS
from rmfx.data.batches import check_batches
from rmfx.data.calibration import measure
from rmfx.frontend.tracing import trace
from rmfx.ir.kinds import BATCH_NORMS
from rmfx.ir.net import Net
from rmfx.ir.undisturbed import undisturbed
from rmfx.options import is_named, patterns_of
from rmfx.oracle.verification import checked
from rmfx.rules.batch_norm import BatchNormRule, fold, insert_norm

__all__ = ["BatchNormRule", "fold", "fold_batch_norm", "insert_batch_norm"]


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
        if node.name in found:
            insert_norm(net, node, found[node.name])
    normed = net.finish()
    return checked("insert_batch_norm", model, net.source, normed, batches[0], wanted=verify)


def _has_no_norm(net: Net, node: fx.Node, layers: Sequence[str]) -> bool:
    """Whether a node is a convolution that no batch norm reads."""
    module = net.module(node)
    named = is_named(str(node.target), layers)
    if type(module) not in CONVS[1:] or not named or net.rank(node) != module.weight.dim():  # type: ignore[union-attr, operator]
        return False
    return not any(type(net.module(user)) in BATCH_NORMS for user in node.users)
