"""Operators written down, and the numbers that may leave the tensors they run on."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import rmfx.testing  # noqa: F401  (registers an operator that writes and gives nothing back)
from rmfx.errors import RmfxError, WeightValueError
from rmfx.removal.recording import Kind, Recorder, unrecorded

LEAVING: dict[str, Any] = {
    "item": lambda w: w[0, 0].item(),
    "float": lambda w: float(w.sum()),
    "tolist": lambda w: w.tolist(),
    "numpy": lambda w: w.numpy(),
    "a sign": lambda w: bool((w > 0).all()),
    "the largest": lambda w: bool((w.max() == w[0, 0]).any()),
    "near": lambda w: torch.allclose(w, w + 1),
    "a shape": lambda w: w[w > 0],
    "a rounded value": lambda w: bool((w.round() == 1).any()),
    "of a copy in memory": lambda w: float(copy.deepcopy(w)[0, 0]),
    "by a view": lambda w: int((w.detach().t()[1] > 0).sum()),
    "after a write": lambda w: float(torch.zeros(2, 2).copy_(w)[0, 0]),
}
STAYING: dict[str, Any] = {
    "any": lambda w: bool(w.any()),
    "is one": lambda w: bool((w == 1).all()),
    "finite": lambda w: bool(torch.isfinite(w.sum())),
    "equal": lambda w: torch.equal(w, w + w.t()),
    "where it is zero": lambda w: (w != 0).nonzero().tolist(),
    "of zeros like it": lambda w: float(w.new_zeros(3).sum()),
    "a shape": lambda w: w.shape[0],
}


def recorder(w: Tensor, *, may_leave: Kind = Kind.SURE) -> Recorder:
    return Recorder({"w": w}, may_leave=may_leave)


@pytest.mark.parametrize("name", LEAVING)
def test_a_number_leaves(name: str) -> None:
    w = torch.tensor([[0.7, -1.3], [0.6, 1.1]])
    with recorder(w), pytest.raises(WeightValueError, match="may change"):
        LEAVING[name](w)
    LEAVING[name](w)  # nothing is in the way outside


@pytest.mark.parametrize("name", STAYING)
def test_what_almost_all_weights_answer_alike(name: str) -> None:
    w = torch.tensor([[0.7, -1.3], [0.6, 1.1]])
    with recorder(w):
        STAYING[name](w)


def test_whole_numbers_are_particular() -> None:
    w = torch.tensor([1, 0])
    with recorder(w), pytest.raises(WeightValueError):
        bool(w.any())


def test_nothing_leaves_where_nothing_may() -> None:
    w = torch.rand(2)
    with recorder(w, may_leave=Kind.FIXED), pytest.raises(WeightValueError):
        bool(w.any())


def test_kinds() -> None:
    w = torch.rand(2, 2)
    with recorder(w) as record:
        zeros, ones = w.new_zeros(2, 2), torch.ones(2)
        written = torch.zeros(2, 2)
        written[0] = w[0]
        pairs = {
            Kind.FIXED: (zeros, ones, zeros + 1),
            Kind.SURE: (w == 0, torch.isfinite(w)),
            Kind.GENERAL: (w @ w, w.t(), torch.cat([w, zeros]), written, w.detach()),
            Kind.PARTICULAR: (w > 0, w.abs(), w.clamp(min=0), torch.where(w > 0, w, 0.0)),
        }
    for kind, tensors in pairs.items():
        assert [record.kind(t) for t in tensors] == [kind] * len(tensors)


def test_what_is_needed_runs_again_with_the_writes() -> None:
    w = torch.rand(2, 2)
    with recorder(w) as record, torch.no_grad():
        made = w.new_zeros(2, 2)
        made[0] = 2 * w[0]
        torch.rand(3).mul_(w[0, 0])  # nothing of it is needed
    nodes = record.needed({record.node(made)})
    graph, places = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in nodes:
        places[node] = graph.node_copy(node, places.__getitem__)
    graph.output(places[record.node(made)])
    other = torch.rand(2, 2)
    gm = fx.GraphModule({"w": other}, graph)
    assert torch.equal(gm(), torch.stack([2 * other[0], torch.zeros(2)]))
    assert not any("rand" in str(node.target) for node in nodes)


WRITING: dict[str, Any] = {
    "a list": lambda x, w: torch._foreach_add_([x, x], [w, w]),
    "a list, scalar": lambda x, w: torch._foreach_mul_([x.copy_(w)], 3.0),
    "a custom operator": lambda x, w: torch.ops.rmfx_testing.add_into(w, x),
    "out": lambda x, w: torch.add(x, w, out=x),
}


@pytest.mark.parametrize("name", WRITING)
def test_operators_that_give_nothing_back_write(name: str) -> None:
    w = torch.rand(2, 2)
    with recorder(w) as record, torch.no_grad():
        made = torch.zeros(2, 2)
        WRITING[name](made, w)
    graph, places = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in record.needed({record.node(made)}):
        places[node] = graph.node_copy(node, places.__getitem__)
    graph.output(places[record.node(made)])
    other, expected = torch.rand(2, 2), torch.zeros(2, 2)
    WRITING[name](expected, other)
    assert torch.equal(fx.GraphModule({"w": other}, graph)(), expected)
    assert record.kind(made) >= Kind.GENERAL


def test_memory_that_nobody_saw_is_refused() -> None:
    w = torch.rand(4)
    with recorder(w) as record:
        pass
    with pytest.raises(RmfxError, match="follows from the weights"):
        record.node(w[1:3])


def test_a_copy_that_is_written_to_is_no_mere_copy() -> None:
    w = torch.rand(4)
    with recorder(w) as record:
        same, written = w.clone(), w.clone()
        written[0] = 0
    source = record.sources["w"]
    assert record.origin(record.node(same)) is source
    assert record.origin(record.node(written)) is not source


def test_what_runs_unrecorded_leaves_no_trace() -> None:
    w = torch.tensor([[0.7, -1.3], [0.6, 1.1]])
    with recorder(w) as watching:
        with unrecorded():
            assert torch.zeros(3).sum().item() == 0
        assert not watching.graph.find_nodes(op="call_function", target=torch.ops.aten.sum.default)
        assert bool((w + 1).any())  # is followed again
        with pytest.raises(WeightValueError):
            w.sum().item()
    targets = [node.target for node in watching.graph.nodes]
    assert torch.ops.aten.add.Tensor in targets
    assert torch.ops.aten.zeros.default not in targets
