"""A number of dimensions is demanded where something depends on it, and nowhere else."""

from __future__ import annotations

import contextlib
import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from builders import Apply, Residual, basic_branch, chain, conv, conv_branch, image, ready
from torch import Tensor, fx, nn

import rmfx
from rmfx.ir.conditions import has_conditions
from rmfx.testing import random_statistics

FREE: dict[str, tuple[Any, tuple[int, ...], tuple[int, ...]]] = {
    "convolutions": (lambda: Residual(conv_branch(nn.SiLU())), (2, 4, 8, 6), (4, 5, 7)),
    "batch norm, which takes batches only": (lambda: Residual(basic_branch()), (2, 4, 8, 6), ()),
    "linear layers": (
        lambda: Residual(chain(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4))),
        (2, 4),
        (3, 5, 4),
    ),
    "what does nothing": (
        lambda: Apply(
            lambda m, x: torch.relu(m.none(m.a(x.clone().detach()) * 1) + 0),
            a=conv(),
            none=chain(nn.Identity(), nn.Dropout()),
        ),
        (2, 4, 8, 6),
        (4, 5, 7),
    ),
    "nothing that can be rewritten": (
        lambda: Apply(lambda m, x: x[:, :2] * F.softmax(x[:, 2:], 1)),
        (2, 4, 8, 6),
        (3, 4, 5),
    ),
}


@pytest.mark.parametrize("shapes", [True, False])
@pytest.mark.parametrize("name", FREE)
def test_what_does_not_count_dimensions_demands_none(name: str, shapes: bool) -> None:
    make, size, other = FREE[name]
    model = ready(make())
    options = {"activation": ["masked"]} if "conv" in name else {}
    gm = rmfx.remove_residuals(model, image(*size) if shapes else None, **options)
    if "batch norm" in name:  # a ReLU would become a PReLU with a slope per channel
        gm = rmfx.fold_batch_norm(model, image(*size) if shapes else None)
    assert not has_conditions(gm.graph)
    if other:
        torch.testing.assert_close(gm(image(*other)), model(image(*other)))


COUNTING: dict[str, Any] = {
    "a slope per channel": lambda: Residual(conv_branch(nn.LeakyReLU(0.1))),
    "a slice": lambda: Apply(
        lambda m, x: torch.cat((x[:, :2], x[:, 2:]), 1) + m.a(torch.relu(m.b(x))),
        a=conv(),
        b=conv(),
    ),
    "a mean over space": lambda: Apply(
        lambda m, x: m.l(torch.mean(x + m.a(x), (-2, -1))), a=conv(), l=nn.Linear(4, 3)
    ),
    "a scale per channel": lambda: Apply(
        lambda m, x: x + m.a(x) * m.scale, a=conv(), scale=nn.Parameter(torch.rand(1, 4, 1, 1))
    ),
    "a number of dimensions": lambda: Apply(lambda m, x: x + m.a(x) * x.dim(), a=conv()),
}


@pytest.mark.parametrize("shapes", [True, False])
@pytest.mark.parametrize("name", COUNTING)
def test_what_counts_dimensions_demands_them(name: str, shapes: bool) -> None:
    model = ready(COUNTING[name]())
    gm = rmfx.remove_residuals(model, image(2, 4, 8, 6) if shapes else None)
    torch.testing.assert_close(gm(image(3, 4, 4, 5)), model(image(3, 4, 4, 5)))
    demanding = shapes or name in ("a slope per channel", "a slice", "a scale per channel")
    if demanding and name != "a mean over space":  # counted from the end, as it was written
        with pytest.raises(rmfx.ShapeError, match="converted for 4 dimensions"):
            gm(image(4, 4, 4))
    else:  # nothing was read by the number of dimensions
        torch.testing.assert_close(gm(image(4, 4, 4)), model(image(4, 4, 4)))


def test_batch_norm_of_sequences_takes_an_image_for_a_batch() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y: Tensor = m.norm(m.conv(x))
        return y

    parts = {"conv": conv(4, 4, 1, dims=1), "norm": nn.BatchNorm1d(4)}
    model = ready(Apply(forward, **parts))
    gm = rmfx.fold_batch_norm(model, image(2, 4, 4))
    model(image(4, 4))  # of 4 images with 4 features
    with pytest.raises(rmfx.ShapeError, match="converted for 3 dimensions"):
        gm(image(4, 4))


def test_batch_norm_in_front_of_a_convolution_may_read_two_dimensions() -> None:
    """BatchNorm1d takes samples and features, where Conv1d takes channels and positions."""
    model = ready(Apply(lambda m, x: m.c(m.n(x)) + x, n=nn.BatchNorm1d(8), c=nn.Conv1d(8, 8, 1)))
    random_statistics(model, 0)
    for example in (None, image(2, 8, 8)):
        for verb in (rmfx.remove_residuals, rmfx.fold_batch_norm, rmfx.merge_branches):
            gm = verb(model, example)
            for x in (image(8, 8), image(3, 8, 5)):
                try:
                    found = gm(x)
                except rmfx.ShapeError:
                    assert x.dim() == 2
                    continue
                torch.testing.assert_close(found, model(x))


def test_a_constant_may_add_a_dimension() -> None:
    gain = nn.Parameter(torch.rand(1, 8, 1, 1))
    model = ready(Apply(lambda m, x: x + m.c(x) * m.gain, c=conv(8, 8), gain=gain))
    x = image(8, 8, 8)
    for verb in (rmfx.remove_residuals, rmfx.merge_convs, rmfx.merge_branches):
        torch.testing.assert_close(verb(model, x)(x), model(x))


# Ways from an input to a convolution, and the shapes for which it reads a batch.
WAYS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "the input": (lambda x: x, (2, 4, 6, 7)),
    "a transposition": (lambda x: x.transpose(-1, -2), (2, 4, 6, 7)),
    "a new dimension": (lambda x: x.unsqueeze(0), (4, 6, 7)),
    "an index of None": (lambda x: x[None], (4, 6, 7)),
    "the first of several": (lambda x: x[0], (3, 2, 4, 6, 7)),
    "a selection": (lambda x: x.select(1, 0), (2, 3, 4, 6, 7)),
    "a squeeze": (lambda x: x.squeeze(1), (2, 1, 4, 6, 7)),
    "a stack": (lambda x: torch.stack((x, x)), (4, 6, 7)),
    "a resizing": (lambda x: F.interpolate(x, scale_factor=2), (2, 4, 6, 7)),
}
READERS: dict[str, Any] = {
    "a number of dimensions": lambda m, y: (y + m.b(torch.relu(m.c(y)))) * y.dim(),
    "a flattening": lambda m, y: torch.flatten(y + m.b(torch.relu(m.c(y))), 2) * y.dim(),
    "channels": lambda m, y: y[:, :2] * torch.sigmoid((y + m.b(F.silu(m.c(y))))[:, 2:]),
    "a carry": lambda m, y: (y + m.b(F.leaky_relu(m.c(y)))).sum(-1),
}


@pytest.mark.parametrize("verb", [rmfx.trace, rmfx.remove_residuals, rmfx.merge_convs])
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("way", WAYS)
def test_what_a_layer_takes_for_a_batch_is_one(way: str, reader: str, verb: Any) -> None:
    """Without example inputs: right for batches, and right or refused for anything else."""
    begin, shape = WAYS[way]
    model = ready(
        Apply(lambda m, x: READERS[reader](m, m.a(begin(x))), **{n: conv() for n in "abc"})
    )
    gm = verb(model)
    assert_same_numbers(gm, model, shape)
    for other in ((6, 7), (4, 6, 7), (1, 4, 6, 7), (4, 4, 6, 7), (2, 4, 4, 6, 7)):
        if runs(model, other):
            with contextlib.suppress(rmfx.ShapeError):
                assert_same_numbers(gm, model, other)


def norm(kind: type[Any], channels: int = 4) -> nn.Module:
    made: Any = kind(channels, track_running_stats=True, affine=True)
    made.running_mean.uniform_(-1, 1)
    made.running_var.uniform_(0.5, 2)
    return made


# What counts dimensions, the shape of an example and another shape that the network takes.
COUNTED: dict[str, tuple[Any, tuple[int, ...], tuple[int, ...]]] = {
    "a size": (lambda: Apply(lambda m, x: m.a(x) * x.size(1), a=conv()), (2, 4, 8, 7), (4, 8, 7)),
    "a size of a shape": (
        lambda: Apply(lambda m, x: m.a(x) / m.a(x).shape[1] ** 0.5, a=conv()),
        (2, 4, 8, 7),
        (4, 8, 7),
    ),
    "features": (
        lambda: Apply(lambda m, x: m.a(x) / m.a(x).size(1), a=nn.Linear(4, 4)),
        (3, 4),
        (2, 3, 4),
    ),
    "an instance norm of sequences": (
        lambda: chain(nn.Conv1d(4, 4, 3, padding=1), norm(nn.InstanceNorm1d)),
        (2, 4, 4),
        (4, 4),
    ),
    "an instance norm of images": (
        lambda: chain(conv(), norm(nn.InstanceNorm2d)),
        (2, 4, 8, 7),
        (4, 8, 7),
    ),
    "a constant of more dimensions": (
        lambda: Apply(
            lambda m, x: m.c(x * m.w + m.b(torch.relu(m.a(x)))),
            **{name: nn.Linear(4, 4) for name in "abc"},
            w=nn.Parameter(torch.randn(1, 4)),
        ),
        (3, 4),
        (4,),
    ),
    "a constant before a convolution": (
        lambda: Apply(lambda m, x: m.a(x * m.w), a=conv(), w=nn.Parameter(torch.randn(1, 4, 1, 1))),
        (2, 4, 8, 7),
        (4, 8, 7),
    ),
}


@pytest.mark.parametrize("example", [True, False])
@pytest.mark.parametrize("verb", [rmfx.trace, rmfx.remove_residuals, rmfx.merge_convs])
@pytest.mark.parametrize("name", COUNTED)
def test_what_counts_dimensions_is_right_or_refused(name: str, verb: Any, example: bool) -> None:
    make, shape, other = COUNTED[name]
    model = ready(make())
    gm = verb(model, image(*shape)) if example else verb(model)
    assert_same_numbers(gm, model, shape)
    assert runs(model, other)
    with contextlib.suppress(rmfx.ShapeError):
        assert_same_numbers(gm, model, other)


def test_what_is_demanded_behind_an_operation_stays_in_order() -> None:
    """What a graph demands of its inputs stands in front, though it calls the same as others."""

    def forward(m: Any, x: Any) -> Any:
        y = x[:, :4].repeat_interleave(2, 1)[:, 1:5]
        return (m.a(y) + m.b(x[:, :4])) * m.a(y).dim()

    model = ready(Apply(forward, a=conv(), b=conv()))
    once = rmfx.remove_residuals(model)
    twice = rmfx.merge_convs(once)
    assert len(twice.graph.nodes) == len(once.graph.nodes)
    for gm in (once, twice):
        assert_same_numbers(gm, model, (2, 5, 6, 7))


BEFORE: dict[str, Any] = {
    "a write": lambda x: F.leaky_relu_(torch.mul(x * 1.0, 0.5, out=x.new_empty(x.shape)), 0.3),
    "two writes": lambda x: F.rrelu(_half(F.hardtanh(x)), inplace=True),
    "a write by an operator": lambda x: (x * 2).sin_(),
    "a write in Python": lambda x: operator.iadd(x * 2, 1),
    "an operation": lambda x: torch.cumsum(x, 3),
}


def _half(x: Tensor) -> Tensor:
    torch.mul(x, 0.5, out=x)
    return x


@pytest.mark.parametrize("name", BEFORE)
@pytest.mark.parametrize("times", [1, 2, 3])
def test_what_comes_before_a_demand_runs_once(name: str, times: int) -> None:
    """Of a value inside the network, too, which is no condition on the inputs."""
    slopes = nn.Parameter(torch.rand(4))
    model = ready(Apply(lambda m, x: F.prelu(m.c(BEFORE[name](x)), m.w), c=conv(), w=slopes))
    gm = fx.symbolic_trace(model)
    operations = ("call_module", "call_function", "call_method")
    calls = sum(node.op in operations for node in gm.graph.nodes)
    for _ in range(times):
        gm = rmfx.remove_residuals(gm)
    assert has_conditions(gm.graph)
    aside = ("rmfx.ir.conditions",)
    made = (n for n in gm.graph.nodes if getattr(n.target, "__module__", None) not in aside)
    assert sum(node.op in operations for node in made) == calls
    for shape in ((2, 4, 6, 5), (1, 4, 3, 3)):
        assert_same_numbers(gm, model, shape)


def runs(model: nn.Module, shape: tuple[int, ...]) -> bool:
    try:
        model(image(*shape))
    except (RuntimeError, IndexError):
        return False
    return True


def assert_same_numbers(gm: Any, model: Any, shape: tuple[int, ...]) -> None:
    x = image(*shape)
    torch.testing.assert_close(gm(x), model(x), rtol=1e-9, atol=1e-9)
