"""One thing that changes is one place: what is taken out there is refused, and back in it works."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from builders import Apply, Residual, chain, conv, image, ready
from torch import nn

import rmfx
from rmfx import choices, fuzz
from rmfx.algebra.activation import TABLE
from rmfx.frontend.calls import CALLS
from rmfx.ir.kinds import NEUTRAL
from rmfx.passes.pruning import METERS
from rmfx.timing.runtimes import RUNTIMES


def removed(model: nn.Module) -> bool:
    return rmfx.report(rmfx.remove_residuals(model, image())).removed == 1


def way(model: nn.Module) -> str | None:
    """How the carry of the one site passes the activation."""
    (row,) = rmfx.report(rmfx.remove_residuals(model, image())).rows
    return row.strategy


def test_an_activation_needs_no_entry_and_a_row_of_the_table_says_what_else_it_can(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    by_module = ready(Residual(chain(conv(), nn.LeakyReLU(), conv())))
    parts = {"a": conv(), "b": conv()}
    by_function = ready(Apply(lambda m, x: x + m.b(F.leaky_relu(m.a(x))), **parts))
    assert way(by_module) == way(by_function) == "per-channel"
    monkeypatch.delitem(TABLE, nn.LeakyReLU)
    assert way(by_module) == "masked"
    monkeypatch.delitem(CALLS, F.leaky_relu)
    monkeypatch.delitem(CALLS, torch.ops.aten.leaky_relu.default)
    assert way(by_function) == "masked"


def test_a_gate_is_an_entry_of_what_is_neutral(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(m: Any, x: Any) -> Any:
        y = m.a(x)
        return x + m.b(torch.maximum(y, m.c(y)))

    model = ready(Apply(forward, a=conv(), b=conv(), c=conv()))
    assert removed(model)
    monkeypatch.delitem(NEUTRAL, torch.maximum)
    assert not removed(model)


def test_what_may_be_chosen_is_what_there_is() -> None:
    assert tuple(RUNTIMES) == choices.RUNTIMES
    assert (*METERS, "latency") == choices.COSTS
    assert [fuzz.load_pass(name).__name__ for name in choices.PASSES] == list(choices.PASSES)
