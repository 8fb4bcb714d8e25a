"""Joins of values whose dimensions were swapped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from builders import Apply, chain, conv, image, ready, types
from torch import Tensor, nn

import rmfx
from rmfx.testing import assert_equivalent

Forward = Callable[[Any, Tensor], Tensor]
BLOCKS: dict[str, Forward] = {
    "transposed": lambda m, x: x + m.b(F.relu(m.a(x.transpose(1, 2)))).transpose(1, 2),
    "other words": lambda m, x: m.drop(m.b(F.relu(m.a(x.mT))).permute(0, 2, 1)) - x,
    "an activation behind": lambda m, x: x + F.gelu(m.b(m.a(x.swapaxes(-1, 1))).swapaxes(1, 2)),
    "channels last": lambda m, x: x + m.p(x.mT).transpose(1, 2),
}


def blocks(forward: Forward, norm: Callable[[], nn.Module] = nn.Identity) -> Any:
    def block() -> nn.Module:
        parts = {"a": conv(4, 6, 5, dims=1), "b": conv(6, 4, 3, dims=1), "p": conv(4, 4, 1, dims=1)}
        return Apply(forward, **parts, drop=nn.Dropout(), norm=norm())

    return ready(chain(nn.Linear(3, 4), block(), norm(), block(), nn.Linear(4, 2)))


AUTO = torch.export.Dim.AUTO
X = image(2, 9, 3)
OTHERS = (image(1, 9, 3), image(3, 4, 3), image(2, 3, 3))


@pytest.mark.parametrize("name", BLOCKS)
def test_residual_connections_of_tokens_beside_convolutions_are_removed(name: str) -> None:
    model = blocks(BLOCKS[name])
    program = torch.export.export(model, (X,), dynamic_shapes=({0: AUTO, 1: AUTO},))
    for source in (model, torch.export.export(model, (X,)), program):
        converted = rmfx.remove_residuals(source, X)
        report = rmfx.report(converted)
        assert (report.removed, report.refused) == (2, 0), str(report)
        for x in (X, *(OTHERS if source in (model, program) else ())):
            torch.testing.assert_close(converted(x), model(x), rtol=1e-10, atol=1e-10)


def test_blocks_behind_one_another_need_no_swaps_between() -> None:
    gm = rmfx.trace(blocks(BLOCKS["transposed"]), X)
    assert sum("transpose" in str(node.target) for node in gm.graph.nodes) == 2
    assert types(gm) == ["Linear", "Conv1d", "ReLU", "Conv1d", "Identity"] + [
        *("Conv1d", "ReLU", "Conv1d", "Linear"),
    ]


def test_norms_of_tokens_between_blocks_stay() -> None:
    model = blocks(BLOCKS["transposed"], lambda: nn.LayerNorm(4))
    converted = rmfx.remove_residuals(model, X)
    assert rmfx.report(converted).removed == 2
    for x in (X, *OTHERS):
        assert_equivalent(model, converted, (x,))


STAYING: dict[str, Forward] = {
    "never back": lambda m, x: (
        x[:, :4] + m.b(F.relu(m.a(x.transpose(1, 2)))).transpose(1, 2)[:, :4]
    ),
    "read in between": lambda m, x: (
        x + (y := m.b(F.relu(m.a(x.transpose(1, 2)))).transpose(1, 2)) * y.softmax(1)
    ),
    "slopes of tokens": lambda m, x: x + F.prelu(m.b(m.a(x.mT)).transpose(1, 2), m.slopes),
}


@pytest.mark.parametrize("name", STAYING)
def test_what_is_not_undone_stays(name: str) -> None:
    parts = {"a": conv(4, 6, 5, dims=1), "b": conv(6, 4, 3, dims=1)}
    model = ready(Apply(STAYING[name], **parts, slopes=nn.Parameter(torch.rand(9))))
    x = image(2, 9, 4)
    gm = rmfx.trace(model, x)
    torch.testing.assert_close(gm(x), model(x), rtol=1e-12, atol=1e-12)
    assert rmfx.report(rmfx.remove_residuals(model, x)).removed == 0
