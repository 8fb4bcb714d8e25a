"""Graphs that Dynamo's graphs call become part of them."""

from __future__ import annotations

from typing import Any

import torch
from builders import Apply, conv, image, ready
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import rmfx


def reports_of(model: Any, x: Tensor) -> tuple[list[rmfx.Report], Tensor]:
    found: list[rmfx.Report] = []
    torch._dynamo.reset()
    options = {"backend": "eager", "on_report": found.append}
    with torch.no_grad():
        return found, torch.compile(model, backend="rmfx", options=options)(x)


def assert_compiled(model: Any, x: Tensor, sites: int) -> None:
    reports, found = reports_of(model, x)
    assert [(r.removed, r.refused) for r in reports] == [(sites, 0)], reports
    assert (found - model(x)).abs().max() <= 1e-10 * model(x).abs().max()


def block(m: Any, x: Tensor) -> Tensor:
    y: Tensor = m.b(torch.relu(m.a(x)))
    return y + x


def test_a_checkpoint_in_a_checkpoint() -> None:
    def inner(m: Any, x: Tensor) -> Any:
        return checkpoint(lambda y: block(m, y), x, use_reentrant=False)

    def forward(m: Any, x: Tensor) -> Any:
        return checkpoint(lambda y: m.c(inner(m, y)), x, use_reentrant=False) + x

    assert_compiled(ready(Apply(forward, a=conv(), b=conv(), c=conv())), image(), 2)


def test_several_results_and_a_constant_inside() -> None:
    def part(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        return m.a(x), m.b(x) * torch.tensor(0.5, dtype=x.dtype)

    def forward(m: Any, x: Tensor) -> Any:
        y, z = checkpoint(lambda v: part(m, v), x, use_reentrant=False)
        return x + y, x + z

    model, x = ready(Apply(forward, a=conv(), b=conv())), image()
    reports, found = reports_of(model, x)
    assert [r.removed for r in reports] == [2]
    for one, other in zip(found, model(x), strict=True):
        assert (one - other).abs().max() <= 1e-10
