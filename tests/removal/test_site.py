"""Sites as they are found: fork, branches, and the reasons why there is none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from builders import Apply, conv, image, ready
from torch import Tensor, nn

import rmfx
from rmfx.algebra.affine import AffineConv
from rmfx.errors import Refusal
from rmfx.ir.net import Net
from rmfx.removal.site import Norm, Site, find_sites

Forward = Callable[[Any, Tensor], Any]


def find(
    forward: Forward,
    x: Tensor | None = None,
    *,
    join: int = -1,
    keep_norms: bool = False,
    shapes: bool = True,
    **parts: Any,
) -> Site | Refusal | None:
    """The site of the last add."""
    given = {
        "a": conv(),
        "b": conv(),
        "bn": nn.BatchNorm2d(4),
        "c": nn.Parameter(torch.rand(4, 1, 1)),
    }
    x = image() if x is None else x
    net = Net(rmfx.trace(ready(Apply(forward, **(given | parts))), x if shapes else None))
    adds = [n for n in net.graph.nodes if n.target in (torch.add, torch.sub)]
    found = find_sites(net, adds[join], keep_norms=keep_norms)
    return found[0] if isinstance(found, list) else found


def kinds(site: Site | Refusal | None) -> list[list[str]]:
    assert isinstance(site, Site), site
    return [[type(s.layer).__name__ for s in branch] for branch in site.branches]


def test_a_block_has_a_fork_and_two_branches() -> None:
    site = find(lambda m, x: x + m.b(F.relu(m.a(x))))
    assert kinds(site) == [[], ["AffineConv", "Activation", "AffineConv"]]
    assert isinstance(site, Site)
    assert (site.fork.name, site.channels, site.dims, site.dtype) == ("x", 4, 2, torch.float64)
    assert [n.name for n in site.nodes] == ["a", "relu", "b", "add"]


@pytest.mark.parametrize("shape", [(4,), (1, 1, 1, 4)])
@pytest.mark.parametrize("pooled", [(1, 2), (-3, -2)])
def test_layers_before_the_fork_tell_where_its_channels_are(
    shape: tuple[int, ...], pooled: tuple[int, ...]
) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = torch.relu(m.a(x))
        return m.b(m.g * (x * x.mean(pooled, keepdim=True)) + x)

    parts = {"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "g": nn.Parameter(torch.rand(shape))}
    site = find(forward, image(2, 5, 3, 4), **parts)
    assert isinstance(site, Site), site
    assert (site.channels, site.dims) == (4, 0)
    model = ready(Apply(forward, **parts))
    converted = rmfx.remove_residuals(model, image(2, 5, 3, 4))
    assert rmfx.report(converted).removed == 1
    for x in (image(1, 7, 3, 4), image(2, 5, 9, 4)):
        torch.testing.assert_close(converted(x), model(x), rtol=1e-10, atol=1e-10)


def test_operands_keep_their_order() -> None:
    assert kinds(find(lambda m, x: m.a(x) + x)) == [["AffineConv"], []]


def test_scales_and_batch_norms_are_merged_into_their_neighbours() -> None:
    assert kinds(find(lambda m, x: m.bn(m.a(x)) * m.c / 2 + x)) == [["AffineConv"], []]


def test_batch_norms_may_stay() -> None:
    site = find(lambda m, x: m.bn(m.a(x)) + x, keep_norms=True)
    assert kinds(site) == [["AffineConv", "Norm"], []]
    assert isinstance(site, Site)
    norm = site.branches[0][1].layer
    assert isinstance(norm, Norm)
    assert isinstance(norm.module, nn.BatchNorm2d)


@pytest.mark.parametrize(
    ("forward", "factor"),
    [
        (lambda m, x: x - m.a(x), -1),
        (lambda m, x: torch.add(x, m.a(x), alpha=3), 3),
    ],
)
def test_factors_become_part_of_the_branch(forward: Forward, factor: float) -> None:
    a = conv()
    site = find(forward, a=a)
    assert kinds(site) == [[], ["AffineConv"]]
    assert isinstance(site, Site)
    layer = site.branches[1][0].layer
    assert isinstance(layer, AffineConv)
    torch.testing.assert_close(layer.weight, factor * a.weight.detach())
    assert site.branches[1][0].value is None  # no node holds the scaled value


def test_the_factor_of_an_activation_is_a_layer_of_its_own() -> None:
    assert kinds(find(lambda m, x: x - F.relu(x))) == [[], ["Activation", "AffineConv"]]


def test_a_value_added_to_itself_has_two_empty_branches() -> None:
    assert kinds(find(lambda m, x: x + x)) == [[], []]


def test_features_and_tokens_have_no_space() -> None:
    for shape in ((2, 4), (2, 5, 4), (2, 3, 5, 4)):
        site = find(lambda m, x: x + m.a(x), image(*shape), a=nn.Linear(4, 4))
        assert isinstance(site, Site)
        assert (site.dims, site.channels) == (0, 4)


def test_what_adds_no_two_tensors_is_no_site() -> None:
    assert find(lambda m, x: m.a(x) + 1) is None


@pytest.mark.parametrize(
    ("forward", "options", "reason"),
    [
        (lambda m, x: x + torch.softmax(m.a(x), 1), {}, "softmax"),
        (lambda m, x: m.a(x) + x.cumsum(2), {}, "cumsum"),
        (lambda m, x: x + m.one(x), {"one": conv(4, 1)}, "broadcasts"),
        (lambda m, x: x + F.adaptive_avg_pool2d(x, 1), {}, "AdaptiveAvgPool2d"),
        (lambda m, x: x + m.f(x), {"f": nn.Conv2d(4, 4, 1), "x": image(4, 5, 5)}, "batched"),
        (lambda m, x: x + F.relu(x), {"shapes": False}, "example_inputs"),
        (lambda m, x: x + m.b(m.p(m.a(x))),
         {"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "p": nn.PReLU(4),
          "x": image(2, 4, 4)}, "dimension 1"),
        (lambda m, x: m.a(x) + m.bn(x), {"bn": nn.BatchNorm2d(4, track_running_stats=False)},
         "running statistics"),
        (lambda m, x: x.relu_() + m.a(x), {}, "network's input"),
    ],
)  # fmt: skip
def test_what_is_no_site_is_refused(forward: Forward, options: dict[str, Any], reason: str) -> None:
    found = find(forward, **options)
    assert isinstance(found, Refusal), found
    assert reason in found.reason
    assert found.nodes


def test_operands_of_two_inputs_are_no_residual_connection() -> None:
    class TwoInputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = conv()

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.a(x) + y

    gm = rmfx.remove_residuals(TwoInputs().eval())
    (row,) = rmfx.report(gm).rows
    assert (row.status, "different inputs, x and y" in row.reason) == ("other", True)


def test_mixed_weight_types_are_refused() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = conv().double(), conv().float()

        def forward(self, x: Tensor) -> Tensor:
            return x + self.b(self.a(x).float())

    model = Mixed().eval()
    gm = rmfx.remove_residuals(model, image())
    assert rmfx.report(gm).removed == 0
    torch.testing.assert_close(gm(image()), model(image()))


def test_activations_of_inner_sites_can_be_crossed() -> None:
    def inner(m: Any, x: Tensor) -> Any:
        return x + m.b(F.silu(m.a(x)))

    model = ready(Apply(lambda m, x: x + m.c(inner(m, x)), a=conv(), b=conv(), c=conv()))
    gm = rmfx.remove_residuals(model, image())
    assert rmfx.report(gm).removed == 2
    torch.testing.assert_close(gm(image()), model(image()), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", [(2, 5, 7, 8), (3, 5, 8)])
def test_channels_come_last_where_only_that_fits_what_stands_on_the_way(shape: Any) -> None:
    """A response norm of channels-last networks: γ·(x·n(x)) + x."""

    class Response(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 6)
            self.gamma = nn.Parameter(torch.randn(8))
            if len(shape) == 4:
                self.gamma = nn.Parameter(torch.randn(1, 1, 1, 8))

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.a(x))
            n = x.norm(dim=1, keepdim=True) if len(shape) == 3 else x.mean((1, 2), keepdim=True)
            return self.b(self.gamma * (x * n) + x)  # type: ignore[no-any-return]

    model, x = Response().double().eval(), torch.randn(shape, dtype=torch.float64)
    converted = rmfx.remove_residuals(model, x)
    assert rmfx.report(converted).adds_left == 0, str(rmfx.report(converted))
    for size in (3, 9):
        y = torch.randn(shape[0] + 1, size, *shape[2:], dtype=torch.float64)
        assert (converted(y) - model(y)).abs().max() <= 1e-10
