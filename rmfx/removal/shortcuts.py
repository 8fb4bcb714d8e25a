"""Shortcuts that may be cut, and networks without them: the branch alone is left of a sum."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx

from rmfx.errors import Refusal
from rmfx.ir.joins import read_join
from rmfx.ir.net import Net
from rmfx.report import META_KEY

from .site import Site, find_sites, innermost


@dataclass(frozen=True, eq=False)
class Candidate:
    """A site, and which operand of its join is left when it is cut, None if it cannot be."""

    site: Site
    main: int | None


def candidates_of(net: Net, *, can_cut: bool) -> list[Candidate]:
    """The sites of a net, the innermost of each join."""
    found = []
    for node in net.graph.nodes:
        sites = find_sites(net, node, keep_norms=False)
        if isinstance(sites, list):
            site = innermost(sites)
            found.append(Candidate(site, _main_operand(site) if can_cut else None))
    return found


def _main_operand(site: Site) -> int | None:
    """Which operand of a join is its branch, where the other one is a shortcut."""
    terms = read_join(site.join)
    if terms is None or isinstance(terms, Refusal) or any(factor != 1 for _, factor in terms):
        return None
    return None if site.shortcut is None else 1 - site.shortcut


def without(source: fx.GraphModule, candidates: Iterable[Candidate]) -> fx.GraphModule:
    """A graph with the shortcuts of some sites cut."""
    net = Net(source)
    nodes = {node.name: node for node in net.graph.nodes}
    for candidate in candidates:
        join = nodes[candidate.site.join.name]
        join.replace_all_uses_with(_operands(join)[candidate.main or 0])
    gm = net.finish()
    gm.meta.pop(META_KEY, None)
    return gm


def branch_alone(graph: fx.GraphModule, main: int) -> fx.GraphModule:
    """A site that was cut out, without its shortcut."""
    net = Net(graph)
    (output,) = (node for node in net.graph.nodes if node.op == "output")
    join = output.all_input_nodes[0]
    join.replace_all_uses_with(_operands(join)[main])
    return net.finish()


def _operands(join: fx.Node) -> list[fx.Node]:
    given = (*join.args, *(join.kwargs.get(name) for name in ("input", "other")))
    return [value for value in given if isinstance(value, fx.Node)]
