"""A converted network raises for inputs that it was not made for; it gives no wrong numbers."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from builders import Residual, basic_branch, conv, conv_branch, image, ready
from torch import Tensor, nn
from torch.export import Dim

import rmfx
from rmfx._conditions import has_conditions

COPIES: dict[str, Callable[[Any], Any]] = {
    "itself": lambda gm: gm,
    "deepcopy": copy.deepcopy,
    "pickle": lambda gm: pickle.loads(pickle.dumps(gm)),
    "pickle of a deepcopy": lambda gm: pickle.loads(pickle.dumps(copy.deepcopy(gm))),
    "converted again": rmfx.remove_residuals,
}


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("shapes", [True, False])
def test_an_unbatched_image_is_refused(shapes: bool, way: str) -> None:
    # PReLU would take the height, which equals its channels, for the channels.
    model = ready(Residual(conv_branch(nn.LeakyReLU(0.1))))
    converted = rmfx.remove_residuals(model, image(2, 4, 8, 8) if shapes else None)
    assert "PReLU" in {type(m).__name__ for m in converted.modules()}
    model(image(4, 8, 8))
    with pytest.raises(rmfx.ShapeError, match=r"x has shape \(4, 8, 8\), but .*converted for 4"):
        COPIES[way](converted)(image(4, 8, 8))
    assert torch.allclose(COPIES[way](converted)(image(3, 4, 9, 5)), model(image(3, 4, 9, 5)))


class OnlyExported(nn.Module):
    """Control flow over sizes, which symbolic tracing cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Residual(basic_branch())

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] > 5:
            x = x * 2
        return self.block(x)


def test_a_model_that_is_exported_takes_any_batch_but_no_other_image() -> None:
    model = ready(OnlyExported())
    converted = rmfx.remove_residuals(model, image(1, 4, 9, 7))
    for batch in (1, 2, 5):
        x = image(batch, 4, 9, 7)
        assert torch.allclose(converted(x), model(x))
    with pytest.raises(rmfx.ShapeError, match=r"exported for \(any, 4, 9, 7\)"):
        converted(image(1, 4, 4, 7))


def test_code_that_depends_on_the_batch_fixes_it() -> None:
    class OneOrMany(OnlyExported):
        def forward(self, x: Tensor) -> Tensor:
            return self.block(x * 3 if x.shape[0] == 1 else x)

    model = ready(OneOrMany())
    one, many = (rmfx.remove_residuals(model, image(n, 4, 9, 7)) for n in (1, 3))
    assert torch.allclose(one(image(1, 4, 9, 7)), model(image(1, 4, 9, 7)))
    assert torch.allclose(many(image(3, 4, 9, 7)), model(image(3, 4, 9, 7)))
    for converted, batch in ((one, 3), (many, 1)):
        with pytest.raises(rmfx.ShapeError):
            converted(image(batch, 4, 9, 7))


def test_an_exported_program_keeps_its_conditions() -> None:
    class Even(OnlyExported):
        def forward(self, x: Tensor) -> Tensor:
            return self.block(x * 3 if x.shape[0] % 2 == 0 else x)

    model = ready(Even())
    program = torch.export.export(model, (image(4, 4, 9, 7),), dynamic_shapes=({0: Dim.AUTO},))
    converted = rmfx.remove_residuals(program)
    for way in COPIES.values():
        copied = way(converted)
        assert torch.allclose(copied(image(6, 4, 9, 7)), model(image(6, 4, 9, 7)))
        with pytest.raises(rmfx.ShapeError, match="% 2"):
            copied(image(3, 4, 9, 7))


def test_ranges_and_equal_sizes_of_an_exported_program() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Residual(basic_branch())

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.block(x) + y

    model = ready(Sum())
    batch = Dim("batch", min=3, max=8)
    x = image(4, 4, 9, 7)
    program = torch.export.export(model, (x, x), dynamic_shapes=({0: batch}, {0: batch}))
    converted = rmfx.remove_residuals(program)
    x = image(8, 4, 9, 7)
    assert torch.allclose(converted(x, x), model(x, x))
    for a, b in ((9, 9), (2, 2), (4, 5)):
        with pytest.raises(rmfx.ShapeError):
            converted(image(a, 4, 9, 7), image(b, 4, 9, 7))


def test_numbers_that_exporting_fixed_are_checked() -> None:
    class Scaled(OnlyExported):
        def forward(self, x: Tensor, scale: float) -> Tensor:  # type: ignore[override]
            return super().forward(x) * scale

    model = ready(Scaled())
    converted = rmfx.remove_residuals(model, (image(), 2.0))
    assert torch.allclose(converted(image(), 2.0), model(image(), 2.0))
    with pytest.raises(rmfx.ShapeError, match=r"scale is 3.0, but .* exported for 2.0"):
        converted(image(), 3.0)


def test_the_check_leaves_no_trace_in_the_graph() -> None:
    converted = rmfx.remove_residuals(ready(Residual(conv())), image())
    assert has_conditions(converted.graph)
    assert rmfx.is_plain(converted)
    again = torch.export.export(converted, (image(),), dynamic_shapes=({0: Dim("n"), 2: Dim("h")},))
    x = image(5, 4, 11, 7)
    assert torch.equal(again.module()(x), converted(x))
    assert torch.equal(torch.compile(converted, backend="eager")(x), converted(x))
