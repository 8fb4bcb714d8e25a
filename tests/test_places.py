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


def test_an_activation_is_a_row_of_the_table_and_its_functions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    by_module = ready(Residual(chain(conv(), nn.Softsign(), conv())))
    parts = {"a": conv(), "b": conv()}
    by_function = ready(Apply(lambda m, x: x + m.b(F.softsign(m.a(x))), **parts))
    assert removed(by_module)
    assert removed(by_function)
    monkeypatch.delitem(CALLS, F.softsign)
    assert removed(by_module)
    assert not removed(by_function)
    monkeypatch.delitem(TABLE, nn.Softsign)
    assert not removed(by_module)


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
