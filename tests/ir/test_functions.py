"""Whose a function is, and what it is called."""

from __future__ import annotations

import builtins
import math
import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from rmfx.ir.functions import COMPUTING, IN_PLACE_SYMBOLS, WRITING, is_trusted, torch_name


def split(x: Tensor) -> Tensor:
    """A function that has a name in common with one of torch's."""
    return x


def called(target: Any) -> fx.Node:
    graph = fx.Graph()
    return graph.call_function(target, (graph.placeholder("x"),))


@pytest.mark.parametrize(
    ("target", "name"),
    [
        (torch.split, "split"),
        (torch.amax, "amax"),
        (F.pad, "pad"),
        (torch.Tensor.split, "split"),
        (torch.Tensor.permute, "permute"),
        (torch.ops.aten.split, "split"),
        (torch.ops.aten.split.Tensor, "split.Tensor"),
        (torch.sym_max, "sym_max"),
    ],
)
def test_what_torch_means_by_a_name(target: Any, name: str) -> None:
    assert torch_name(called(target)) == name
    assert is_trusted(target)


@pytest.mark.parametrize("target", [split, builtins.sum, operator.add, math.floor])
def test_what_is_not_torchs_has_no_name_of_torch(target: Any) -> None:
    assert torch_name(called(target)) == ""
    assert not is_trusted(target)


def test_python_has_what_the_tables_name() -> None:
    for name in (*IN_PLACE_SYMBOLS, *WRITING):
        assert hasattr(operator, name)
    missing = {name for name in COMPUTING if not hasattr(operator, name)}
    assert missing == {"and", "or"}  # keywords, which `and_` and `or_` stand for
