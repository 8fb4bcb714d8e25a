"""What grows beside a chain is part of a site's row, before and after it is rewritten."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from builders import conv, image, ready
from torch import Tensor, nn

import rmfx

Forward = Callable[[Any, Tensor, Tensor], Any]


class Beside(nn.Module):
    """A residual branch with a second tensor in it."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self.own = forward
        self.a, self.b, self.d = conv(), conv(), conv(8, 4)

    def forward(self, x: Tensor, z: Tensor) -> Any:
        return self.own(self, x, z)


def tapped(m: Any, x: Tensor, z: Tensor) -> Any:
    u = F.relu(m.a(x))
    return x + m.b(u), u * 2


FORWARDS: dict[str, Forward] = {
    "nothing": lambda m, x, z: x + m.b(F.relu(m.a(x))),
    "a sum": lambda m, x, z: x + m.b(F.relu(m.a(x)) + z),
    "a product": lambda m, x, z: x + m.b(F.relu(m.a(x)) * z),
    "a limit": lambda m, x, z: x + m.b(torch.maximum(m.a(x), z)),
    "a bias": lambda m, x, z: x + m.b(F.relu(m.a(x)) + z[:, :, :1, :1]),
    "a concatenation": lambda m, x, z: x + m.d(torch.cat([F.relu(m.a(x)), z], 1)),
    "a reader": tapped,
}


@pytest.mark.parametrize("forward", FORWARDS.values(), ids=[*FORWARDS])
def test_a_row_counts_all_that_is_moved(forward: Forward) -> None:
    model, inputs = ready(Beside(forward)), (image(), image())
    seen: list[Any] = []

    def policy(row: Any) -> bool:
        seen.append(row)
        return True

    converted = rmfx.remove_residuals(model, inputs, policy=policy)
    (row,) = (row for row in rmfx.report(converted).rows if row.status == "removed")
    before, after = (rmfx.cost.count(m, inputs) for m in (model, converted))
    moved = (after.moved - before.moved) / 8 - (after.parameters - before.parameters)
    assert row.moved_after - row.moved_before == moved
    assert [asked.moved_after for asked in seen] == [row.moved_after]


def test_an_addition_that_gets_wider_may_be_what_does_not_pay() -> None:
    """As cheap as a branch can be, and one more tensor in it."""

    def forward(m: Any, x: Tensor, z: Tensor) -> Any:
        return x + m.b(m.a(x) + z)

    model, inputs = ready(Beside(forward)), (image(2, 4, 16, 16), image(2, 4, 16, 16))
    report = rmfx.report(rmfx.remove_residuals(model, inputs, policy="profitable"))
    assert (report.kept, report.other) == (1, 1), str(report)
    assert "it would not pay" in report.rows[-1].reason
