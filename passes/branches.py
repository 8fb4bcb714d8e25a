"""Merging of parallel linear branches: f(x) + g(x) and [f(x); g(x)] are one layer each.

    f(x) + g(x)   = plus(f, g)(x)      kernels on a common window, added
    [f(x); g(x)]  = stack(f, g)(x)     kernels on a common window, one below the other

Forms handled: a sum of any number of branches from one fork, nested as well, of convolutions of any
kernel, grouped, depthwise, 1xk, Linear, batch norm, identities, constant scales, average pools and
sequences of them: the branches of RepVGG, MobileOne, DBB and ACNet, y = s·BN(conv(x)) + a·x
(ResConv, arXiv 2011.14356), layer scale; concatenations as in `rmfx.rules.concatenation`. Nothing
is made wider: that is what `remove_residuals` does for branches with activations.

Refused, each with its reason: a branch that is not linear; branches of different stride or size; a
sequence with a border between its layers (the second pads with zeros what the first would fill with
its bias); a value inside a branch that is read elsewhere.
"""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from rmfx.frontend.tracing import trace
from rmfx.ir.undisturbed import undisturbed
from rmfx.oracle.verification import checked
from rmfx.removal.merge import merge
from rmfx.removal.policy import Policy, check_policy


@undisturbed
def merge_branches(
    model: nn.Module | Any,
    example_inputs: Any = None,
    *,
    strict: bool = False,
    policy: Policy = "all",
    verify: bool = True,
) -> fx.GraphModule:
    """Merge every sum of parallel linear branches into one layer, and such concatenations.

    Args:
        model: `nn.Module`, `GraphModule` or `ExportedProgram` in eval mode; not changed.
        example_inputs: a tensor or a tuple of arguments; see `remove_residuals`.
        strict: raise at the first sum that is refused.
        policy: which sums to merge of those that can be: "all"; "profitable", those whose
            multiply-adds and traffic to memory become less (needs example inputs); a function
            that is given the site's row (`rmfx.SiteReport`, with expected costs) and answers; or
            an `rmfx.MeasuredPolicy`, which times each site.
        verify: compare the result with the model, on random inputs of several sizes, before it is
            returned; see `rmfx.verify`. Needs example inputs.

    Returns:
        A new module that computes the same; `rmfx.report` tells what became of every sum.

    Raises:
        RefusedError: a sum was refused and `strict` was set.
        RmfxError: the model cannot be traced or its weights cannot be used.

    Example:
        >>> import rmfx, torch
        >>> class Block(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.conv3 = torch.nn.Conv2d(4, 4, 3, padding=1)
        ...         self.conv1 = torch.nn.Conv2d(4, 4, 1)
        ...     def forward(self, x):
        ...         return self.conv3(x) + self.conv1(x) + x
        >>> merged = rmfx.merge_branches(Block().eval())
        >>> list(merged.children())
        [Conv2d(4, 4, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))]
    """
    check_policy(policy)
    source = trace(model, example_inputs)
    merged = merge(source, strict=strict, policy=policy)
    return checked(
        "merge_branches", model, source, merged, example_inputs, wanted=verify, reports=True
    )
