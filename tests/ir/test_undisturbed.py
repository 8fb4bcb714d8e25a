"""What every verb promises of the model that it is given: it is as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from builders import Residual, conv, image, ready
from torch import nn

import rmfx
from rmfx.ir.undisturbed import undisturbed


def new_hook(model: Any) -> None:
    model.register_forward_hook(lambda *given: None)


def other_mode(model: Any) -> None:
    model.get_submodule("branch").train()


def other_tensor(model: Any) -> None:
    model.branch.weight = nn.Parameter(torch.zeros_like(model.branch.weight))


def other_switch(model: Any) -> None:
    model.branch.bias.requires_grad_(False)


def other_module(model: Any) -> None:
    model.branch = nn.Identity()


def new_buffer(model: Any) -> None:
    model.register_buffer("more", torch.zeros(1))


CHANGES = (new_hook, other_mode, other_tensor, other_switch, other_module, new_buffer)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_verb_that_changes_the_model_is_an_error(change: Callable[[Any], None]) -> None:
    @undisturbed
    def spoil(model: nn.Module) -> None:
        change(model)

    with pytest.raises(rmfx.InternalError, match=r"spoil: the model .* is another one now"):
        spoil(ready(Residual(conv())))


def test_a_verb_that_changes_a_graph_is_an_error() -> None:
    @undisturbed
    def spoil(model: nn.Module, what: str) -> None:
        node = next(n for n in model.graph.nodes if n.op == "call_module")
        if what == "name":
            node.name = "another"
        else:
            node.meta["more"] = 1

    for what in ("name", "note"):
        gm = rmfx.trace(ready(Residual(conv())), image())
        with pytest.raises(rmfx.InternalError, match="another one now"):
            spoil(gm, what)


def test_a_verb_that_changes_nothing_gives_what_it_made() -> None:
    @undisturbed
    def look(model: nn.Module, number: int) -> int:
        return number + len(list(model.modules()))

    assert look(ready(Residual(conv())), 40) == 42
