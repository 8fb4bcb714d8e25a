"""Closing carries: the way back from a plain chain to a residual connection.

`rmfx.rules.carries` finds them, `rmfx.rules.closing` has the law and says which are closed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from rmfx.analysis.channel_labels import Channels
from rmfx.analysis.ranges import check_range
from rmfx.errors import ShapeError
from rmfx.frontend.tracing import trace
from rmfx.interval import Interval
from rmfx.ir.driver import apply_rule
from rmfx.ir.net import Net
from rmfx.ir.undisturbed import undisturbed
from rmfx.oracle.verification import Domain, checked
from rmfx.pruning.allocation import spare
from rmfx.pruning.cutting import without
from rmfx.pruning.families import Widths
from rmfx.report import META_KEY
from rmfx.rules.closing import close_all, tidy
from rmfx.rules.copies import read_once
from rmfx.rules.linear import LinearRule


@undisturbed
def close_carries(
    model: nn.Module | Any,
    example_inputs: Any,
    *,
    input_range: Interval | None = None,
    verify: bool = True,
) -> fx.GraphModule:
    """Turn carries back into residual connections: the inverse of `remove_residuals`, as exact.

    A skip costs no multiply-adds and a carry does, so this pays where a network that was made plain
    and pruned has kept a carry everywhere. Channels of it that were pruned stay pruned.

    Args:
        model: `nn.Module`, `GraphModule` or `ExportedProgram` in eval mode; not changed. Batch norm
            must be folded (`fold_batch_norm`) where a carry passes it.
        example_inputs: a tensor or a tuple of arguments.
        input_range: (low, high) of every input value, if known. Values outside it may give wrong
            results.
        verify: compare the result with the model, on random inputs of several sizes, before it is
            returned; see `rmfx.verify`.

    Returns:
        A new module that computes the same; without carries it is the same network.

    Raises:
        ShapeError: there are no example inputs.
        RmfxError: the model cannot be traced or its weights cannot be used.

    Example:
        >>> import rmfx, torch
        >>> class Block(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.a, self.b = (torch.nn.Conv2d(4, 4, 3, padding=1) for _ in "ab")
        ...     def forward(self, x):
        ...         return x + self.b(torch.relu(self.a(x)))
        >>> x = torch.randn(1, 4, 8, 8)
        >>> plain = rmfx.remove_residuals(Block().eval(), x)
        >>> back = rmfx.close_carries(plain, x)
        >>> [m.out_channels for m in back.children() if isinstance(m, torch.nn.Conv2d)]
        [4, 4]
    """
    check_range(input_range, example_inputs)
    if example_inputs is None:
        raise ShapeError("close_carries needs example inputs: it follows channels by their shapes")
    net = Net(trace(model, example_inputs))
    closed = _closed(net, example_inputs, input_range)
    return checked(
        "close_carries",
        model,
        net.source,
        closed,
        example_inputs,
        wanted=verify,
        domain=Domain(input_range),
    )


def _closed(net: Net, example_inputs: Any, input_range: Interval | None) -> fx.GraphModule:
    """The network with its carries closed, and without what was there for them only."""
    spans = close_all(net, input_range)
    closed = net.finish()
    closed.meta.pop(META_KEY, None)  # its nodes may hold other values now
    if not spans:
        return closed
    net = Net(trace(_without_unread(closed, example_inputs), example_inputs))
    if read_once(net):
        net = Net(trace(_without_unread(net.finish(), example_inputs), example_inputs))
    # Last, for what is left of a layer may do nothing, and activations may be the same for all.
    tidy(net)
    net.sweep()
    # What was taken apart beside a carry is cheaper as one layer without it.
    apply_rule(net, LinearRule(keep_orders=False, concerns=lambda node: node.name in spans))
    return net.finish()


def _without_unread(gm: fx.GraphModule, example_inputs: Any) -> fx.GraphModule:
    """The network without the channels that nobody reads any more."""
    net = Net(trace(gm, example_inputs))
    net.sweep()
    widths = Widths(net, Channels(net))
    keep = widths.used()
    return without(net, widths, spare(widths, keep.to(torch.float64), keep), {})
