"""A site as a network of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from rmfx.ir.elements import Virtual
from rmfx.ir.net import Net
from rmfx.ir.nodes import data_input
from rmfx.ir.notes import shape_of, type_of

from .site import Site


def looks(gm: fx.GraphModule, inputs: tuple[Tensor, ...]) -> tuple[object, ...]:
    """What two graphs that take the same time have in common."""
    layers = [str(m) for m in gm.modules() if not list(m.children())]
    return gm.code, layers, [(tuple(x.shape), str(x.dtype)) for x in inputs]


def cut_out(net: Net, site: Site) -> tuple[fx.GraphModule, tuple[Tensor, ...]] | None:
    """A site as a network of its own, with random inputs; None where shapes are unknown.

    Names are those of the places, so that sites that are alike give equal code.
    """
    graph = fx.Graph()
    root: dict[str, Any] = {}
    places: dict[fx.Node, fx.Node] = {}
    nodes = sorted(dict.fromkeys(site.nodes))
    read = dict.fromkeys(n for node in nodes for n in node.all_input_nodes if n not in nodes)
    inputs = {node: _example(node) for node in read if node.op != "get_attr"}
    found = [x for x in inputs.values() if x is not None]
    if len(found) < len(inputs):
        return None
    for i, outer in enumerate(inputs):
        places[outer] = graph.placeholder(f"x{i}")
    for i, node in enumerate([n for n in read if n.op == "get_attr"] + nodes):
        if node.op == "call_module":
            here = places[data_input(node)]
            for j, module in enumerate(_modules(net, node)):
                root[f"t{i}_{j}"] = module
                here = graph.call_module(f"t{i}_{j}", (here,))
            places[node] = here
            continue
        copied = places[node] = graph.node_copy(node, lambda n: places[n])
        copied.name = f"n{i}"
        if node.op == "get_attr":
            copied.target = f"t{i}"
            root[f"t{i}"] = net.attribute(node)
    graph.output(places[site.join])
    return fx.GraphModule(root, graph).eval(), tuple(found)


def _example(node: fx.Node) -> Tensor | None:
    shape, kind = shape_of(node), type_of(node)
    if shape is None or None in shape or kind is None:
        return None
    if not kind[0].is_floating_point:  # a choice, an index
        return torch.randint(0, 2, shape, dtype=kind[0], device=kind[1])
    return torch.randn(shape, dtype=kind[0], device=kind[1])


def _modules(net: Net, node: fx.Node) -> tuple[nn.Module, ...]:
    """What a node calls; a virtual layer may be a padding and a conv."""
    made = net.callee(node)
    if not isinstance(made, Virtual):
        return () if made is None else (made,)
    return made.modules()
