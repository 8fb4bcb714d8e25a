"""Layers that can be pruned whole, by the factors of ResConv.

`rmfx.rules.res_conv` has their algebra; here it is chosen which layers go, and reported.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx, nn

from rmfx.analysis.ranges import Ranges
from rmfx.errors import OptionError, Refusal, ShapeError
from rmfx.frontend.tracing import trace
from rmfx.ir.driver import apply_rule
from rmfx.ir.net import Net
from rmfx.ir.notes import shape_of
from rmfx.ir.undisturbed import undisturbed
from rmfx.modules.factors import Carried, ResConv
from rmfx.options import is_named, number_of, patterns_of, typed
from rmfx.oracle.verification import checked
from rmfx.removal.merge import merge
from rmfx.report import META_KEY
from rmfx.rules.linear import LinearRule
from rmfx.rules.res_conv import (
    FixedRule,
    ScaleRule,
    find_gates,
    find_normed,
    insert_factors,
    is_conv,
    macs_of,
    remove_layer,
    score,
    write_out,
)
from rmfx.table import Column, Record, short, table

PROTECTED = "protected"


@dataclass(frozen=True)
class LayerRow:
    """One convolution.

    Attributes:
        place: its path.
        score: |s|·mean|γ / √(v + ε)|, |s|·mean|β| if γ is 0, None where it has no factors.
        macs: multiply-adds it takes.
        removed: whether it went.
        reason: why it has no factors, or stays.
    """

    place: str
    score: float | None
    macs: int
    removed: bool = False
    reason: str = ""


@dataclass(frozen=True)
class LayerReport(Record):
    """What `insert_resconv` or `prune_layers` did. `str()` gives a table, `to_dict` JSON's types.

    Attributes:
        layers: in the order of the network.
    """

    layers: tuple[LayerRow, ...]

    @property
    def removed(self) -> int:
        """How many went."""
        return sum(row.removed for row in self.layers)

    @property
    def macs(self) -> int:
        """Multiply-adds of those that stay."""
        return sum(row.macs for row in self.layers if not row.removed)

    def __str__(self) -> str:
        total = f"{self.removed} of {len(self.layers)} removed, {short(self.macs)} multiply-adds"
        return f"{table(self.layers, _COLUMNS)}\n{total}"


_COLUMNS = (
    Column("layer", "place"),
    Column("score", "score", ".4f", right=True),
    Column("multiply-adds", "macs", short, right=True),
    Column("", lambda row: "removed" if row.removed else row.reason),
)


# ---- the verbs ----------------------------------------------------------------------------------
@undisturbed
def insert_resconv(
    model: nn.Module | Any,
    example_inputs: Any,
    *,
    scale: float = 1.0,
    carry: float = 0.5,
    layers: str | Sequence[str] = ("*",),
) -> tuple[fx.GraphModule, LayerReport]:
    """Put a shortcut with trainable factors around every convolution that can have one.

    It can have one if batch norm alone reads it, it has as many output as input channels, and its
    kernel is odd and padded evenly around its middle.

    Args:
        model: `nn.Module`, `GraphModule` or `ExportedProgram` in eval mode; not changed.
        example_inputs: a tensor or a tuple of arguments.
        scale: s at the start.
        carry: a at the start, above 0. The smaller, the less a trained network changes.
        layers: patterns such as "layer4.*" of the paths of convolutions.

    Returns:
        A network to be trained, and a report of all convolutions.

    Raises:
        OptionError: `carry` is not above 0, or a pattern is of no convolution.
        ShapeError: there are no example inputs, which the report needs.
        RmfxError: the model cannot be traced or its weights cannot be used.

    Example:
        >>> import rmfx, torch
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Conv2d(4, 4, 3, padding=1), torch.nn.BatchNorm2d(4), torch.nn.ReLU()
        ... ).eval()
        >>> net, report = rmfx.insert_resconv(model, torch.randn(1, 4, 8, 8))
        >>> [type(m).__name__ for m in net.children()]
        ['Conv2d', 'BatchNorm2d', 'ResConv', 'ReLU']
    """
    carry = number_of("carry", carry, above=0, below=math.inf)
    scale = number_of("scale", scale, above=-math.inf, below=math.inf)
    net = _net_of(model, example_inputs, "insert_resconv")
    convs = [str(node.target) for node in net.graph.nodes if is_conv(net, node)]
    if convs:
        layers = patterns_of("layers", layers, convs)
    rows = []
    for node in list(net.graph.nodes):
        if not is_conv(net, node):
            continue
        named = is_named(str(node.target), layers)
        found = find_normed(net, node) if named else Refusal("not named")
        if not isinstance(found, Refusal):
            insert_factors(net, found, scale, carry)
        reason = found.reason if isinstance(found, Refusal) else ""
        rows.append(LayerRow(str(node.target), None, macs_of(net, node), reason=reason))
    return net.finish(), LayerReport(tuple(rows))


@undisturbed
def prune_layers(
    model: nn.Module | Any,
    example_inputs: Any,
    *,
    ratio: float | None = None,
    threshold: float | None = None,
    budget: float | None = None,
    protect: str | Sequence[str] = (),
) -> tuple[fx.GraphModule, LayerReport]:
    """Remove the convolutions with ResConv factors that matter least.

    Exact where s is 0; elsewhere what the convolution gave is lost, and training on makes up for
    it. At least one such convolution stays of all that give the same channels at the same size.

    Args:
        model: with what `insert_resconv` put there, in eval mode; not changed.
        example_inputs: a tensor or a tuple of arguments.
        ratio: share of those that can go; or
        threshold: up to which score they go; or
        budget: multiply-adds that all convolutions may take on the example inputs.
        protect: patterns of paths of convolutions that stay.

    Returns:
        The shorter network, with factors still to be trained, and a report.

    Raises:
        OptionError: not one of the three is given, it makes no sense or cannot be reached.
        ShapeError: there are no example inputs.
        RmfxError: the model cannot be traced or its weights cannot be used.
    """
    _check(ratio, threshold, budget)
    net = _net_of(model, example_inputs, "prune_layers")
    gates = find_gates(net)
    rows = [
        LayerRow(str(conv.target), score(net, gates.get(conv)), macs_of(net, conv))
        for conv in net.graph.nodes
        if is_conv(net, conv)
    ]
    reasons = _reasons_to_stay(net, gates, protect)
    gone, last = _choose(gates, rows, reasons, (ratio, threshold, budget))
    reasons |= dict.fromkeys(last, "the last of its stage")
    for conv, gate in gates.items():
        if str(conv.target) in gone:
            remove_layer(net, gate)
    told = (
        replace(row, removed=row.place in gone, reason=reasons.get(row.place, "")) for row in rows
    )
    return net.finish(), LayerReport(tuple(told))


@undisturbed
def fuse_resconv(
    model: nn.Module | Any, example_inputs: Any = None, *, verify: bool = True
) -> fx.GraphModule:
    """Merge convolutions with their batch norms, factors and shortcuts, for deployment.

    Args:
        model: with what `insert_resconv` put there, pruned or not, in eval mode; not changed.
        example_inputs: a tensor or a tuple of arguments.
        verify: compare the result with the model, on random inputs of several sizes, before it is
            returned; see `rmfx.verify`. Needs example inputs.

    Returns:
        A network of ordinary layers that computes the same. Where a layer went before an activation
        that bends elsewhere than at 0, such as SiLU, its factor may stay as a product.

    Raises:
        RmfxError: the model cannot be traced or its weights cannot be used.
    """
    net = Net(trace(model, example_inputs))
    source = net.source
    for node in list(net.graph.nodes):
        if isinstance(net.module(node), Carried):
            write_out(net, node)
    apply_rule(net, FixedRule(Ranges(net)))
    # A sum has to be one layer before a factor can go through the activation behind it.
    merged = merge(trace(net.finish(), example_inputs))
    net = Net(trace(merged, example_inputs))
    apply_rule(net, ScaleRule())
    net = Net(trace(net.finish(), example_inputs))
    apply_rule(net, LinearRule())
    fused = net.finish()
    fused.meta.pop(META_KEY, None)  # it names the additions that were written out above
    return checked("fuse_resconv", model, source, fused, example_inputs, wanted=verify)


@typed
def layer_scales(model: nn.Module) -> list[Tensor]:
    """The factors s of a network, for `rmfx.training.Slimming`."""
    return [module.scale for module in model.modules() if isinstance(module, ResConv)]


# ---- putting factors there ----------------------------------------------------------------------
def _net_of(model: Any, example_inputs: Any, verb: str) -> Net:
    if example_inputs is None:
        raise ShapeError(f"{verb} needs example inputs: it counts multiply-adds")
    net = Net(trace(model, example_inputs))
    net.sweep()
    return net


# ---- removing layers ----------------------------------------------------------------------------
def _check(ratio: float | None, threshold: float | None, budget: float | None) -> None:
    given = {"ratio": ratio, "threshold": threshold, "budget": budget}
    if sum(value is not None for value in given.values()) != 1:
        raise OptionError("give one of ratio=, threshold= and budget=")
    for name, value in given.items():
        if value is not None:
            number_of(name, value, least=0, most=1 if name == "ratio" else math.inf)


def _reasons_to_stay(
    net: Net, gates: dict[fx.Node, fx.Node], protect: str | Sequence[str]
) -> dict[str, str]:
    reasons = {}
    convs = [node for node in net.graph.nodes if is_conv(net, node)]
    protect = patterns_of("protect", protect, [str(conv.target) for conv in convs])
    for conv in convs:
        place = str(conv.target)
        factors: Any = net.module(gates[conv]) if conv in gates else None
        if factors is None:
            reasons[place] = "has no factors"
        elif max(factors.stride) > 1:
            reasons[place] = "has a stride"
        elif is_named(place, protect):
            reasons[place] = PROTECTED
    return reasons


def _choose(
    gates: dict[fx.Node, fx.Node],
    rows: Sequence[LayerRow],
    fixed: Mapping[str, str],
    wanted: tuple[float | None, float | None, float | None],
) -> tuple[set[str], set[str]]:
    """Which go, the least first, and which would but are the last of their stages."""
    ratio, threshold, budget = wanted
    stage = {str(conv.target): tuple(shape_of(conv)[1:]) for conv in gates}
    free = [row for row in rows if row.place not in fixed]
    # One that is protected counts as well, one with a stride does not.
    left = Counter(stage[place] for place in stage if fixed.get(place) in (None, PROTECTED))
    macs = sum(row.macs for row in rows)
    gone: set[str] = set()
    last: set[str] = set()
    for row in sorted(free, key=lambda row: row.score or 0.0):
        if (
            (ratio is not None and len(gone) >= round(ratio * len(free)))
            or (threshold is not None and (row.score or 0.0) > threshold)
            or (budget is not None and macs <= budget)
        ):
            break
        if left[stage[row.place]] == 1:
            last.add(row.place)
            continue
        left[stage[row.place]] -= 1
        macs -= row.macs
        gone.add(row.place)
    if budget is not None and macs > budget:
        raise OptionError(f"budget={budget!r}: without all layers that can go it is {macs}")
    return gone, last
