"""Channel clean-up: channels that carry nothing of their own are removed, exactly.

`rmfx.pruning.dead_channels` says which they are and what takes their place.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from torch import fx, nn

from rmfx.analysis.constant_channels import PinnedRanges
from rmfx.analysis.ranges import check_range
from rmfx.frontend.tracing import trace
from rmfx.interval import Interval
from rmfx.ir.net import Net
from rmfx.ir.undisturbed import undisturbed
from rmfx.oracle.verification import Domain, checked
from rmfx.pruning.dead_channels import Cleaner
from rmfx.report import META_KEY, Report


@undisturbed
def eliminate_dead_channels(
    model: nn.Module | Any,
    example_inputs: Any = None,
    *,
    input_range: Interval | None = None,
    verify: bool = True,
) -> fx.GraphModule:
    """Remove channels that are zero, constant, unused or equal to another one.

    Args:
        model: `nn.Module`, `GraphModule` or `ExportedProgram` in eval mode; not changed.
        example_inputs: a tensor or a tuple of arguments, optional; with them, channels can be
            followed further, for example through batch norm behind `nn.Linear`.
        input_range: (low, high) of every input value, if known: it can prove that an activation
            never fires. Values outside it may give wrong results.
        verify: compare the result with the model, on random inputs of several sizes, before it is
            returned; see `rmfx.verify`. Needs example inputs.

    Returns:
        A new module that computes the same. The report of an earlier `remove_residuals` stays with
        it; where a join's value has lost channels, its row's `node` is None.

    Raises:
        RmfxError: the model cannot be traced or its weights cannot be used.

    Example:
        >>> import rmfx, torch
        >>> conv1, conv2 = torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 4, 3, padding=1)
        >>> with torch.no_grad():
        ...     _ = conv1.weight[:5].zero_()  # five constant channels
        >>> model = torch.nn.Sequential(conv1, torch.nn.Tanh(), conv2).eval()
        >>> [m.out_channels for m in list(rmfx.eliminate_dead_channels(model).children())[::2]]
        [4, 4]
    """
    check_range(input_range, example_inputs)
    net = Net(trace(model, example_inputs))
    cleaner = Cleaner(net, PinnedRanges(net, input_range))
    cleaner.run()
    return checked(
        "eliminate_dead_channels",
        model,
        net.source,
        _without_nodes(net.finish(), cleaner.changed),
        example_inputs,
        wanted=verify,
        domain=Domain(input_range),
    )


def _without_nodes(gm: fx.GraphModule, changed: Collection[fx.Node]) -> fx.GraphModule:
    """A node that has lost channels holds no join's value: the rows of an earlier report say so."""
    before = gm.meta.get(META_KEY)
    if isinstance(before, Report):
        lost = {node.name for node in changed}
        rows = (replace(row, node=None) if row.node in lost else row for row in before.rows)
        gm.meta[META_KEY] = Report(tuple(rows), held=before.held)
    return gm
