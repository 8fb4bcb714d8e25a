"""Inputs on which networks are compared, and how far outputs are from each other."""

from __future__ import annotations

import pytest
import torch

from rmfx.files.trials import Trials, relative_error

pytestmark = pytest.mark.oldest


def test_relative_error_sees_every_kind_of_difference() -> None:
    a = torch.tensor([1.0, -2.0])
    assert relative_error(a, a.clone()) == 0
    assert relative_error({"x": a}, {"x": a * 1.5}) == 0.5
    assert relative_error((a, a), (a, a + 1)) == 0.5
    assert relative_error(torch.zeros(2), torch.full((2,), 0.25)) == 0.25
    assert relative_error(torch.zeros(0), torch.zeros(0)) == 0
    for other in (a.double(), a[:1], (a, a), torch.tensor([1.0, float("nan")])):
        assert relative_error(a, other) == float("inf")


def test_random_inputs_keep_shapes_types_and_indices() -> None:
    x, indices, scalar = torch.zeros(2, 3), torch.tensor([[4], [5]]), torch.tensor(1.0)
    made = Trials((x, indices, scalar)).draw(batch=3, seed=1)
    assert [tuple(value.shape) for value in made] == [(3, 3), (3, 1), ()]
    assert made[1].flatten().tolist() == [4, 5, 4]
    assert torch.equal(made[0], Trials((x,)).draw(batch=3, seed=1)[0])
