"""Targets: each has a name, and activations that differ between channels cost what was measured."""

from __future__ import annotations

import pytest
from torch import nn

from rmfx.algebra.activation import Activation, Block
from rmfx.algebra.blockwise import WAYS, all_means
from rmfx.choices import RUNTIMES, STRATEGIES, TARGETS
from rmfx.removal.target import BY_NAME, MACS, TIME, Target

RELU = (Block(4, Activation(nn.ReLU())), Block(4, None))
SILU = (Block(4, Activation(nn.SiLU())), Block(4, None))
EQUAL = (Block(4, Activation(nn.ReLU())), Block(4, Activation(nn.ReLU())))


def test_every_name_is_a_target_and_only_multiply_adds_rearrange() -> None:
    assert tuple(BY_NAME) == TARGETS
    assert [name for name, target in BY_NAME.items() if target.rearranges] == ["macs"]
    assert (BY_NAME["time"], BY_NAME["macs"]) == (TIME, MACS)
    assert [name for name, target in BY_NAME.items() if target.beyond] == [*RUNTIMES]


@pytest.mark.parametrize("name", RUNTIMES)
def test_runtimes_know_what_every_means_costs(name: str) -> None:
    assert {*BY_NAME[name].beyond} == {means for means in WAYS if means != "same"}


def test_of_the_means_allowed_the_cheapest_is_taken_and_the_simplest_of_equals() -> None:
    slow = Target(beyond={"slopes": 9.0, "bounds": 2.0, "masks": 1.0})
    assert all_means(RELU) == ("slopes", "bounds", "masks")
    assert slow.means(RELU, STRATEGIES) == "masks"
    assert slow.means(RELU, ("per-channel",)) == "bounds"
    assert TIME.means(RELU, STRATEGIES) == "slopes"
    assert slow.means(SILU, STRATEGIES) == "masks"
    assert slow.means(EQUAL, STRATEGIES) == "same"


def test_where_none_is_allowed_the_simplest_says_what_is_missing() -> None:
    assert TIME.means(RELU, ("identity",)) == "slopes"
    assert TIME.means(SILU, ("per-channel",)) == "masks"
