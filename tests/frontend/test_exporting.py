"""What only torch.export can trace keeps the sizes open that its code leaves open."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from builders import Apply, conv, image, ready
from torch import Tensor, nn

import rmfx
from rmfx.errors import ShapeError, TraceError


def bordered(m: Any, x: Tensor) -> Tensor:
    """Code that torch.fx cannot trace, and that broadcasts over the batch."""
    y, b = F.pad(m.e(x), (1, 1, 1, 1)), m.e.bias.view(1, -1, 1, 1)
    y[:, :, 0:1, :] = b
    y[:, :, -1:, :] = b
    y[:, :, :, 0:1] = b
    y[:, :, :, -1:] = b
    return torch.relu(m.c(x) + m.d(y))


def unpacked(m: Any, x: Tensor) -> Tensor:
    return x + m.a(x) + x.new_zeros(*x.shape)


LAYERS: dict[str, Any] = {"e": conv(4, 6, 1), "d": conv(6, 4, padding=0), "c": conv(), "a": conv()}


def assert_same_at(model: Any, found: Any, *shapes: tuple[int, ...]) -> None:
    for shape in shapes:
        x = image(*shape)
        assert (found(x) - model(x)).abs().max() <= 1e-10 * model(x).abs().max(), shape


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("forward", [bordered, unpacked])
def test_batch_and_space_are_open_whatever_the_example_is(forward: Any, batch: int) -> None:
    model = ready(Apply(forward, **LAYERS))
    gm = rmfx.merge_branches(model, image(batch, 4, 8, 9))
    assert_same_at(model, gm, (1, 4, 8, 9), (2, 4, 8, 9), (3, 4, 5, 6), (1, 4, 11, 8))


class Speech(nn.Module):
    """A block that is masked by lengths, which are an input, in code that torch.fx cannot trace."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(dims=1), conv(dims=1)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        mask = x.new_zeros(*x.shape[::2], dtype=torch.bool)
        mask = (torch.arange(x.size(2)) < lengths.unsqueeze(1)) | mask
        found: Tensor = x + self.b(torch.relu(self.a(x)).masked_fill(~mask.unsqueeze(1), 0.0))
        return found


def test_masks_by_lengths_that_are_an_input() -> None:
    model = ready(Speech())
    gm = rmfx.remove_residuals(model, (image(2, 4, 9), torch.tensor([9, 5])))
    assert rmfx.report(gm).removed == 1
    for x, lengths in ((image(3, 4, 12), [1, 12, 7]), (image(2, 4, 9), [9, 2])):
        given = (x, torch.tensor(lengths))
        assert (gm(*given) - model(*given)).abs().max() <= 1e-10


def test_code_that_asks_for_the_batch_keeps_its_condition() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = x + m.a(x) + x.new_zeros(*x.shape)
        return y * 2 if x.shape[0] == 1 else y

    model = ready(Apply(forward, a=conv()))
    one = rmfx.remove_residuals(model, image(1, 4, 8, 9))
    assert_same_at(model, one, (1, 4, 8, 9))
    with pytest.raises(ShapeError):
        one(image(2, 4, 8, 9))
    several = rmfx.remove_residuals(model, image(2, 4, 8, 9))
    assert_same_at(model, several, (2, 4, 8, 9), (3, 4, 8, 9))
    with pytest.raises(ShapeError):
        several(image(1, 4, 8, 9))


def test_sizes_that_grow_with_every_layer_stay_those_of_the_example() -> None:
    def same(x: Tensor, layer: Any) -> Tensor:
        more = [max((math.ceil(n / 2) - 1) * 2 + 3 - n, 0) for n in x.shape[:1:-1]]
        if max(more) > 0:
            x = F.pad(x, [n for m in more for n in (m // 2, m - m // 2)])
        found: Tensor = layer(x)
        return found

    layers = {f"l{i}": conv(stride=2, padding=0) for i in range(4)}

    def forward(m: Any, x: Tensor) -> Tensor:
        for name in layers:
            x = same(x, getattr(m, name))
        return x + m.a(x)

    model = ready(Apply(forward, a=conv(), **layers))
    gm = rmfx.remove_residuals(model, image(2, 4, 65, 65))
    assert rmfx.report(gm).removed == 1
    assert_same_at(model, gm, (1, 4, 65, 65), (3, 4, 65, 65))
    with pytest.raises(ShapeError):
        gm(image(2, 4, 33, 33))


class Several(nn.Module):
    """A block that takes any number of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.a = conv()

    def forward(self, *xs: Tensor) -> Tensor:
        y = torch.relu(self.a(xs[0]))
        y[:, 0] = 0
        return xs[-1] + y


def test_the_rest_of_the_arguments_has_open_sizes() -> None:
    model = ready(Several())
    for inputs in (image(), (image(), image())):
        gm = rmfx.remove_residuals(model, inputs)
        for shape in ((1, 4, 9, 7), (3, 4, 5, 6)):
            given = [image(*shape)] * len(inputs if isinstance(inputs, tuple) else (inputs,))
            torch.testing.assert_close(gm(*given), model(*given))


VALUES: dict[str, Any] = {
    "number": lambda n: torch.tensor(n, dtype=torch.float64),
    "row": lambda n: torch.tensor([n, 1.0, n, 2.0], dtype=torch.float64).view(-1, 1, 1),
    "array": lambda n: torch.from_numpy(np.array(n)),
    "python": lambda n: n,
}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_constants_of_the_code_are_part_of_what_a_batch_of_one_computes(
    value: Any, batch: int
) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return x + m.a(x) * (value(2.0) if x.shape[0] > 1 else value(3.0))

    model = ready(Apply(forward, a=conv()))
    for verb in (rmfx.remove_residuals, rmfx.remove_noops):
        gm = verb(model, image(batch, 4, 9, 7))
        assert_same_at(model, gm, (batch, 4, 9, 7))
        with pytest.raises(ShapeError):
            gm(image(3 - batch, 4, 9, 7))


@pytest.mark.parametrize(
    "decides",
    [
        lambda x: x.is_contiguous(),
        lambda x: x.stride(1) > x.stride(-1),
        lambda x: x.is_contiguous(memory_format=torch.channels_last),
    ],
)
def test_code_that_decides_by_the_order_in_memory_is_refused(decides: Any) -> None:
    model = ready(Apply(lambda m, x: x + m.a(x) * (2.0 if decides(x) else 3.0), a=conv()))
    with pytest.raises(TraceError, match="order of a value in memory"):
        rmfx.remove_residuals(model, image())


def test_inputs_of_one_number_have_no_order_in_memory() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = conv()

        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            x = x if x.is_contiguous() else x.contiguous()
            return x + self.a(x) * scale

    model, scale = ready(Scaled()), torch.tensor(2.0, dtype=torch.float64)
    gm = rmfx.remove_residuals(model, (image(), scale))
    torch.testing.assert_close(gm(image(), scale), model(image(), scale))


def test_code_that_asks_for_the_order_in_memory_to_copy_is_converted() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        if not x.is_contiguous():
            x = x.contiguous()
        return x + m.a(x)

    model = ready(Apply(forward, a=conv()))
    gm = rmfx.remove_residuals(model, image())
    assert rmfx.report(gm).rows[0].status == "removed"
    for x in (image(), image().to(memory_format=torch.channels_last)):
        torch.testing.assert_close(gm(x), model(x))
