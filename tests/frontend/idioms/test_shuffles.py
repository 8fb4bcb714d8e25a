"""Channel shuffles that are written as views."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from builders import (
    Apply,
    Residual,
    adds,
    assert_all_gone,
    chain,
    conv,
    conv_bn,
    image,
    ready,
    types,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import rmfx
from rmfx.testing import assert_equivalent

Form = Callable[[Tensor], Tensor]


def by_view(x: Tensor) -> Tensor:
    b, c, h, w = x.size()
    return x.view(b, 2, c // 2, h, w).transpose(1, 2).contiguous().view(b, c, h, w)


def by_reshape(x: Tensor) -> Tensor:
    grouped = x.reshape(x.shape[0], 4, -1, x.shape[2], x.shape[3])
    return torch.permute(grouped, (0, 2, 1, 3, 4)).reshape(x.shape)


FORMS: dict[str, Form] = {
    "view": by_view,
    "reshape": by_reshape,
    "flat": lambda x: (
        x.view(x.size(0), 2, 4, -1).transpose(2, 1).reshape(-1, 8, x.size(2), x.size(3))
    ),
    "flatten": lambda x: x.unflatten(1, (4, 2)).swapaxes(1, 2).flatten(1, 2),
    "clone": lambda x: torch.flatten(torch.unflatten(x, 1, (2, 4)).transpose(1, 2).clone(), 1, 2),
}


def block(shuffle: Form) -> Any:
    branch = chain(
        *(conv_bn(8, 8, 1, groups=2), nn.ReLU(), Apply(lambda _, x: shuffle(x))),
        *(conv_bn(8, 8, groups=8), conv_bn(8, 8, 1, groups=2)),
    )
    return ready(chain(conv(3, 8), nn.ReLU(), Residual(branch), nn.ReLU(), conv(8, 2)))


@pytest.mark.parametrize("name", FORMS)
def test_the_block_of_shufflenet_becomes_a_chain(name: str) -> None:
    model, x = block(FORMS[name]), image(2, 3, 8, 6)
    exported = torch.export.export(model, (x,))
    batch = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for gm in (
        rmfx.remove_residuals(model, x),
        rmfx.remove_residuals(model),
        rmfx.remove_residuals(exported),
        rmfx.remove_residuals(batch),
        rmfx.remove_residuals(exported.run_decompositions()),
    ):
        assert_all_gone(model, gm, (x,), 1, None)
        assert rmfx.is_plain(gm)


def test_the_result_takes_other_sizes() -> None:
    model = block(by_view)
    gm = rmfx.remove_residuals(model, image(1, 3, 8, 8))
    other = image(3, 3, 5, 9)
    torch.testing.assert_close(gm(other), model(other), rtol=0, atol=1e-10)


def test_dynamo_sees_it_too() -> None:
    model, x = block(by_view), image(2, 3, 8, 6)
    reports: list[rmfx.Report] = []
    compiled = torch.compile(
        model, backend="rmfx", options={"backend": "eager", "on_report": reports.append}
    )
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=1e-10)
    assert [report.removed for report in reports] == [1]


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.view(x.size(0), 2, 4, 8, 6).transpose(2, 3).reshape(x.shape),  # channel and row
        lambda x: x.reshape(-1, 2, 4, 48).transpose(1, 2).reshape(-1, 8, 8, 6),  # of one size only
        lambda x: x.view(-1, 2, 2, 2, x.size(2), x.size(3)).transpose(1, 3).reshape(x.shape),
        lambda x: x.transpose(2, 3).reshape(x.shape),
        lambda x: (
            x.reshape(x.size(0), -1, 2, x.size(2), x.size(3)).transpose(0, 1).reshape(x.shape)
        ),
    ],
)
def test_what_is_no_shuffle_stays_what_it_is(function: Form) -> None:
    model, x = block(function), image(2, 3, 8, 6)
    for gm in (rmfx.remove_residuals(model, x), rmfx.trace(model, x)):
        assert "ChannelShuffle" not in types(gm)
        assert adds(gm) == 1
        assert_equivalent(model, gm, x)


def test_what_is_read_on_the_way_stays() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        grouped = x.view(x.size(0), 2, 2, x.size(2), x.size(3))
        y = grouped.transpose(1, 2).reshape(x.shape)
        return m.conv(y) + x + grouped.sum(1).repeat(1, 2, 1, 1)

    model = ready(Apply(forward, conv=conv()))
    assert_equivalent(model, rmfx.remove_residuals(model, image()), image())


def test_what_is_written_to_is_not_touched() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.first(x)
        grouped = y.view(y.size(0), 2, 2, y.size(2), y.size(3))
        grouped.mul_(2)
        return m.second(grouped.transpose(1, 2).reshape(y.shape)) + y

    model = ready(Apply(forward, first=conv(), second=conv()))
    assert_equivalent(model, rmfx.remove_residuals(model, image()), image())


def in_pairs(x: Tensor) -> Tensor:
    b, c, h, w = x.size()
    return x.view(b, c // 2, 2, h, w).transpose(1, 2).reshape(b, c, h, w)


def test_groups_that_follow_from_the_channels_of_an_input_are_not_those_of_the_example() -> None:
    model = ready(Apply(lambda _, x: torch.relu(in_pairs(x))))
    gm = rmfx.trace(model, image(2, 4, 8, 6))
    for channels in (4, 8, 12):
        assert torch.equal(gm(image(2, channels, 5, 5)), model(image(2, channels, 5, 5)))
    fixed = rmfx.trace(ready(chain(conv(3, 8), Apply(lambda _, x: in_pairs(x)))), image(2, 3, 8, 6))
    assert types(fixed)[-1] == "ChannelShuffle"


@pytest.mark.parametrize("sizes", [(4, 12), (7, 5), (3, 4), (5, 6), (2, 2)])
def test_a_shuffle_of_rows_is_none_of_channels(sizes: tuple[int, int]) -> None:
    def rows(_: Any, x: Tensor) -> Tensor:
        b, c, h, w = x.size()
        return x.reshape(b, c * h, 2, w // 2).transpose(1, 2).reshape(b, c, h, w)

    height, width = sizes[0], 2 * sizes[1]
    model = ready(chain(conv(3, 8), Apply(rows)))
    gm = rmfx.trace(model, image(2, 3, height, width))
    assert "ChannelShuffle" not in types(gm)
    assert torch.equal(gm(image(2, 3, height, width)), model(image(2, 3, height, width)))


@given(
    groups=st.integers(1, 4), each=st.integers(1, 4), dims=st.integers(1, 3), export=st.booleans()
)
def test_any_shuffle_is_found(groups: int, each: int, dims: int, export: bool) -> None:
    def shuffle(_: Any, x: Tensor) -> Tensor:
        grouped = x.view(x.size(0), groups, each, *[x.size(i + 2) for i in range(dims)])
        return grouped.transpose(1, 2).reshape(x.shape)

    channels = groups * each
    model = ready(chain(conv(channels, channels, dims=dims), Apply(shuffle)))
    x = image(2, channels, *[5, 4, 3][:dims])
    gm = rmfx.trace(torch.export.export(model, (x,)) if export else model, x)
    if channels > 1:
        assert types(gm)[-1] == "ChannelShuffle"
    assert torch.equal(gm(x), model(x))
