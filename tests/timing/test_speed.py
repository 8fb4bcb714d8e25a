"""What is said of times that were measured in turn: their ratio, and whether it is noise."""

from __future__ import annotations

import pytest

from rmfx.table import FEWEST_ROUNDS
from rmfx.timing.paired import Paired
from rmfx.timing.speed import is_faster, is_noise, ratio_of, time_after


@pytest.mark.parametrize(
    ("rounds", "wins", "faster"),
    [(1, 1, False), (5, 5, False), (6, 6, True), (15, 11, False), (15, 12, True), (60, 39, True)],
)
def test_a_form_is_faster_by_the_sign_test_on_its_rounds(
    rounds: int, wins: int, faster: bool
) -> None:
    before = (1.0,) * rounds
    after = (0.9,) * wins + (1.1,) * (rounds - wins)
    assert is_faster(before, after) is faster
    assert not is_faster(after, before)
    assert is_noise(before, after) is is_noise(after, before) is not faster


def test_equal_times_are_noise() -> None:
    assert is_noise((1.0,) * 20, (1.0,) * 20)
    assert is_noise((), ())


def test_too_few_rounds_are_not_called_noise() -> None:
    """So few that no sign test could tell, however far apart the forms are."""
    fewest = next(n for n in range(99) if is_faster((1.0,) * n, (0.5,) * n))
    assert fewest == FEWEST_ROUNDS
    few, enough = (Paired((1.0,) * n, (1.8,) * n) for n in (fewest - 1, fewest))
    assert few.told_ratio == "1.80 (1.80 to 1.80), too few rounds to tell (it takes 6)"
    assert few.doubt == "too few rounds"
    assert few.to_dict()["ratio"]["beyond_noise"] is False
    assert enough.told_ratio == "1.80 (1.80 to 1.80)"
    assert enough.doubt == ""
    assert Paired((1.0,) * fewest, (1.0,) * fewest).doubt == "noise"


def test_the_time_after_agrees_with_the_ratio() -> None:
    """A slower spell met most rounds of one form only, so that the medians say the opposite."""
    before, after = (1.0, 1.0, 3.0, 3.0, 1.0), (0.9, 0.9, 2.0, 2.0, 2.0)
    assert sorted(before)[2] < sorted(after)[2]
    assert ratio_of(before, after) == (0.9, 2 / 3, 0.9)
    assert time_after(before, after) == (0.9, 2 / 3, 0.9)
