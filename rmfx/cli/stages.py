"""The stages of a graph: runs of neighbouring nodes, each small enough for one drawing.

A graph is divided along the paths of its modules, so that a stage is `layer2`, or `layer3.0` to
`layer3.3`. Edges lead from earlier stages to later ones only.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from rmfx.ir.conditions import nodes_of_conditions
from rmfx.ir.names import module_path

LIMIT = 30  # nodes of a stage, which then fits on a sheet of paper


@dataclass(frozen=True)
class Stage:
    """Neighbouring nodes, and what they are called together."""

    title: str
    nodes: list[fx.Node]


def shown_nodes(graph: fx.Graph) -> list[fx.Node]:
    """The nodes that are drawn, in the order in which they run."""
    aside = set(nodes_of_conditions(graph))
    return [node for node in graph.nodes if node.op != "get_attr" and node not in aside]


def divide(nodes: Sequence[fx.Node]) -> list[Stage]:
    """Stages of a graph: neighbours with the same first parts of their module's path together.

    A graph that is no longer than a stage is one.

    Args:
        nodes: in the order in which they run.
    """
    paths: dict[fx.Node, list[str]] = {}
    last = next(filter(None, map(_path, nodes)), [])
    for node in nodes:  # what has no path goes with the node before it
        last = paths[node] = _path(node) or last
    return _divide(nodes, paths, depth=1)


def _divide(
    nodes: Sequence[fx.Node], paths: Mapping[fx.Node, list[str]], depth: int
) -> list[Stage]:
    """The same, of which `depth` parts of the paths are compared."""
    runs = [list(run) for _, run in itertools.groupby(nodes, lambda node: paths[node][:depth])]
    found: list[Stage] = []
    for packed in _pack(runs):
        inside = [node for run in packed for node in run]
        if len(inside) <= LIMIT:
            found.append(Stage(_title(inside, paths, depth), inside))
        elif any(len(paths[node]) > depth for node in inside):
            found += _divide(inside, paths, depth + 1)
        else:  # nothing more is known of these, and they stand in a row
            pieces = (inside[i : i + LIMIT] for i in range(0, len(inside), LIMIT))
            found += [Stage(_title(piece, {}, 0), piece) for piece in pieces]
    return found


def follow(nodes: Iterable[fx.Node], stages: Sequence[Stage]) -> list[list[fx.Node]]:
    """Divide another form of a graph in the same way.

    A node goes with that of its name; one that has none goes with the node before it.

    Args:
        nodes: in the order in which they run.
        stages: of the first form.
    """
    numbers = {node.name: i for i, stage in enumerate(stages) for node in stage.nodes}
    found: list[list[fx.Node]] = [[] for _ in stages]
    current = 0
    for node in nodes:
        current = max(current, numbers.get(node.name, current))  # no edge leads back
        found[current].append(node)
    return found


def _path(node: fx.Node) -> list[str]:
    path = str(node.target) if node.op == "call_module" else module_path(node)
    return path.split(".") if path else []


def _pack(runs: Iterable[list[fx.Node]]) -> list[list[list[fx.Node]]]:
    """Neighbouring runs together, as many as fit into a stage."""
    packs: list[list[list[fx.Node]]] = []
    for run in runs:
        if packs and sum(map(len, packs[-1])) + len(run) <= LIMIT:
            packs[-1].append(run)
        else:
            packs.append([run])
    return packs


def _title(nodes: Sequence[fx.Node], paths: Mapping[fx.Node, list[str]], depth: int) -> str:
    """From where to where nodes go: by their paths or, where none is known, their names."""
    known = [".".join(paths[node][:depth]) for node in nodes if paths.get(node)]
    names = known or [node.name for node in nodes]
    return " – ".join(dict.fromkeys((names[0], names[-1])))
