"""Layers that several calls share get weights of their own where a rewrite needs them.

A layer with a carry beside it is another one at each of its calls. In inference a copy computes the
same, so each rewritten call has one; the calls that stay go on sharing what they shared.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from torch import fx, nn

from rmfx.ir.converted import copy_graph
from rmfx.ir.names import free_name
from rmfx.ir.net import Net
from rmfx.ir.nodes import attribute
from rmfx.report import HeldReport


def with_calls_apart(source: fx.GraphModule) -> fx.GraphModule:
    """A graph in which each call of a layer with weights has a path of its own to that layer.

    So has whatever reads one of these weights by itself: the layer may have another one there.
    """
    seen: set[str] = set()
    again = []
    for node in source.graph.find_nodes(op="call_module"):
        target = str(node.target)
        if target in seen and any(True for _ in source.get_submodule(target).parameters()):
            again.append(node.name)
        seen.add(target)
    inside = [
        node.name
        for node in source.graph.find_nodes(op="get_attr")
        if str(node.target).rpartition(".")[0] in seen
        and isinstance(attribute(source, node), nn.Parameter)
    ]
    if not again and not inside:
        return source
    gm = fx.GraphModule(source, copy_graph(source), type(source).__name__)
    gm.meta = dict(source.meta)
    for node in gm.graph.nodes:
        target = str(node.target)
        if node.name in again:
            node.target = free_name(gm, target, set())
            gm.set_submodule(node.target, gm.get_submodule(target))
        elif node.name in inside:
            node.target = free_name(gm, target.replace(".", "_"), set())
            gm.register_parameter(node.target, gm.get_parameter(target))
    gm.recompile()
    return gm


def with_one_path(gm: fx.GraphModule) -> None:
    """Let the calls that still share a layer, and readers of its weights, use one path again."""
    first: dict[int, str] = {}
    changed = False
    paths = {id(p): path for path, p in gm.named_parameters() if "." in path}
    for node in gm.graph.find_nodes(op="get_attr"):
        target = paths.get(id(attribute(gm, node)), str(node.target))
        changed = changed or node.target != target
        node.target = target
    for node in gm.graph.find_nodes(op="call_module"):
        target = first.setdefault(id(gm.get_submodule(str(node.target))), str(node.target))
        changed = changed or node.target != target
        node.target = target
    if changed:
        gm.delete_all_unused_submodules()
        gm.recompile()


def copies_of(net: Net) -> Iterator[HeldReport]:
    """What a result holds apart of layers that share weights in the net's source.

    Args:
        net: whose rules are done, but not yet its result.
    """
    stays = {str(n.target) for n in net.graph.nodes if net.module(n) is not None}
    calls, readers = _readers(net.source)
    for paths in calls.values():
        parameters = list(net.source.get_submodule(paths[0]).parameters())
        both = {reader for p in parameters for reader in readers[id(p)]}
        apart = [path for path in paths if path not in stays]
        if apart and len(both) > 1:
            shared = f"{len(paths)} calls" if both == {*paths} else " and ".join(sorted(both))
            own = "each has its own" if apart == paths else f"{' and '.join(apart)} has its own"
            yield HeldReport(paths[0], f"{shared} share its weights; here {own}")


def _readers(source: fx.GraphModule) -> tuple[dict[int, list[str]], dict[int, set[str]]]:
    """The paths by which a graph calls each layer, and by which it reads each parameter."""
    calls: dict[int, list[str]] = defaultdict(list)
    readers: dict[int, set[str]] = defaultdict(set)
    for node in source.graph.nodes:
        target = str(node.target)
        if node.op == "call_module":
            module = source.get_submodule(target)
            calls[id(module)].append(target)
            for p in module.parameters():
                readers[id(p)].add(target)
        elif node.op == "get_attr":
            readers[id(attribute(source, node))].add(target)
    return calls, readers
