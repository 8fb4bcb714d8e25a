"""Notes the shape, type and device of every value of a graph."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from rmfx.errors import ShapeError
from rmfx.ir.notes import CONTAINER, EXAMPLE_VALUE, GIVEN, GUARDED, VAL, noted, set_shape, set_type
from rmfx.ir.shapes import AsFakes, WithoutValues
from rmfx.ir.threads import FAKES, without_logs
from rmfx.options import Inputs

from .checks import does_not_run
from .constants import values_that_decide
from .exported import EXPORTED
from .faithful import as_fakes
from .masks import INDEXING, places_of


class _ShapeRecorder(WithoutValues):
    """Notes shapes, types and devices."""

    def __init__(self, gm: fx.GraphModule, mode: FakeTensorMode) -> None:
        super().__init__(gm, AsFakes(mode))
        self._known = values_that_decide(gm)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is F.batch_norm and isinstance(args[0] if args else None, Tensor):
            return args[0]
        return super().call_function(target, args, kwargs)

    def run_node(self, n: fx.Node) -> Any:
        value = self._known_value(n) if n in self._known else super().run_node(n)
        if isinstance(value, Tensor):
            note_shape(n, value)
        elif isinstance(value, (tuple, list)) and any(isinstance(v, Tensor) for v in value):
            n.meta[CONTAINER] = True
        if n.op == "placeholder" and not isinstance(value, Tensor):
            n.meta[GIVEN] = value
        return value

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What a node is given, with places for masks that are known."""
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        if n.target is operator.getitem and isinstance(args[0], Tensor):
            index = n.args[1] if isinstance(n.args[1], tuple) else (n.args[1],)
            values = args[1] if isinstance(n.args[1], tuple) else (args[1],)
            pairs = zip(index, values, strict=True)
            return (args[0], tuple(one for i, v in pairs for one in self._placed(i, v))), kwargs
        if n.target in INDEXING:
            pairs = zip(n.args[1], args[1], strict=True)  # type: ignore[arg-type]
            indices = [one for i, v in pairs for one in self._placed(i, v)]
            return (args[0], indices, *args[2:]), kwargs
        return args, kwargs

    def _placed(self, index: Any, value: Any) -> Sequence[Any]:
        """An index, or those of the places that it chooses as a mask."""
        mask = self._known.get(index) if isinstance(index, fx.Node) else None
        places = None if mask is None else places_of(mask)
        return [value] if places is None else [self._weights.of(one) for one in places]

    def _known_value(self, node: fx.Node) -> Any:
        value = self._known[node]
        return self._weights.of(value) if isinstance(value, Tensor) else value


def note_shape(node: fx.Node, value: Tensor) -> None:
    """Keep shape (None where a size is symbolic), type and device of a node's value."""
    set_shape(node, tuple(n if isinstance(n, int) else None for n in value.shape))
    set_type(node, (value.dtype, value.device))


def find_shapes(gm: fx.GraphModule, inputs: Inputs | None) -> None:
    """Note every tensor's shape: from a run on fake tensors, or as Dynamo or export noted it."""
    by_dynamo = any(EXAMPLE_VALUE in n.meta for n in gm.graph.nodes if n.op == "placeholder")
    if inputs is None or by_dynamo:
        for node in gm.graph.nodes:
            value = noted(node)
            if isinstance(value, Tensor):
                note_shape(node, value)
        return
    expected = sum(node.op == "placeholder" for node in gm.graph.nodes)
    if len(inputs) > expected:
        raise ShapeError(
            f"the model does not run on the example inputs: it takes {expected}, not {len(inputs)}"
        )
    # Numbers that depend on the inputs' values are unknown, and so are sizes that depend on those.
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv(), static_shapes=True)
    try:
        with mode, torch.no_grad(), without_logs(FAKES):  # the error says it
            _ShapeRecorder(gm, mode).run(*as_fakes(mode, inputs))
    # The graph runs the model's own operations, which may raise anything.
    except Exception as error:
        raise does_not_run(inputs, error) from error


def mark_guarded(gm: fx.GraphModule) -> None:
    """Mark what exporting and Dynamo noted, which check their inputs."""
    key = VAL if gm.meta.pop(EXPORTED, False) else EXAMPLE_VALUE
    for node in gm.graph.nodes:
        if key in node.meta:
            node.meta[GUARDED] = True
