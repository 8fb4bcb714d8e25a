"""Removal of residual connections: add(f(x), s(x)) becomes a plain chain with the same output.

    add(f(x), s(x)) = ∇ ∘ (f_k ⊕ s_k) ∘ … ∘ (f_1 ⊕ s_1) ∘ Δ

where every s_i is an identity except one, which holds the shortcut's linear map, and every
f_i ⊕ s_i is one ordinary layer. Δ is merged into the first layer ("reserving" in RMNet, arXiv
2111.00687, section 3) and ∇ into the last ("merging"). Two non-linear branches are the same with
two chains.

Where the branch combines other tensors (a gate, a concatenation, a sum that stays), those meet the
carry with ones, nothing or zeros; what others read of a value inside the branch is a slice of it.

Forms handled: `+`, `+=`, `-`, `torch.add(alpha=)`, `add_`, with constant factors on either side;
branches of convolutions, Linear, batch norm, scales, paddings, crops, average pools, pointwise
activations, products, concatenations and splits in any order; shortcuts that are the identity or
any chain of linear layers; sums of several branches, nested and shared forks.

Refused, each with its reason: an add that broadcasts; operands without a common source; an
operation on every path of a branch that mixes positions or channels by numbers that depend on the
data, or by a maximum; branches whose sizes agree for some inputs only; values that in-place
operations share; layers with hooks. Weights that torch computes at every call (`weight_norm`,
`prune`, parametrizations) are read as they are now, and layers that are shared get copies; the
report says so.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import Any

from torch import fx, nn

from rmfx.analysis.ranges import check_range
from rmfx.choices import TARGETS
from rmfx.errors import OptionError
from rmfx.frontend.dynamo import find_lifted
from rmfx.frontend.symbolic import BAKED
from rmfx.frontend.tracing import canonicalise_again, trace
from rmfx.interval import Interval
from rmfx.ir.notes import OWN_GRADIENT
from rmfx.ir.undisturbed import undisturbed
from rmfx.options import check_choice
from rmfx.oracle.verification import Domain, checked
from rmfx.removal.differentiable import linked
from rmfx.removal.policy import Policy, check_policy
from rmfx.removal.remove import CalibrationData, Options, is_calibrated, remove
from rmfx.removal.rule import ResidualRule
from rmfx.removal.strategy import allowed_ways
from rmfx.removal.target import BY_NAME

__all__ = ["ResidualRule", "remove_residuals"]


# ---- the verb -----------------------------------------------------------------------------------
@undisturbed
def remove_residuals(
    model: nn.Module | Any,
    example_inputs: Any = None,
    *,
    strict: bool = False,
    fold_batch_norm: bool = True,
    activation: str | Collection[str] = "auto",
    input_range: Interval | None = None,
    calibration: Iterable[Any] | None = None,
    differentiable: bool = False,
    policy: Policy = "all",
    minimise: str = "time",
    copy_shared: bool = True,
    verify: bool = True,
) -> fx.GraphModule:
    """Rewrite every residual connection that can be removed exactly.

    Args:
        model: `nn.Module`, `GraphModule` or `ExportedProgram` in eval mode; not changed.
        example_inputs: a tensor or a tuple of arguments. They give shapes (for multiply-adds in the
            report, and for some layers the only proof that a rewrite is exact) and let
            `torch.export` take over where symbolic tracing fails. Sizes are not baked in. Without
            them nothing is verified, the inputs of convolutions are taken to have a batch
            dimension, and the symbolic trace is believed: code that asks whether it got a tensor
            (`isinstance`, `str(x.device)`), `.data` assigned during the call, and state that shows
            only at the third call or later are not seen.
        strict: raise at the first site that is refused.
        fold_batch_norm: fold batch norm into the convs around it. With False batch norms inside a
            branch stay, with an identity batch norm on the carry, so that the result can be trained
            further (the form of RMNet, arXiv 2111.00687); the branch's last one is always folded.
        activation: how a carry may pass an activation: the strategies allowed, of which the first
            that works is used, in the order "identity", "scale", "per-channel", "odd-pair",
            "shift", "double-relu", "masked" (where `minimise` names a runtime, one that needs no
            activation for each channel if that costs less there). "auto" is all but "odd-pair",
            which costs channels (and counts where a runtime is named),
            "shift", which costs rounding and needs `calibration`, and "double-relu", which costs
            layers. "relu" is those that need the network's own activations and ReLU only: no PReLU,
            no clamp with bounds per channel and no mask is added ("identity", "scale", "odd-pair",
            "shift", "double-relu"). As whoever asks for that may quantise, none has a gain above
            16 there, which 8 bits do not bear; floating point does, and ("relu", "scale"), or
            another one that multiplies beside "relu", allows any. With SiLU, GELU and the like
            around depthwise layers "relu" costs 26 to 32 times the multiply-adds, and the report
            says so. No way is used that the type has no digits for.
        input_range: (low, high) of every input value, if known: it can prove that a carry passes
            an activation unchanged. Values outside it may give wrong results.
        calibration: batches (a tensor or a tuple of arguments each), on which the statistics of the
            identity batch norms are measured (with `fold_batch_norm=False`), and how large values
            are (for "shift").
        differentiable: compute the new weights inside the graph, from the model's own parameters,
            which the result shares: gradients reach them, and every change of theirs counts. Each
            call then pays for that computation. Excludes `fold_batch_norm=False`. The result, or a
            copy of it, may be cast to another type. What puts other tensors in the place of the
            model's own (a cast of the model itself, `load_state_dict(assign=True)`) calls for
            another conversion.
        policy: which sites to rewrite of those that can be: "all"; "profitable", those whose
            multiply-adds and traffic to memory become less (needs example inputs); a function
            that is given the site's row (`rmfx.SiteReport`, with expected costs) and answers; or
            an `rmfx.MeasuredPolicy`, which times each site.
        minimise: what the rewrite is made cheap for: "time", that of CPUs, where a group of few
            channels takes as long as one of 8; "eager", "inductor", "onnxruntime" or "openvino",
            time in that runtime, where activations that differ between channels count, too; or
            "macs", multiply-adds alone, for which layers are taken apart: values get wider.
        copy_shared: whether a call of a layer that several calls share, or whose weights others
            use, may get a copy of its own, which the report names; with False such sites are
            refused. With `differentiable` weights stay shared: each call computes its own of them.
        verify: compare the result with the model, on random inputs of several sizes, before it is
            returned; see `rmfx.verify`. Needs example inputs.

    Returns:
        A new module with the same inputs and outputs; `rmfx.report` tells what was done.

    Raises:
        RefusedError: a site was refused and `strict` was set.
        RmfxError: the model cannot be traced or its weights cannot be used.

    Example:
        >>> import rmfx, torch
        >>> class Block(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.conv1 = torch.nn.Conv2d(4, 4, 3, padding=1)
        ...         self.conv2 = torch.nn.Conv2d(4, 4, 3, padding=1)
        ...     def forward(self, x):
        ...         return x + self.conv2(torch.relu(self.conv1(x)))
        >>> plain = rmfx.remove_residuals(Block().eval())
        >>> [type(m).__name__ for m in plain.children()]
        ['Conv2d', 'PReLU', 'Conv2d']
    """
    check_choice("minimise", minimise, TARGETS)
    check_range(input_range, example_inputs)
    check_policy(policy)
    options = Options(
        strict=strict,
        allowed=allowed_ways(activation, BY_NAME[minimise]),
        input_range=input_range,
        fold_batch_norm=fold_batch_norm,
        weights_vary=differentiable,
        policy=policy,
        minimise=minimise,
        copy_shared=copy_shared,
    )
    source = trace(model, example_inputs, fold=not differentiable)
    batches = CalibrationData(calibration) if calibration is not None else None
    if differentiable:
        _check_differentiable(source, fold_batch_norm=fold_batch_norm)
        converted = _differentiable(model, source, options)
        if verify and example_inputs is not None:
            source = trace(model, example_inputs)  # whose names the report has
    else:
        converted = remove(source, replace(options, calibration=batches))
    seen = batches.first if batches is not None and is_calibrated(converted) else ()
    return checked(
        "remove_residuals",
        model,
        source,
        converted,
        example_inputs,
        wanted=verify,
        domain=Domain(input_range, seen),
        reports=True,
    )


def _check_differentiable(source: fx.GraphModule, *, fold_batch_norm: bool) -> None:
    """Raise OptionError where gradients of the result could not be those of the model."""
    if not fold_batch_norm:
        raise OptionError("differentiable=True needs fold_batch_norm=True")
    if OWN_GRADIENT in source.meta:
        raise OptionError(
            f"{source.meta[OWN_GRADIENT]}: here the code switches gradients off, or has one of "
            "its own, which differentiable=True would lose; convert without it"
        )
    if BAKED in source.meta:
        raise OptionError(
            f"{source.meta[BAKED]}: the code computes with a parameter that it takes out of a "
            "list or a dict, so a trace holds the result of today, which differentiable=True "
            "may not bake; read it as an attribute (self.weight), or export the model first"
        )


def _differentiable(model: Any, source: fx.GraphModule, options: Options) -> fx.GraphModule:
    """The rewritten network, its weights as functions of the model's."""

    def convert(generic: fx.GraphModule) -> fx.GraphModule:
        canonicalise_again(generic)
        return remove(generic, options)

    lifted = find_lifted(model) if isinstance(model, fx.GraphModule) else ()
    return linked(source, convert, lifted)
