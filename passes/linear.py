"""Merging of linear layers in a row; `rmfx.rules.linear` has the law and how a chain is cut."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from rmfx.errors import OptionError
from rmfx.frontend.tracing import trace
from rmfx.ir.driver import apply_rule
from rmfx.ir.net import Net
from rmfx.ir.undisturbed import undisturbed
from rmfx.oracle.verification import checked
from rmfx.removal.measured import MeasuredPolicy
from rmfx.removal.policy import Policy, check_policy
from rmfx.rules.linear import LinearRule

__all__ = ["LinearRule", "merge_convs"]


@undisturbed
def merge_convs(
    model: nn.Module | Any,
    example_inputs: Any = None,
    *,
    policy: Policy = "profitable",
    verify: bool = True,
) -> fx.GraphModule:
    """Merge consecutive linear layers.

    Args:
        model: `nn.Module`, `GraphModule` or `ExportedProgram` in eval mode; not changed.
        example_inputs: a tensor or a tuple of arguments, optional.
        policy: "profitable": the cut of each chain with the fewest multiply-adds; "all": the one
            with the fewest layers, even where the result is dearer; or a function that is given a
            row (`rmfx.SiteReport`) for each chain that the cheapest cut would shorten, and answers.
        verify: compare the result with the model, on random inputs of several sizes, before it is
            returned; see `rmfx.verify`. Needs example inputs.

    Returns:
        A new module that computes the same with at most as many linear layers.

    Raises:
        RmfxError: the model cannot be traced or its weights cannot be used.

    Example:
        >>> import rmfx, torch
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(8, 2, 1), torch.nn.Conv2d(2, 8, 3)).eval()
        >>> len(list(rmfx.merge_convs(model).children()))
        2
        >>> len(list(rmfx.merge_convs(model, policy="all").children()))
        1
    """
    check_policy(policy)
    if isinstance(policy, MeasuredPolicy):
        raise OptionError("merge_convs has no sites to measure: pass 'profitable' or 'all'")
    net = Net(trace(model, example_inputs))
    apply_rule(net, LinearRule(policy=policy))
    return checked("merge_convs", model, net.source, net.finish(), example_inputs, wanted=verify)
