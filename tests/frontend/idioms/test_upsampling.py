"""What enlarges both branches of a block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from builders import Apply, assert_all_gone, conv, image, ready, types
from torch import Tensor, nn

import rmfx
from rmfx.testing import assert_equivalent

Forward = Callable[[Any, Tensor], Tensor]


def generator_block(m: Any, x: Tensor) -> Tensor:
    y = m.up(F.relu(m.bn(x)))
    return m.b(F.relu(m.a(y))) + m.p(m.up(x))


BLOCKS: dict[str, Forward] = {
    "beside a shuffle": lambda m, x: m.shuffle(m.c16(x)) + m.up(x),
    "beside a shuffle that an activation follows": lambda m, x: (
        m.up(x) - F.relu(m.shuffle(m.c16(x)))
    ),
    "with a projection behind it": lambda m, x: m.shuffle(m.c16(x)) + m.p(m.up(x)),
    "three times": lambda m, x: F.pixel_shuffle(m.c36(x), 3) + F.interpolate(x, scale_factor=3),
    "in one and the other branch": lambda m, x: m.up(m.b(F.relu(m.a(x)))) + m.up(x),
    "two shuffles": lambda m, x: m.shuffle(m.c16(F.relu(m.a(x)))) + m.shuffle(m.d16(x)),
    "of one input": generator_block,
    "before a projection": lambda m, x: (
        m.b(F.interpolate(F.relu(x), scale_factor=2.0)) + m.up(m.p(x))
    ),
    "bilinear": lambda m, x: m.b(m.linear(F.relu(x))) + m.linear(x),
    "to a size": lambda m, x: (
        m.b(F.interpolate(F.silu(m.a(x)), (9, 11), mode="bicubic"))
        + F.interpolate(m.p(x), size=(9, 11), mode="bicubic")
    ),
    "of other factors each": lambda m, x: (
        m.b(F.interpolate(m.slopes(m.a(x)), scale_factor=(1, 3)))
        + F.interpolate(x, scale_factor=(1, 3)) * m.gamma
    ),
}
PARTS: dict[str, Callable[[], Any]] = {
    "up": lambda: nn.Upsample(scale_factor=2),
    "linear": lambda: nn.Upsample(scale_factor=2, mode="bilinear"),
    "smaller": lambda: nn.Upsample(scale_factor=0.5),
    "shuffle": lambda: nn.PixelShuffle(2),
    "c16": lambda: conv(4, 16),
    "d16": lambda: conv(4, 16, 1),
    "c36": lambda: conv(4, 36),
    "a": conv,
    "b": conv,
    "p": lambda: conv(4, 4, 1),
    "bn": lambda: nn.BatchNorm2d(4),
    "slopes": lambda: nn.PReLU(4),
    "gamma": lambda: nn.Parameter(torch.rand(4, 1, 1)),
    "stem": lambda: conv(4, 4),
    "head": lambda: conv(4, 2),
}


def block(forward: Forward) -> Any:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.head(F.relu(forward(m, F.relu(m.stem(x)))))  # type: ignore[no-any-return]

    return ready(Apply(run, **{name: make() for name, make in PARTS.items()}))


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_that_enlarges_is_removed(name: str) -> None:
    model, x = block(BLOCKS[name]), image(2, 4, 5, 6)
    converted = rmfx.remove_residuals(model, x)
    assert_all_gone(model, converted, (x,), 1, None)
    for other in (image(1, 4, 7, 4), image(3, 4, 1, 9)):
        assert_equivalent(model, converted, (other,))


@pytest.mark.parametrize("name", BLOCKS)
def test_it_is_removed_from_an_exported_program(name: str) -> None:
    model, x = block(BLOCKS[name]), image(2, 4, 5, 6)
    auto = torch.export.Dim.AUTO
    program = torch.export.export(model, (x,), dynamic_shapes=({0: auto, 2: auto, 3: auto},))
    for source in (program, torch.export.export(model, (x,)), program.module()):
        converted = rmfx.remove_residuals(source, x)
        assert rmfx.report(converted).refused == 0, str(rmfx.report(converted))
        torch.testing.assert_close(converted(x), model(x), rtol=1e-10, atol=1e-10)


def test_a_block_that_makes_values_smaller_is_removed_too() -> None:
    model = block(lambda m, x: m.b(m.smaller(F.relu(m.a(x)))) + m.p(m.smaller(x)))
    converted = rmfx.remove_residuals(model, image(2, 4, 8, 6))
    assert rmfx.report(converted).removed == 1
    for x in (image(2, 4, 8, 6), image(1, 4, 5, 7), image(3, 4, 2, 2)):
        assert_equivalent(model, converted, (x,))


def test_gradients_reach_the_weights() -> None:
    model, x = block(BLOCKS["beside a shuffle"]), image(2, 4, 5, 6)
    converted = rmfx.remove_residuals(model, x, differentiable=True)
    assert rmfx.report(converted).removed == 1
    model(x).square().sum().backward()
    wanted = model.c16.weight.grad.clone()
    model.zero_grad()
    converted(x).square().sum().backward()
    found = dict(converted.named_parameters())["c16.weight"].grad
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


STAYING: dict[str, Forward] = {
    "bilinear beside a shuffle": lambda m, x: m.shuffle(m.c16(x)) + m.linear(x),
    "other factors": lambda m, x: (
        m.shuffle(m.c16(x)) + F.interpolate(x, scale_factor=(4, 2))[:, :, ::2]
    ),
    "slopes per channel behind a shuffle": lambda m, x: m.slopes(m.shuffle(m.c16(x))) + m.up(x),
    "a layer that looks around": lambda m, x: m.shuffle(m.c16(x)) + m.a(m.up(x)),
    "bilinear beside nearest": lambda m, x: m.b(m.linear(F.relu(x))) + m.up(x),
}


@pytest.mark.parametrize("name", STAYING)
def test_what_does_not_commute_stays(name: str) -> None:
    model, x = block(STAYING[name]), image(2, 4, 5, 6)
    before = types(rmfx.trace(model, x))
    converted = rmfx.remove_residuals(model, x)
    assert rmfx.report(converted).removed == 0
    assert_equivalent(model, converted, (x,))
    enlarging = [name for name in before if name in ("PixelShuffle", "Upsample")]
    assert len(enlarging) == 2 - ("other" in name)


def test_values_that_are_read_elsewhere_stay_where_they_are() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.shuffle(m.c16(x))
        return y * (y + m.up(x))

    model, x = block(forward), image(2, 4, 5, 6)
    gm = rmfx.trace(model, x)
    assert not any("repeat_interleave" in str(node.target) for node in gm.graph.nodes)
    torch.testing.assert_close(gm(x), model(x))
