"""Linear layers in a row are one layer where no border comes between.

    (outer ∘ inner)(x)  =  W₂·(W₁·x + b₁) + b₂  =  (W₂·W₁)·x + (W₂·b₁ + b₂)

with · the convolution of kernels; strides multiply, and dilation, padding and groups follow from
both layers (`rmfx.algebra.products`). A maximal chain of linear layers (convs, Linear, batch norm,
constant scales, average pools, crops, zero padding) is cut into segments by dynamic
programming: every segment becomes one layer, and the cheapest cut wins. Cost is multiply-adds per
position of the chain's input, then layers, then parameters; with `policy="all"` layers come first.

Refused: an outer layer that pads with zeros what the inner one would fill with its bias, or where
the inner kernel would still see its input. Where a chain ends: at a value that is also read
elsewhere; at shared, tied, hooked or parametrized layers; at selections of channels, which cost
nothing and would make a grouped layer dense. Chains of weights of several types stay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import fx

from rmfx.algebra.affine import AffineConv
from rmfx.algebra.products import Unmerged, unmerged
from rmfx.analysis.multiply_adds import Expense, expense_of
from rmfx.errors import Refusal, RmfxError
from rmfx.ir.elements import Virtual
from rmfx.ir.kinds import BATCH_NORMS
from rmfx.ir.names import module_path
from rmfx.ir.net import Net
from rmfx.ir.nodes import input_of
from rmfx.ir.notes import SOURCE, positions, shape_of
from rmfx.ir.reading import demands_of, read_affine
from rmfx.ir.selections import may_select
from rmfx.ir.weights import weight_types
from rmfx.report import SiteReport

# Multiply-adds in the time that it takes to read a value and to write it elsewhere.
MOVING = 8.0
Cost = tuple[float, ...]
Segment = tuple[int, int, AffineConv]
# The fewest layers, the least work, or a function of the row that the report would have.
Choice = Literal["all", "profitable"] | Callable[[SiteReport], bool]


@dataclass(frozen=True, eq=False)
class Cut:
    """A chain of linear nodes, and the segments that become one layer each."""

    nodes: list[fx.Node]
    segments: list[Segment]


class LinearRule:
    """Merge a maximal chain of linear layers into the cheapest equivalent chain.

    With `keep_orders=False` a chain does not end at selections of channels.

    Attributes:
        saved: the nodes of each chain that was merged, and what they cost less (or more) than it.
    """

    def __init__(
        self,
        *,
        policy: Choice = "profitable",
        keep_norms: bool = False,
        keep_orders: bool = True,
        concerns: Callable[[fx.Node], bool] = lambda node: True,
    ) -> None:
        self._policy = policy
        self._keep_norms = keep_norms
        self._keep_orders = keep_orders
        self._concerns = concerns
        self.saved: list[tuple[frozenset[fx.Node], Expense]] = []

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
        moves = [net.callee(n) is None for n in nodes]  # functions: paddings, slices
        segments, refusal = self._cheapest([affine_at(net, n) for n in nodes], moves)
        if len(segments) == len(nodes):
            return refusal.at(*(n.name for n in nodes)) if refusal else None
        if callable(self._policy) and not self._policy(_row(net, nodes, segments)):
            return Refusal("kept by the policy", by_choice=True)
        return Cut(nodes, segments)

    def rewrite(self, net: Net, node: fx.Node, match: Cut) -> None:
        kind = weight_types(net, match.nodes).pop()
        before = expense_of(net, match.nodes)
        for begin, end, shape in match.segments:
            layer = shape.merged() if isinstance(shape, Unmerged) else shape
            if isinstance(layer, Refusal):  # its shape was found by the same laws
                raise RmfxError(f"{node.name}: planned layers do not merge: {layer.reason}")
            first = match.nodes[begin]
            for second in match.nodes[begin + 1 : end]:
                net.merge(first, second, Virtual(layer, *kind), demands_of(net, (first, second)))
        after = expense_of(net, [match.nodes[begin] for begin, _, _ in match.segments])
        self.saved.append((frozenset(match.nodes), after - before))

    def _is_linear(self, net: Net, node: fx.Node) -> bool:
        module = net.callee(node)
        if self._keep_norms and type(module) in BATCH_NORMS:
            return False
        # It costs nothing, and would make a grouped layer dense.
        if self._keep_orders and may_select(net, node):
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
        self, layers: list[AffineConv], moves: list[bool]
    ) -> tuple[list[tuple[int, int, AffineConv]], Refusal | None]:
        """Best cut of a chain, by shapes; best[i] covers the first i layers."""
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
                    merged = unmerged([merged, layers[end - 1]])
                if isinstance(merged, Refusal):
                    refusal = merged
                    break
                cost = self._cost(merged, area[end])
                if end == begin + 1 and moves[begin]:
                    cost = self._cost_of_moving(merged, area[end])
                total = tuple(a + b for a, b in zip(best[begin][0], cost, strict=True))
                if total < best[end][0]:
                    best[end] = (total, [*best[begin][1], (begin, end, merged)])
        return best[-1][1], refusal

    def _cost(self, layer: AffineConv, area: float) -> Cost:
        work, size = layer.multiply_adds() * area, float(layer.weight.numel())
        return (1.0, work, size) if self._policy == "all" else (work, 1.0, size)

    def _cost_of_moving(self, layer: AffineConv, area: float) -> Cost:
        work = min(MOVING * layer.out_channels, layer.multiply_adds()) * area
        return (1.0, work, 0.0) if self._policy == "all" else (work, 1.0, 0.0)


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
    before = expense_of(net, nodes)
    after = [(layer, positions(shape_of(nodes[end - 1]), dims)) for _, end, layer in segments]
    macs = [layer.multiply_adds(count) for layer, count in after if count is not None]
    return SiteReport(
        place=module_path(last),
        source=last.meta.get(SOURCE),
        join=last.name,
        node=None,
        status="removed",
        strategy="linear",
        exactness="rounding",
        gain=1.0,
        layout=f"{len(nodes)} layers as {len(segments)}",
        shape=shape_of(last),
        macs_before=before.macs,
        macs_after=sum(macs) if len(macs) == len(after) else None,
        params_before=before.parameters,
        params_after=sum(layer.weight.numel() + layer.out_channels for layer, _ in after),
    )
