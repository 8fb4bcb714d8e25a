"""A type that the example shows is that of every call only where a layer fixes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from builders import Apply, conv, image, ready
from torch import Tensor, fx

import rmfx
from rmfx.ir.conditions import AGAIN

Forward = Callable[..., Tensor]


def block(m: Any, x: Tensor) -> Tensor:
    return m.c(torch.relu(x + m.b(torch.relu(m.a(x)))))  # type: ignore[no-any-return]


def at_the_front(m: Any, x: Tensor) -> Tensor:
    return block(m, x.float())


def to_what_it_is(m: Any, x: Tensor) -> Tensor:
    return block(m, x.to(torch.float32))


def at_the_end(m: Any, x: Tensor) -> Tensor:
    return block(m, x.float()).to(x)


def to_the_type_of_a_weight(m: Any, x: Tensor) -> Tensor:
    return block(m, x.to(m.a.weight.dtype))


FORWARDS = (at_the_front, to_what_it_is, at_the_end, to_the_type_of_a_weight)


def net(forward: Forward) -> Any:
    return ready(Apply(forward, a=conv(), b=conv(), c=conv()), dtype=torch.float32)


@pytest.mark.parametrize("forward", FORWARDS)
@pytest.mark.parametrize("traced", [False, True])
def test_casts_of_inputs_stay_for_inputs_of_other_types(forward: Forward, traced: bool) -> None:
    model, x = net(forward), image(dtype=torch.float32)
    gm = rmfx.remove_residuals(fx.symbolic_trace(model) if traced else model, x)
    assert rmfx.report(gm).removed == 1
    for kind in (torch.uint8, torch.int32, torch.float64, torch.float16):
        given = (20 * x.abs()).to(kind)
        assert gm(given).dtype == model(given).dtype
        torch.testing.assert_close(gm(given), model(given), rtol=1e-3, atol=1e-3)


def test_casts_behind_a_layer_are_none() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        return m.c(torch.relu(y + m.b(torch.relu(y).float()).to(torch.float32)))

    model, x = net(forward), image(dtype=torch.float32)
    gm = rmfx.remove_residuals(model, x)
    assert rmfx.is_plain(gm)
    assert "float" not in str(gm.graph)


# Before the first layer: what these give of whole numbers is not what they give of others.
BEFORE: dict[str, Forward] = {
    "a product": lambda m, x: block(m, (x * torch.full_like(x, 1.5)).to(torch.float32)),
    "a sum": lambda m, x: block(m, (x + 1).type_as(m.a.weight)),
    "a fill": lambda m, x: block(m, x.masked_fill(x > 3, 0.5).to(torch.float32)),
    "a clamp": lambda m, x: block(m, x.clamp(0, 3.5).to(torch.float32)),
    "a choice": lambda m, x: block(m, torch.where(x > 3, 2.7, x).to(torch.float32)),
}


@pytest.mark.parametrize("name", BEFORE)
def test_inputs_of_another_kind_are_right_or_refused(name: str) -> None:
    model, x = net(BEFORE[name]), image(dtype=torch.float32) * 4
    for given in (x, (10 * x.abs()).to(torch.uint8)):
        gm = rmfx.remove_residuals(model, given)
        for kind in (torch.float64, torch.uint8, torch.int64):
            other = given.to(kind)
            try:
                found = gm(other)
            except rmfx.ShapeError as error:
                assert AGAIN in str(error)  # noqa: PT017
                assert other.is_floating_point() != given.is_floating_point()
            else:
                torch.testing.assert_close(found, model(other), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["a product", "a fill", "a clamp"])
def test_what_is_decided_by_a_kind_demands_it(name: str) -> None:
    gm = rmfx.remove_residuals(net(BEFORE[name]), image(dtype=torch.float32))
    with pytest.raises(rmfx.ShapeError, match="converted for floating point numbers"):
        gm(image().to(torch.int64))


def test_nothing_is_demanded_of_what_a_layer_reads() -> None:
    model = net(block)
    assert "floating" not in str(rmfx.remove_residuals(model, image(dtype=torch.float32)).graph)
