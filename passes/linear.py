"""Merging of linear layers in a row: outer ∘ inner is one layer where no border comes between.

A maximal chain of linear layers (convs, Linear, batch norm, constant scales, average pools, crops,
zero padding) is cut into segments by dynamic programming: every segment becomes one layer, and the
cheapest cut wins. Cost is multiply-adds per position of the chain's input, then parameters; with
`policy="all"` the number of layers comes first.

Refused: an outer layer that pads with zeros what the inner one would fill with its bias, or where
the inner kernel would still see its input; a value that is also read elsewhere; shared, tied,
hooked or parametrized layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from rmfx._affine import AffineConv
from rmfx._algebra import compose
from rmfx._calls import BATCH_NORMS
from rmfx._errors import OptionError, Refusal
from rmfx._graph import Net, Virtual, positions
from rmfx._layers import input_of, read_affine
from rmfx._names import module_path
from rmfx._policy import Policy, check_policy
from rmfx._rewrite import apply_rule
from rmfx._rows import expense_of
from rmfx._selections import may_select
from rmfx._site import weight_types
from rmfx._state import undisturbed
from rmfx._verification import checked
from rmfx.frontend import trace
from rmfx.measured import MeasuredPolicy
from rmfx.report import SiteReport

Cost = tuple[float, ...]
Segment = tuple[int, int, AffineConv]


@dataclass(frozen=True, eq=False)
class Cut:
    """A chain of linear nodes, and the segments that become one layer each."""

    nodes: list[fx.Node]
    segments: list[Segment]


class LinearRule:
    """Merge a maximal chain of linear layers into the cheapest equivalent chain."""

    def __init__(
        self,
        *,
        policy: Policy = "profitable",
        keep_norms: bool = False,
        concerns: Callable[[fx.Node], bool] = lambda node: True,
    ) -> None:
        self._policy = policy
        self._keep_norms = keep_norms
        self._concerns = concerns

    def match(self, net: Net, node: fx.Node) -> Cut | Refusal | None:
        before = input_of(node)
        if before is None or (len(before.users) == 1 and self._is_linear(net, before)):
            return None
        if not self._is_linear(net, node):
            return None
        nodes = self._chain_from(net, node)
        if len(nodes) < 2 or not any(map(self._concerns, nodes)):
            return None
        if len(weight_types(net, nodes)) != 1:
            return None
        segments, refusal = self._cheapest([affine_at(net, n) for n in nodes])
        if len(segments) == len(nodes):
            return refusal.at(*(n.name for n in nodes)) if refusal else None
        if callable(self._policy) and not self._policy(_row(net, nodes, segments)):
            return Refusal("kept by the policy", by_choice=True)
        return Cut(nodes, segments)

    def rewrite(self, net: Net, node: fx.Node, match: Cut) -> None:
        kind = weight_types(net, match.nodes).pop()
        for begin, end, layer in match.segments:
            first = match.nodes[begin]
            for second in match.nodes[begin + 1 : end]:
                net.merge(first, second, Virtual(layer, *kind))

    def _is_linear(self, net: Net, node: fx.Node) -> bool:
        module = net.replacement(node) or net.module(node)
        if self._keep_norms and type(module) in BATCH_NORMS:
            return False
        if may_select(net, node):  # costs nothing, and would make a grouped layer dense
            return False
        return isinstance(read_affine(net, node), AffineConv)

    def _chain_from(self, net: Net, node: fx.Node) -> list[fx.Node]:
        nodes = [node]
        while len(nodes[-1].users) == 1:
            after = next(iter(nodes[-1].users))
            if input_of(after) is not nodes[-1] or not self._is_linear(net, after):
                break
            nodes.append(after)
        return nodes

    def _cheapest(
        self, layers: list[AffineConv]
    ) -> tuple[list[tuple[int, int, AffineConv]], Refusal | None]:
        """Best cut of a chain; best[i] covers the first i layers."""
        area = [1.0]
        for layer in layers:
            area.append(area[-1] / math.prod(layer.stride))
        best: list[tuple[Cost, list[tuple[int, int, AffineConv]]]] = [((0.0,) * 3, [])]
        best += [((math.inf,) * 3, [])] * len(layers)
        refusal = None
        for begin, first in enumerate(layers):
            merged: AffineConv | Refusal = first
            for end in range(begin + 1, len(layers) + 1):
                if end > begin + 1 and isinstance(merged, AffineConv):
                    merged = compose(layers[end - 1], merged)
                if isinstance(merged, Refusal):
                    refusal = merged
                    break
                cost = self._cost(merged, area[end])
                total = tuple(a + b for a, b in zip(best[begin][0], cost, strict=True))
                if total < best[end][0]:
                    best[end] = (total, [*best[begin][1], (begin, end, merged)])
        return best[-1][1], refusal

    def _cost(self, layer: AffineConv, area: float) -> Cost:
        work, size = layer.multiply_adds() * area, float(layer.weight.numel())
        return (1.0, work, size) if self._policy == "all" else (work, 1.0, size)


def affine_at(net: Net, node: fx.Node) -> AffineConv:
    """A node that is known to be linear, as a layer."""
    layer = read_affine(net, node)
    if isinstance(layer, Refusal):
        raise TypeError(f"{node.name} is not linear: {layer}")
    return layer


def _row(net: Net, nodes: Sequence[fx.Node], segments: Sequence[Segment]) -> SiteReport:
    """A chain as a row of the report: what it costs, and what its segments would."""
    last = nodes[-1]
    dims = segments[0][2].dims
    before = expense_of(net, nodes, dims)
    after = [
        (layer, positions(nodes[end - 1].meta.get("shape"), dims)) for _, end, layer in segments
    ]
    macs = [layer.multiply_adds(count) for layer, count in after if count is not None]
    return SiteReport(
        place=module_path(last),
        source=last.meta.get("source"),
        join=last.name,
        node=None,
        status="removed",
        strategy="linear",
        exactness="rounding",
        gain=1.0,
        layout=f"{len(nodes)} layers as {len(segments)}",
        shape=last.meta.get("shape"),
        macs_before=before.macs,
        macs_after=sum(macs) if len(macs) == len(after) else None,
        params_before=before.parameters,
        params_after=sum(layer.weight.numel() + layer.out_channels for layer, _ in after),
    )


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
