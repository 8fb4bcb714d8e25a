"""Borders written over with what the layers before them give for zeros (DBB)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from builders import Residual, chain, conv, conv_bn, image, ready, shapes, types
from torch import Tensor, nn

import rmfx
from rmfx.testing import assert_equivalent


class Filled(nn.Module):
    """1x1, batch norm, padding whose border holds what they give for zeros; then a layer."""

    def __init__(
        self, last: nn.Module, value: Callable[[Any], Tensor], sides: str = "tblr"
    ) -> None:
        super().__init__()
        self.point = conv(4, 6, 1, bias=False)
        self.bn = nn.BatchNorm2d(6)
        self.last = last
        self.value = value
        self.sides = sides

    def forward(self, x: Tensor) -> Tensor:
        y = F.pad(self.bn(self.point(x)), [1] * 4)
        value = self.value(self.bn).view(1, -1, 1, 1)
        if "t" in self.sides:
            y[:, :, 0:1, :] = value
        if "b" in self.sides:
            y[:, :, -1:, :] = value
        if "l" in self.sides:
            y[:, :, :, 0:1] = value
        if "r" in self.sides:
            y[:, :, :, -1:] = value
        return self.last(y)  # type: ignore[no-any-return]


def of_zero(bn: Any) -> Tensor:
    """As the paper's code computes it."""
    found: Tensor = bn.bias.detach() - bn.running_mean * bn.weight.detach() / torch.sqrt(
        bn.running_var + bn.eps
    )
    return found


class Sum(nn.Module):
    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Any:
        return sum(branch(x) for branch in self.branches)


def block(value: Callable[[Any], Tensor] = of_zero, sides: str = "tblr") -> nn.Module:
    sequence = Filled(conv(6, 4, padding=0), value, sides)
    average = Filled(chain(nn.AvgPool2d(3, 1), conv(6, 4, 1)), value, sides)
    return Sum(conv_bn(), sequence, average)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_diverse_branch_block_becomes_one_conv(dtype: torch.dtype) -> None:
    model = ready(block(), dtype)
    x = image(dtype=dtype)
    gm = rmfx.merge_branches(model, x)
    assert shapes(gm) == [(4, 4, 3, 3)]
    assert len(types(gm)) == 1
    assert_equivalent(model, gm, x, tolerance=1e-10 if dtype is torch.float64 else 1e-5)
    exported = rmfx.merge_branches(torch.export.export(model, (x,)))
    assert shapes(exported) == [(4, 4, 3, 3)]


def test_the_trace_computes_the_same() -> None:
    model = ready(Filled(nn.Identity(), of_zero))
    gm = rmfx.trace(model, image())
    assert "copy_" not in gm.code
    torch.testing.assert_close(gm(image()), model(image()))


@pytest.mark.parametrize(
    ("value", "sides"),
    [
        (lambda bn: of_zero(bn) + 0.01, "tblr"),  # another value
        (lambda bn: bn.bias.detach(), "tblr"),
        (lambda bn: of_zero(bn) * (1 + 1e-9), "tblr"),
        (of_zero, "tbl"),  # one side stays zero
        (of_zero, "t"),
    ],
)
def test_other_borders_stay_as_they_are(value: Any, sides: str) -> None:
    model = ready(block(value, sides))
    gm = rmfx.merge_branches(model, image())
    assert_equivalent(model, gm, image())
    assert len(shapes(gm)) > 1


class Stored(Filled):
    """The border stands in a buffer."""

    def __init__(self, last: nn.Module, dtype: torch.dtype) -> None:
        super().__init__(last, lambda bn: bn.border)
        nn.init.uniform_(self.bn.weight, 0.5, 1.5)
        nn.init.normal_(self.bn.bias)
        nn.init.normal_(self.bn.running_mean)
        nn.init.uniform_(self.bn.running_var, 0.5, 2)
        self.to(dtype).eval()
        with torch.no_grad():
            zeros = torch.zeros(1, 4, 1, 1, dtype=dtype)
            self.bn.register_buffer("border", self.bn(self.point(zeros)).flatten())


TYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", TYPES)
def test_a_border_that_is_that_of_zeros_bit_for_bit(dtype: torch.dtype) -> None:
    model = Stored(conv(6, 4, padding=0).to(dtype), dtype).eval()
    gm = rmfx.remove_noops(model, image(dtype=dtype))
    assert "copy_" not in gm.code
    assert_equivalent(model, gm, image(dtype=dtype), tolerance=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize(("dtype", "steps"), [(TYPES[0], 300), *((t, 1) for t in TYPES[1:])])
def test_a_stored_border_that_differs_in_its_last_place_stays(
    dtype: torch.dtype, steps: int
) -> None:
    model = Stored(conv(6, 4, padding=0).to(dtype), dtype).eval()
    border: Any = model.bn.border
    for _ in range(steps):
        border[2] = torch.nextafter(border[2], torch.tensor(100.0, dtype=dtype))
    x = image(dtype=dtype)
    gm = rmfx.remove_noops(model, x)
    assert "copy_" in gm.code
    assert torch.equal(gm(x), model(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "value",
    [
        lambda bn: torch.zeros_like(bn.bias),
        lambda bn: -of_zero(bn),
        lambda bn: of_zero(bn) * 1.001,
        lambda bn: of_zero(bn) + 1e-3,
        lambda bn: of_zero(bn).roll(1),
        lambda bn: bn.bias.detach() - bn.running_mean * bn.weight.detach() / (bn.running_var + 1),
        lambda bn: of_zero(bn) * float("nan"),
    ],
)
def test_another_border_is_accepted_in_no_type(dtype: torch.dtype, value: Any) -> None:
    model, x = ready(Filled(conv(6, 4, padding=0), value), dtype), image(dtype=dtype)
    gm = rmfx.remove_noops(model, x)
    assert "copy_" in gm.code
    assert torch.equal(gm(x), model(x)) or not bool(torch.isfinite(model(x)).all())


@pytest.mark.parametrize("dtype", TYPES)
def test_a_border_computed_in_another_way_is_that_of_zeros(dtype: torch.dtype) -> None:
    model = ready(Filled(conv(6, 4, padding=0), of_zero), dtype)
    gm = rmfx.remove_noops(model, image(dtype=dtype))
    assert "copy_" not in gm.code
    limit = 64 * torch.finfo(dtype).eps
    assert_equivalent(model, gm, image(dtype=dtype), tolerance=limit)


def test_a_border_that_is_drawn_is_drawn() -> None:
    model = ready(Filled(conv(6, 4, padding=0), lambda bn: torch.bernoulli(bn.running_var / 9)))
    assert "copy_" in rmfx.remove_noops(model, image()).code


def test_what_a_border_is_computed_of_may_be_long() -> None:
    def value(bn: Any) -> Tensor:
        x = of_zero(bn)
        for _ in range(60):  # each step reads the one before it twice
            x = (x + x) / 2
        return x

    model = ready(Filled(conv(6, 4, padding=0), value))
    assert "copy_" not in rmfx.remove_noops(model, image()).code


class AlongTheRow(Filled):
    """As many numbers as channels, but one for each column."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.pad(self.bn(self.point(x)), [1] * 4)
        for index in (slice(0, 1), slice(-1, None)):
            y[:, :, index, :] = self.value(self.bn)
            y[:, :, :, index] = self.value(self.bn).view(-1, 1)
        return self.last(y)  # type: ignore[no-any-return]


def test_numbers_along_a_row_are_not_those_of_channels() -> None:
    model = ready(Residual(AlongTheRow(conv(6, 4, padding=0), of_zero)))
    x = image(2, 4, 4, 4)  # six by six once it is padded, as there are channels
    gm = rmfx.merge_branches(model, x)
    assert_equivalent(model, gm, x)
    assert rmfx.report(gm).refused == 1


class ReadBefore(Filled):
    """The padded value is read before its border is written over."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.pad(self.bn(self.point(x)), [1] * 4)
        early = y.sum()
        y[:, :, 0:1, :] = y[:, :, -1:, :] = self.value(self.bn).view(1, -1, 1, 1)
        y[:, :, :, 0:1] = y[:, :, :, -1:] = self.value(self.bn).view(1, -1, 1, 1)
        return self.last(y) * early  # type: ignore[no-any-return]


def test_what_is_read_before_is_left_alone() -> None:
    model = ready(ReadBefore(conv(6, 4, padding=0), of_zero))
    gm = rmfx.merge_branches(model, image())
    assert_equivalent(model, gm, image())
