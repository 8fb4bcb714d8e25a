"""What is drawn at random in a run is the same each time, and afterwards as if nothing was."""

from __future__ import annotations

import random

import numpy as np
import torch

from rmfx.oracle.runs import seeded


def drawn() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_draws_repeat_and_leave_no_trace() -> None:
    found = []
    for seed in (0, 0, 1):
        with seeded(seed):
            found.append(drawn())
    assert found[0] == found[1]
    assert all(a != b for a, b in zip(found[1], found[2], strict=True))
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    expected = [drawn(), drawn()]
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    first = drawn()
    with seeded():
        drawn()
    assert [first, drawn()] == expected


def test_draws_are_those_of_torch_itself() -> None:
    with seeded(3):
        found = torch.rand(4)
    torch.manual_seed(3)
    assert torch.equal(found, torch.rand(4))
