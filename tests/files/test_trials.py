"""Inputs on which networks are compared, and how far outputs are from each other."""

from __future__ import annotations

import pytest
import torch

from rmfx.errors import VerificationError
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


def root(x: torch.Tensor) -> torch.Tensor:
    return x.sqrt()


def test_where_random_numbers_give_none_the_example_is_taken() -> None:
    x = torch.tensor([[1.0, 4.0], [9.0, 16.0]])
    (made,), output = Trials((x,)).run(root, batch=3)
    assert made.tolist() == [[1, 4], [9, 16], [1, 4]]
    assert torch.equal(output, made.sqrt())
    (made,), output = Trials((x,)).run(torch.relu, batch=3)
    assert not torch.equal(made[:2], x)
    assert torch.equal(output, torch.relu(made))


@pytest.mark.parametrize(
    "trials",
    [
        Trials((torch.zeros(2, 2),)),  # which tell a shape
        Trials((-torch.ones(2, 2),)),
        Trials((torch.full((2, 2), 9.0),), input_range=(-2, -1)),  # which is outside
        Trials((torch.ones(2, 2),), samples=[[-torch.ones(2, 2)]]),
    ],
)
def test_where_nothing_gives_numbers_the_way_out_is_told(trials: Trials) -> None:
    with pytest.raises(VerificationError, match=r"NaN or Inf on random inputs.*--inputs FILE"):
        trials.run(root)


def test_the_example_is_of_no_use_where_it_is_zeros() -> None:
    indices = torch.tensor([3, 4])
    assert list(Trials((torch.zeros(2), indices)).own()) == []
    (own,) = Trials((torch.ones(2), indices, torch.tensor(2.0))).own(batch=3)
    assert [x.tolist() for x in own] == [[1, 1, 1], [3, 4, 3], 2]
