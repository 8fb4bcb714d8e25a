"""The laws by which shapes are found are those of the layers, whatever is asked of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from builders import conv
from hypothesis import given
from hypothesis import strategies as st
from torch import fx, nn

from rmfx.ir.shapes import OnMeta, WithoutValues

LAYERS: dict[str, Any] = {
    "conv": lambda: conv(4, 6),
    "linear": lambda: nn.Linear(4, 6),
    "batch norm": lambda: nn.BatchNorm2d(4),
    "layer norm": lambda: nn.LayerNorm(4),
    "layer norm of two": lambda: nn.LayerNorm((4, 3), elementwise_affine=False),
    "group norm": lambda: nn.GroupNorm(2, 4),
    "group norm of each": lambda: nn.GroupNorm(4, 4),
    "activation": lambda: nn.Hardswish(),
    "slope": lambda: nn.PReLU(),
    "slopes": lambda: nn.PReLU(4),
    "pool": lambda: nn.AvgPool2d(2),
}
SHAPES = st.lists(st.sampled_from((1, 2, 3, 4)), min_size=1, max_size=4).map(tuple)


def result_of(run: Any) -> Any:
    """The shape and type of what is run gives, or that it fails."""
    try:
        made = run()
    except (RuntimeError, ValueError, IndexError):
        return "fails"
    return tuple(made.shape), made.dtype


@pytest.mark.parametrize("name", LAYERS)
@given(shape=SHAPES)
def test_a_layer_gives_what_it_gives_without_values(name: str, shape: tuple[int, ...]) -> None:
    layer = LAYERS[name]().double().eval()
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_module("layer", (x,)))
    gm = fx.GraphModule({"layer": layer}, graph)
    real = torch.zeros(shape, dtype=torch.float64)
    found = result_of(lambda: WithoutValues(gm, OnMeta()).run(real.to("meta")))
    assert found == result_of(lambda: layer(real))


@given(
    shapes=st.tuples(SHAPES, SHAPES),
    operator=st.sampled_from((torch.add, torch.sub, torch.mul, torch.div)),
    kinds=st.tuples(*[st.sampled_from((torch.float32, torch.float64, torch.int64))] * 2),
    number=st.booleans(),
)
def test_two_values_together_give_what_they_give(
    shapes: Any, operator: Any, kinds: Any, number: bool
) -> None:
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    graph.output(graph.call_function(operator, (x, 2.5 if number else y)))
    gm = fx.GraphModule(nn.Module(), graph)
    values = [torch.ones(shape, dtype=kind) for shape, kind in zip(shapes, kinds, strict=True)]
    on_meta = [value.to("meta") for value in values]
    found = result_of(lambda: WithoutValues(gm, OnMeta()).run(*on_meta))
    assert found == result_of(lambda: gm(*values))
