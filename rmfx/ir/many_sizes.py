"""A graph run at many sizes of its inputs at once, without values.

Each node is looked at once for all of them: what common layers do follows from their laws, which is
little arithmetic for each size; the rest runs on tensors without values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from rmfx.algebra.affine import CONVS
from rmfx.errors import ShapeError

from .kinds import BATCH_NORMS
from .shapes import COMBINING, Law, Shape, Unmade, Weights, WithoutValues, combined, law_of
from .threads import FAKES, without_logs

Shapes = dict[str, Shape]
Values = list[Any]  # one for each size

# What a network's operations raise at sizes that they do not take.
FAILURES = (
    *(RuntimeError, TypeError, ValueError, AssertionError),
    *(AttributeError, LookupError, ArithmeticError),
    ShapeError,  # of its conditions
)


class ManySizes:
    """Runs a graph, which stays as it is for as long as this is asked."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self._gm = gm
        self._modules = dict(gm.named_modules(remove_duplicate=False))
        self._laws: dict[str, Law | None] = {}

    def run(self, inputs: Sequence[Callable[[], Values]], weights: Weights) -> list[Shapes | None]:
        """The shapes of all values for each of some inputs, None where the graph fails.

        Args:
            inputs: give the values of all placeholders.
            weights: what stands for the model's tensors.
        """
        with without_logs(FAKES), weights.mode, torch.no_grad():
            return _Run(self, list(map(_given, inputs)), weights).shapes()

    def module(self, node: fx.Node) -> nn.Module | None:
        """The layer that a node calls."""
        return self._modules.get(str(node.target)) if node.op == "call_module" else None

    def law(self, node: fx.Node) -> Law | None:
        """The law of the layer that a node calls, if its value is all that this reads."""
        module = self.module(node)
        if module is None or len(node.args) != 1 or node.kwargs:
            return None
        name = str(node.target)
        if name not in self._laws:
            self._laws[name] = law_of(module)
        return self._laws[name]


class _Run:
    """One run at some sizes."""

    def __init__(self, graph: ManySizes, inputs: Sequence[Values | None], weights: Weights) -> None:
        self._graph, self._inputs = graph, inputs
        self._interpreter = WithoutValues(graph._gm, weights)
        self._values: dict[fx.Node, Values] = {}

    def shapes(self) -> list[Shapes | None]:
        found: list[Shapes | None] = [None if given is None else {} for given in self._inputs]
        nodes = self._graph._gm.graph.nodes
        places = {node: i for i, node in enumerate(n for n in nodes if n.op == "placeholder")}
        for node in nodes:
            value_at = self._way(node, places)
            values: Values = [None] * len(found)
            for i, shapes in enumerate(found):
                if shapes is None:
                    continue
                try:
                    value = values[i] = value_at(i)
                except FAILURES:
                    found[i] = None
                    continue
                if isinstance(value, Tensor | Unmade):
                    shapes[node.name] = tuple(value.shape)
            self._values[node] = values
            if not any(shapes is not None for shapes in found):
                break
        return found

    def _way(self, node: fx.Node, places: dict[fx.Node, int]) -> Callable[[int], Any]:
        """How a node's value follows at each of the sizes."""
        if node.op == "placeholder":
            place = places[node]
            return lambda i: (self._inputs[i] or ())[place]
        if node.op == "call_module":
            module, law = self._graph.module(node), self._graph.law(node)
            read = node.args[0] if len(node.args) == 1 and not node.kwargs else None
            if isinstance(read, fx.Node):
                return lambda i: self._behind_layer(node, module, law, self._values[read][i], i)
        if node.target in COMBINING and len(node.args) == 2 and not node.kwargs:
            return lambda i: self._combined(node, i)
        return lambda i: self._ran(node, i)

    def _behind_layer(
        self, node: fx.Node, module: Any, law: Law | None, read: Any, index: int
    ) -> Any:
        if not isinstance(read, Tensor | Unmade):
            return self._ran(node, index)
        shape = tuple(read.shape)
        found = law(shape, read.dtype) if law else None
        if found is not None:
            return read if found == shape else _behind(read, found)
        if _does_not_fit(module, shape):
            raise ShapeError(f"{node.target} reads other channels")
        return self._interpreter.call_layer(module, (_made(read),), {})

    def _combined(self, node: fx.Node, index: int) -> Any:
        x: Any
        x, y = fx.node.map_arg(node.args, lambda read: self._values[read][index])
        shape = combined(x, y)
        if shape is None:
            return self._ran(node, index)
        return x if shape == tuple(x.shape) else _behind(x, shape)

    def _ran(self, node: fx.Node, index: int) -> Any:
        """The value of a node that is run."""
        args, kwargs = (
            fx.node.map_arg(given, lambda read: _made(self._values[read][index]))
            for given in (node.args, node.kwargs)
        )
        return getattr(self._interpreter, node.op)(node.target, args, kwargs)


def _given(make: Callable[[], Values]) -> Values | None:
    """Inputs, None of a size that no tensor can have."""
    try:
        return make()
    except FAILURES:
        return None


def _behind(read: Tensor | Unmade, shape: Shape) -> Unmade:
    return Unmade(shape, read if isinstance(read, Tensor) else read.like)


def _made(value: Any) -> Any:
    return value.made() if isinstance(value, Unmade) else value


def _does_not_fit(module: Any, shape: Shape) -> bool:
    """Whether a layer reads other channels, without which running it would fail more slowly."""
    if type(module) is nn.Linear:
        return bool(shape[-1] != module.in_features)
    if type(module) in CONVS and len(shape) == module.weight.dim():
        return bool(shape[1] != module.in_channels)
    return type(module) in BATCH_NORMS and len(shape) > 1 and bool(shape[1] != module.num_features)
