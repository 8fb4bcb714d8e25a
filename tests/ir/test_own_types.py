"""A type that the example shows is that of every call only where a layer fixes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from builders import Apply, conv, image, ready
from torch import Tensor, fx

import rmfx

Forward = Callable[..., Tensor]


def block(m: Any, x: Tensor) -> Tensor:
    return m.c(torch.relu(x + m.b(torch.relu(m.a(x)))))  # type: ignore[no-any-return]


def at_the_front(m: Any, x: Tensor) -> Tensor:
    return block(m, x.float())


def to_what_it_is(m: Any, x: Tensor) -> Tensor:
    return block(m, x.to(torch.float32))


def at_the_end(m: Any, x: Tensor) -> Tensor:
    return block(m, x.float()).to(x)


def behind_a_sum(m: Any, x: Tensor) -> Tensor:
    return block(m, (x + 1).type_as(m.a.weight))


def to_the_type_of_a_weight(m: Any, x: Tensor) -> Tensor:
    return block(m, x.to(m.a.weight.dtype))


FORWARDS = (at_the_front, to_what_it_is, at_the_end, behind_a_sum, to_the_type_of_a_weight)


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
