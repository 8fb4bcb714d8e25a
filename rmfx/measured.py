"""A policy that times each site, before and after, instead of believing a model of costs.

    policy = rmfx.MeasuredPolicy("inductor", cache="timings.json")
    plain = rmfx.remove_residuals(model, example_inputs, policy=policy)

A site is cut out of the network as it stands (what lies inside it is rewritten already), run on
random inputs of its real shapes, rewritten by `remove_residuals` and run again, in turn. Sites that
are alike are timed once; with a cache file once for ever, on this machine and these versions.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from ._activation import Blockwise
from ._errors import Refusal
from ._graph import Net, Virtual, data_input
from ._timer import Timer

if TYPE_CHECKING:
    from ._site import Site

Ratio = tuple[float, float, float]


class MeasuredPolicy:
    """Rewrites the sites that become faster, by measurement.

    Args:
        runtime: "eager", "inductor", "onnxruntime" or "openvino".
        cache: a JSON file for the timings, read if it is there and written after each.
        threads: for one inference; by default torch's.
        rounds: how often each form of a site is timed.
        seconds: how long each timing takes at least.
        step: called with a few words before each site is timed.
    """

    def __init__(
        self,
        runtime: str = "inductor",
        *,
        cache: str | Path | None = None,
        threads: int | None = None,
        rounds: int = 9,
        seconds: float = 0.05,
        step: Callable[[str], object] = lambda text: None,
    ) -> None:
        self.runtime = runtime
        self._timer = Timer(runtime, cache, threads, rounds, seconds, step)

    @property
    def timings(self) -> dict[str, Ratio]:
        """Median ratio after/before and quartiles, by a hash of site, shapes and runtime."""
        return self._timer.known

    def reason_to_keep(self, net: Net, site: Site) -> Refusal | None:
        """Why a site stays, None if it goes."""
        alone = cut_out(net, site)
        if alone is None:
            return Refusal("its shapes are unknown; pass example_inputs", by_choice=True)
        ratio, _, _ = self._timing(site.join.name, *alone)
        if ratio < 1:
            return None
        cause = f"{ratio:.2f} times the time in {self.runtime}, measured alone"
        return Refusal(f"it would not pay: {cause}", by_choice=True)

    def _timing(self, name: str, before: fx.GraphModule, inputs: tuple[Tensor, ...]) -> Ratio:
        told = looks(before, inputs)
        median, low, high = self._timer.once(name, told, lambda: self._measure(before, inputs))
        return median, low, high

    def _measure(self, before: fx.GraphModule, inputs: tuple[Tensor, ...]) -> Ratio:
        # These need the package to be there, which imports this file.
        from .latency import ratio_of
        from .passes.noop import remove_noops
        from .passes.residual import remove_residuals

        # Both are made by a pass: what that puts around a network takes time itself.
        forms = [verb(before, inputs, verify=False) for verb in (remove_noops, remove_residuals)]
        return ratio_of(*self._timer.times(forms, inputs))


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
    shape, kind = node.meta.get("shape"), node.meta.get("dtype")
    if shape is None or None in shape or kind is None:
        return None
    if not kind[0].is_floating_point:  # a choice, an index
        return torch.randint(0, 2, shape, dtype=kind[0], device=kind[1])
    return torch.randn(shape, dtype=kind[0], device=kind[1])


def _modules(net: Net, node: fx.Node) -> tuple[nn.Module, ...]:
    """What a node calls; a virtual layer may be a padding and a conv."""
    made = net.replacement(node)
    if not isinstance(made, Virtual):
        module = made or net.module(node)
        return () if module is None else (module,)
    if isinstance(made.layer, Blockwise):
        return (made.layer.to_module(made.dtype, made.device),)
    return made.layer.to_modules(made.dtype, made.device)
