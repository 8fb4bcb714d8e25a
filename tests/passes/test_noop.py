"""Removal of what does nothing at inference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from builders import Apply, assert_same, chain, conv, image, ready, snapshot, types
from torch import Tensor, fx, nn

import rmfx
from rmfx.testing import assert_equivalent

NOOPS: dict[str, Callable[[], nn.Module]] = {
    "identity": nn.Identity,
    "dropout": lambda: nn.Dropout(0.4),
    "dropout of channels": lambda: nn.Dropout2d(0.4),
    "alpha dropout": lambda: nn.AlphaDropout(0.4),
    "alpha dropout of channels": lambda: nn.FeatureAlphaDropout(0.4),
    "in-place dropout": lambda: nn.Dropout(inplace=True),
    "F.dropout": lambda: Apply(lambda m, x: F.dropout(x, 0.5, m.training)),
    "F.dropout2d": lambda: Apply(lambda m, x: F.dropout2d(x, 0.5, training=False)),
    "clone": lambda: Apply(lambda m, x: x.clone()),
    "detach": lambda: Apply(lambda m, x: x.detach()),
    "x + 0": lambda: Apply(lambda m, x: 0 + x + 0 - 0),
    "x * 1": lambda: Apply(lambda m, x: 1 * x * 1),
}


@pytest.mark.parametrize("name", NOOPS)
def test_noop_between_layers_disappears(name: str) -> None:
    model = ready(chain(conv(), NOOPS[name](), nn.ReLU(), NOOPS[name]()))
    before = snapshot(model)
    result = rmfx.remove_noops(model)
    assert types(result) == ["Conv2d", "ReLU"]
    assert [node.op for node in result.graph.nodes] == [
        "placeholder",
        *["call_module"] * 2,
        "output",
    ]
    assert_equivalent(model, result, image())
    assert_same(before, snapshot(model))
    assert types(rmfx.remove_noops(result)) == ["Conv2d", "ReLU"]


def test_stochastic_depth_of_torchvision_disappears() -> None:
    vision = pytest.importorskip("torchvision.ops")
    model = ready(chain(conv(), vision.StochasticDepth(0.5, "row"), nn.ReLU()))
    result = rmfx.remove_noops(model, image())
    assert not any(node.op == "call_function" for node in result.graph.nodes)
    assert_equivalent(model, result, image())


@fx.wrap
def stochastic_depth(x: Tensor, p: float, mode: str, training: bool = True) -> Tensor:
    """What others name as torchvision names it."""
    return x * 3


def test_a_function_goes_by_what_it_is_not_by_its_name() -> None:
    model = ready(
        Apply(lambda m, x: m.a(stochastic_depth(x, 0.5, "row", training=False)), a=conv())
    )
    result = rmfx.remove_noops(model)
    assert [n.op for n in result.graph.nodes].count("call_function") == 1
    torch.testing.assert_close(result(image()), model(image()))


def test_network_of_noops_returns_its_input() -> None:
    model = ready(chain(nn.Identity(), nn.Dropout(0.5)))
    result = rmfx.remove_noops(model)
    assert [n.op for n in result.graph.nodes] == ["placeholder", "output"]
    assert_equivalent(model, result, image())


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: x * 1.0,  # would turn integers into floats
        lambda m, x: x / 1,
        lambda m, x: 0 - x,
        lambda m, x: x + 1,
        lambda m, x: x * 0,
        lambda m, x: torch.add(x, x, alpha=0),
    ],
)
def test_what_does_something_stays(function: Callable[[nn.Module, Tensor], Tensor]) -> None:
    model = Apply(function).eval()
    x = torch.arange(-6, 6).reshape(1, 3, 2, 2)
    result = rmfx.remove_noops(model, x)
    assert [n.op for n in result.graph.nodes].count("call_function") == 1
    assert_equivalent(model, result, x)


def test_dropout_that_works_in_training_stays() -> None:
    model = Apply(lambda m, x: F.dropout(x, 0.5, training=True)).eval()
    result = rmfx.remove_noops(model)
    torch.manual_seed(5)
    expected = model(image())
    torch.manual_seed(5)
    assert torch.equal(result(image()), expected)


def test_identity_with_a_hook_stays() -> None:
    model = ready(chain(conv(), nn.Identity()))
    model[1].register_forward_hook(lambda module, args, output: output * 2)
    result = rmfx.remove_noops(model)
    assert types(result) == ["Conv2d", "Identity"]
    assert_equivalent(model, result, image())


def test_clone_that_saves_a_value_from_a_later_write_stays() -> None:
    """The view keeps the write from being made functional, so the copy is needed."""

    def forward(m: Any, x: Tensor) -> Any:
        y = m.conv(x)
        view = y.view(-1)
        saved = y.clone()
        view.mul_(2.0)
        return saved - y

    model = ready(Apply(forward, conv=conv()))
    assert_equivalent(model, rmfx.remove_noops(model), image())


def test_clone_of_an_input_that_is_written_later_stays() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        saved = x.clone()
        x.add_(1.0)
        return saved * x

    model = Apply(forward).eval()
    assert_equivalent(model, rmfx.remove_noops(model), image())


def test_write_into_a_clone_leaves_the_original_alone() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        y = x.clone()
        y.mul_(3)
        return x + y

    model = Apply(forward).eval()
    assert_equivalent(model, rmfx.remove_noops(model), image())


@pytest.mark.parametrize("copy", ["method", "function"])
def test_a_clone_that_rearranges_memory_stays(copy: str) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = x.transpose(1, 2)
        options = {"memory_format": torch.contiguous_format}
        z = y.clone(**options) if copy == "method" else torch.clone(y, **options)
        return z.view(x.shape[0], -1)

    model = Apply(forward).eval()
    assert_equivalent(model, rmfx.remove_noops(model, image()), image())


@pytest.mark.parametrize("example", [True, False])
@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.c(x) * ((x > 0) * 1 + (x > -1) * 1),
        lambda m, x: m.c(x) * (((x > 0) + 0) - ((x > 1) * 1)),
        lambda m, x: m.c(x) * (1 - (x > 0) * 1),
    ],
)
def test_one_times_a_truth_value_is_a_whole_number(forward: Any, example: bool) -> None:
    model, x = ready(Apply(forward, c=conv())), image()
    for verb in (rmfx.remove_noops, rmfx.merge_branches, rmfx.remove_residuals):
        gm = verb(model, x if example else None, verify=False)
        torch.testing.assert_close(gm(x), model(x))
