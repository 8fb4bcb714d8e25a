"""What callers give is checked in one place, and told in one way."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import rmfx
from rmfx.errors import OptionError, ShapeError
from rmfx.options import as_inputs, check_choice, count_of, number_of, shapes_shown, shown


@pytest.mark.parametrize("given", [(1, 3, 8, 8), [1, 3, 8, 8], torch.Size([1, 3, 8, 8])])
def test_a_shape_in_place_of_inputs_is_told(given: Any) -> None:
    with pytest.raises(ShapeError, match=r"pass a tensor, not a shape, such as torch\.zeros\(1, 3"):
        rmfx.remove_residuals(nn.Conv2d(3, 3, 1).eval(), given)


def test_inputs_that_hold_more_than_numbers_are_no_shape() -> None:
    x = torch.zeros(1)
    assert as_inputs(None) is None
    assert as_inputs(()) == ()
    assert as_inputs((x, 3)) == (x, 3)
    assert as_inputs(({"size": 3},)) == ({"size": 3},)


@pytest.mark.parametrize("given", [0.5, np.float32(0.5), torch.tensor(0.5), np.array(0.5)])
def test_a_number_in_any_form_becomes_one_of_python(given: Any) -> None:
    found = number_of("share", given, above=0, most=1)
    assert type(found) is float
    assert found == 0.5


@pytest.mark.parametrize(
    ("given", "bounds", "message"),
    [
        (1.0, {"least": 0, "below": 1}, r"^n=1\.0 must be a number at least 0 and below 1$"),
        (0, {"above": 0, "most": 1}, "^n=0 must be a number above 0 and at most 1$"),
        (math.inf, {"least": 0, "below": math.inf}, "^n=inf must be a finite number at least 0$"),
        (math.nan, {}, "^n=nan must be a number$"),
        ("half", {}, "^n='half' must be a number$"),
        (True, {}, "^n=True must be a number$"),
        (None, {}, "^n=None must be a number$"),
        (torch.ones(2, 3), {}, r"^n=Tensor of shape \(2, 3\) must be a number$"),
        (np.ones(3), {}, r"^n=ndarray of shape \(3,\) must be a number$"),
    ],
)
def test_a_number_out_of_bounds(given: object, bounds: dict[str, float], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        number_of("n", given, **bounds)


def test_no_bound_is_no_bound() -> None:
    assert number_of("n", math.inf, least=0) == math.inf


@pytest.mark.parametrize("given", [3, np.int64(3), torch.tensor(3)])
def test_a_whole_number_in_any_form_becomes_one_of_python(given: Any) -> None:
    assert type(count_of("n", given)) is int
    assert count_of("n", given, 3, 3) == 3


@pytest.mark.parametrize("given", [0, 4, 1.5, "2", True, None, np.bool_(True), torch.ones(2)])
def test_no_whole_number_within_bounds(given: object) -> None:
    with pytest.raises(OptionError, match=r"must be a whole number, at least 1 and at most 3$"):
        count_of("n", given, most=3)


@pytest.mark.parametrize("given", ["c", None, ["a"], np.array(["a", "b"])])
def test_a_word_that_is_not_known(given: object) -> None:
    check_choice("way", "a", ("a", "b"))
    with pytest.raises(OptionError, match=r"^way=.*: choose from a, b$"):
        check_choice("way", given, ("a", "b"))


def test_values_are_shown_briefly() -> None:
    assert shown("a\nb") == "'a\\nb'"
    assert len(shown(list(range(1000)))) == 60
    assert shown(torch.tensor(2)) == "tensor(2)"


def test_arrays_are_shown_by_their_shapes_alone() -> None:
    given = [torch.zeros(2, 3), np.zeros((4, 5)), 1.5]
    assert shapes_shown(given) == "[(2, 3), ndarray of shape (4, 5), 1.5]"
