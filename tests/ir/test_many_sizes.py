"""What a run at many sizes finds at once is what the graph gives at each of them."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from builders import Apply, conv, image, ready
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import rmfx
from rmfx.ir.many_sizes import FAILURES, ManySizes, Shapes
from rmfx.ir.shapes import OnMeta
from rmfx.testing import NetworkSpec, residual_networks

STEPS = (0, 1, -1, 2, 5, 30)  # from the sizes of the example


class Real(fx.Interpreter):
    """Notes the shapes of all values."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.shapes: Shapes = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.shapes[n.name] = tuple(value.shape)
        return value


def really(gm: fx.GraphModule, shapes: list[tuple[int, ...]], dtype: torch.dtype) -> Shapes | None:
    real = Real(gm)
    try:
        with torch.no_grad():
            real.run(*(torch.zeros(shape, dtype=dtype) for shape in shapes))
    except FAILURES:
        return None
    return real.shapes


def at_once(
    gm: fx.GraphModule, sizes: list[list[tuple[int, ...]]], dtype: torch.dtype
) -> list[Shapes | None]:
    def inputs(shapes: list[tuple[int, ...]]) -> list[Tensor]:
        return [torch.empty(shape, dtype=dtype, device="meta") for shape in shapes]

    return ManySizes(gm).run([partial(inputs, shapes) for shapes in sizes], OnMeta())


def moved(shape: tuple[int, ...], step: int) -> tuple[int, ...]:
    return (shape[0], shape[1], *(max(1, n + step) for n in shape[2:]))


@given(spec=residual_networks(), channels=st.booleans())
def test_of_random_networks(spec: NetworkSpec, channels: bool) -> None:
    model, inputs = spec.build(), spec.inputs()
    gm, dtype = rmfx.trace(model, inputs), inputs[0].dtype
    shapes = [tuple(x.shape) for x in inputs]
    sizes = [[moved(shape, step) for shape in shapes] for step in STEPS]
    if channels:  # of which networks take no others
        sizes.append([(shape[0], shape[1] + 1, *shape[2:]) for shape in shapes])
    found = at_once(gm, sizes, dtype)
    assert found[0] is not None
    assert found == [really(gm, one, dtype) for one in sizes]


FORMS: dict[str, Any] = {
    "a view that is written to": lambda m, x: (y := m.conv(x)).view(-1).relu_() + y.flatten(),
    "a size": lambda m, x: m.conv(x)[:, : x.shape[2]],
    "in place, another shape": lambda m, x: F.relu(m.conv(x)).squeeze_(0) + 1,
    "several values": lambda m, x: torch.cat(m.conv(x).chunk(3, 2), 1),
    "a number": lambda m, x: m.conv(x) * 2 - x.shape[-1],
    "spread out": lambda m, x: m.conv(x) + m.conv(x).mean((2, 3), keepdim=True),
    "that do not fit": lambda m, x: m.conv(x) + m.conv(x)[:, :, : x.shape[2] // 4],
    "slopes": lambda m, x: m.slopes(m.conv(x)),
}


@pytest.mark.parametrize("name", FORMS)
def test_of_operations(name: str) -> None:
    layers: dict[str, nn.Module] = {"conv": conv(2, 4), "slopes": nn.PReLU(4)}
    gm = fx.symbolic_trace(ready(Apply(FORMS[name], **layers)))
    sizes = [[(1, 2, 6 + step, 7 + step)] for step in (-5, -2, 0, 1, 6)] + [[(1, 3, 6, 7)]]
    found = at_once(gm, sizes, image(1).dtype)
    assert found[-1] is None
    assert found == [really(gm, one, image(1).dtype) for one in sizes]


def test_sizes_that_no_tensor_has_fail() -> None:
    gm = fx.symbolic_trace(ready(Apply(lambda m, x: m.conv(x), conv=conv(2, 2))))
    found = at_once(gm, [[(1 << 40, 2, 1 << 20, 1 << 20)], [(1, 2, 4, 4)]], image(1).dtype)
    assert found[0] is None
    assert found[1] is not None
