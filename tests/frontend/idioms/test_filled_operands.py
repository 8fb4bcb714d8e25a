"""Tensors of one number become that number where they change neither type nor sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from builders import Apply, conv, image, ready
from torch import Tensor, nn

from rmfx.frontend.tracing import trace

Function = Callable[[Any, Tensor], Tensor]
FILLINGS = ("zeros", "ones", "full", "tensor")


def net(function: Function, **options: Any) -> Any:
    return ready(Apply(function, a=conv(dims=1), b=conv(dims=1, stride=2)), **options)


def fillings(model: Any, *inputs: Tensor) -> list[str]:
    """What makes tensors of one number in a graph."""
    graph = trace(model, inputs or None).graph
    names = [str(getattr(node.target, "__name__", node.target)) for node in graph.nodes]
    return [name for name in names if any(part in name for part in FILLINGS)]


GONE: dict[str, Function] = {
    "a sum": lambda m, x: torch.zeros_like(x) + m.a(x),
    "a difference": lambda m, x: m.a(x) - torch.ones_like(x),
    "a product": lambda m, x: x.new_full(x.shape, 2.0) * m.a(x),
    "a quotient": lambda m, x: m.a(x) / torch.full_like(x, 4.0),
    "of one place": lambda m, x: m.a(x) + x.new_ones(1, 1, 1),
    "of a stride": lambda m, x: m.b(x) + x.new_zeros(x.size(0), 4, (x.size(2) + 1) // 2),
    "behind a mask": lambda m, x: m.a(x) * (x > 0) + torch.zeros_like(x),
}


@pytest.mark.parametrize("name", GONE)
def test_a_number_takes_their_place(name: str) -> None:
    model, x = net(GONE[name]), image(2, 4, 9)
    assert fillings(model, x) == []
    for inputs in (x, image(3, 4, 12), image(1, 4, 1)):
        assert torch.equal(trace(model, (x,))(inputs), model(inputs))


# What a tensor holds is the number in its own type: 1 of 1.7, True of 3, another 0.1 in float16.
ROUNDED: dict[str, Function] = {
    "a product by whole numbers": lambda m, x: (
        m.a(x) * x.new_full((1, 1, 1), 1.7, dtype=torch.int64)
    ),
    "a product by a truth value": lambda m, x: m.a(x) * (x > 0).new_full((1, 1, 1), 3),
    "a sum in half": lambda m, x: m.a(x) + x.new_full((1,), 0.1, dtype=torch.float16),
    "a choice": lambda m, x: torch.where(x > 0, m.a(x), x.new_full((), 1.7, dtype=torch.int64)),
    "a fill": lambda m, x: m.a(x).masked_fill(x < 0, x.new_full((), -1.7, dtype=torch.int64)),
    "channels": lambda m, x: torch.cat([torch.full_like(x, 0.7, dtype=torch.long), m.a(x)], 1),
    "a tensor of float32": lambda m, x: m.a(x) * torch.full((1, 1, 1), 0.1, dtype=torch.float32),
}


@pytest.mark.parametrize("name", ROUNDED)
@pytest.mark.parametrize("given", [True, False])
def test_a_number_is_what_its_type_holds(name: str, given: bool) -> None:
    model, x = net(ROUNDED[name]).double(), image(2, 4, 9, dtype=torch.float64)
    made = trace(model, (x,) if given else None)
    torch.testing.assert_close(made(x), model(x), rtol=1e-14, atol=1e-14)


def test_without_example_inputs_the_layers_tell() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        total = torch.zeros_like(m.a(x))
        return total + m.a(x)

    shared = net(lambda m, x: torch.zeros_like(y := m.a(x)) + y)
    assert fillings(shared) == []
    assert len(fillings(net(forward), image(2, 4, 9))) == 0


KEPT: dict[str, Function] = {
    "it spreads out": lambda m, x: x.mean(2, keepdim=True) + torch.zeros_like(x),
    "of another size": lambda m, x: m.a(x) + x.new_zeros(x.size(0), 4, x.size(2) + 0 * 1)[:, :, :9],
    "of another type": lambda m, x: m.a(x) + torch.zeros_like(x, dtype=torch.float64),
    "of a batch": lambda m, x: m.a(x)[:1] + torch.zeros_like(x),
    "of more dimensions": lambda m, x: m.a(x) + x.new_zeros(2, 1, 1, 1),
    "both": lambda m, x: m.a(x) * (torch.zeros_like(x) + torch.ones_like(x)),
}


@pytest.mark.parametrize("name", KEPT)
def test_it_stays_where_it_may_do_more(name: str) -> None:
    model, x = net(KEPT[name], dtype=torch.float32), image(2, 4, 9, dtype=torch.float32)
    assert fillings(model, x)
    found = trace(model, (x,))(x)
    assert torch.equal(found, model(x))
    assert found.dtype == model(x).dtype


class Masked(nn.Module):
    """Zeros of the size of a product, beside a layer of one of its factors."""

    def __init__(self) -> None:
        super().__init__()
        self.a = conv(dims=1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        found: Tensor = torch.zeros_like(x * mask) + self.a(x)
        return found


def test_what_a_mask_may_spread_out_keeps_its_zeros() -> None:
    model, mask = ready(Masked()), image(2, 1, 9)
    gm = trace(model, (image(2, 4, 9), mask))
    for x in (image(2, 4, 9), image(2, 4, 1)):
        assert torch.equal(gm(x, mask), model(x, mask))
