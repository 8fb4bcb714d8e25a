"""Which node of a result holds the value of which join of the original."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx, nn

from rmfx.ir.kinds import ADDITIVE
from rmfx.ir.names import module_path
from rmfx.report import SiteReport

from .equivalence import operands_of, report_rows


@dataclass(frozen=True)
class Counterpart:
    """A join and its counterpart.

    Attributes:
        name, node: of the nodes before and after.
        place: the path of the module that adds.
        done: what was done there.
        bits: that a carry loses there.
        cut: whether it may have lost channels, so that nothing can be compared.
    """

    name: str
    node: str
    place: str
    done: str = ""
    bits: float = 0.0
    cut: bool = False


def joins_of_report(after: nn.Module) -> list[Counterpart]:
    """The joins of a report that have a counterpart."""
    return [
        Counterpart(row.join, str(row.node), row.place, _done(row), row.bits)
        for row in report_rows(after)
    ]


def _done(row: SiteReport) -> str:
    ways = ", ".join(filter(None, [row.strategy, row.layout]))
    return f" ({row.status}{f'; {ways}' if ways else ''})"


def joins_of_names(source: fx.GraphModule, after: fx.GraphModule) -> list[Counterpart]:
    """The sums of two tensors that both graphs have under the same name."""
    names = {node.name for node in after.graph.nodes if node.target in ADDITIVE}
    return [
        Counterpart(node.name, node.name, module_path(node), cut=True)
        for node in source.graph.nodes
        if node.name in names and node.target in ADDITIVE and len(operands_of(node)) == 2
    ]
