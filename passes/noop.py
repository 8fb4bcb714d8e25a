"""Removal of what does nothing at inference: identity, dropout, stochastic depth, empty sums.

`rmfx.rules.noop` has the list of it.
"""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from rmfx.frontend.tracing import trace
from rmfx.ir.driver import apply_rule
from rmfx.ir.net import Net
from rmfx.ir.undisturbed import undisturbed
from rmfx.oracle.verification import checked
from rmfx.rules.noop import NoopRule

__all__ = ["NoopRule", "remove_noops"]


@undisturbed
def remove_noops(
    model: nn.Module | Any, example_inputs: Any = None, *, verify: bool = True
) -> fx.GraphModule:
    """Remove identities, eval-mode dropout and the like from a model.

    Args:
        model: `nn.Module`, `GraphModule` or `ExportedProgram` in eval mode; not changed.
        example_inputs: a tensor or a tuple of arguments, optional.
        verify: compare the result with the model, on random inputs of several sizes, before it is
            returned; see `rmfx.verify`. Needs example inputs.

    Raises:
        RmfxError: the model cannot be traced or its weights cannot be used.
    """
    net = Net(trace(model, example_inputs))
    apply_rule(net, NoopRule())
    return checked("remove_noops", model, net.source, net.finish(), example_inputs, wanted=verify)
