"""Arrangements of a site: which columns there are, what they cost, which comes first."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from builders import Apply, conv, image, ready
from torch import Tensor, nn

import rmfx
from rmfx.algebra.affine import AffineConv
from rmfx.algebra.products import Unmerged
from rmfx.errors import Refusal
from rmfx.ir.net import Net
from rmfx.removal.assembly import Plan, build
from rmfx.removal.columns import Built, Linear, Normalised, Pointwise
from rmfx.removal.plan import plans
from rmfx.removal.site import Site, find_sites
from rmfx.removal.target import MACS, TIME, Target

Forward = Callable[[Any, Tensor], Any]


def site_of(
    forward: Forward, *, keep_norms: bool = False, channels: int = 4, **parts: nn.Module
) -> Site:
    net = Net(rmfx.trace(ready(Apply(forward, **parts)), image(2, channels, 9, 7)))
    join = [n for n in net.graph.nodes if n.target in (torch.add, torch.sub)][-1]
    sites = find_sites(net, join, keep_norms=keep_norms)
    assert isinstance(sites, list), sites
    return sites[0]


def plans_of(forward: Forward, **parts: Any) -> list[Plan]:
    found = plans(site_of(forward, **parts))
    assert not isinstance(found, Refusal), found
    return found


def block(*, act: Callable[[Tensor], Tensor] = F.relu, **parts: nn.Module) -> dict[str, Any]:
    """x (or s(x), where there is an s) beside a, activation, b."""
    given: dict[str, Any] = {"a": conv(), "b": conv()} | parts
    if "s" in parts:
        return {"forward": lambda m, x: m.s(x) + m.b(act(m.a(x))), **given}
    return {"forward": lambda m, x: x + m.b(act(m.a(x))), **given}


def whole(plan: Plan) -> Plan:
    found = plan.with_weights()
    assert not isinstance(found, Refusal), found
    return found


def built(plan: Plan) -> list[AffineConv]:
    columns = build(whole(plan))
    assert not isinstance(columns, Refusal), columns
    return [column.layer for column in columns if isinstance(column, Built)]


def work_of(layers: list[AffineConv]) -> float:
    """Multiply-adds per position of the fork, counted on the built layers."""
    total, area = 0.0, 1.0
    for layer in layers:
        for s in layer.stride:
            area /= s
        total += layer.multiply_adds() * area
    return total


BLOCKS: dict[str, dict[str, Any]] = {
    "basic": block(),
    "bottleneck": {
        "forward": lambda m, x: x + m.c(F.relu(m.b(F.relu(m.a(x))))),
        "a": conv(4, 2, 1), "b": conv(2, 2), "c": conv(2, 4, 1),
    },
    "grouped": {
        "forward": lambda m, x: x + m.c(F.relu(m.b(F.relu(m.a(x))))),
        "a": conv(4, 8, 1), "b": conv(8, 8, groups=4), "c": conv(8, 4, 1),
    },
    "inverted": {
        "forward": lambda m, x: x + m.c(F.relu6(m.b(F.relu6(m.a(x))))),
        "a": conv(4, 8, 1), "b": conv(8, 8, groups=8), "c": conv(8, 4, 1),
    },
    "depthwise first": block(a=conv(4, 4, groups=4), b=conv(4, 4, 1)),
    "grouped first": block(a=conv(4, 6, groups=2), b=conv(6, 4, 1)),
    "depthwise twice": {
        "forward": lambda m, x: x + m.c(F.relu(m.b(F.relu(m.a(x))))),
        "a": conv(4, 4, groups=4), "b": conv(4, 4, groups=4), "c": conv(4, 4, 1),
    },
    "activation first": {"forward": lambda m, x: x + m.a(F.silu(x)), "a": conv()},
    "projection": block(a=conv(4, 6, stride=2), b=conv(6, 6), s=conv(4, 6, 1, stride=2)),
    "narrow projection": block(a=conv(4, 6), b=conv(6, 2), s=conv(4, 2, 1)),
    "wide projection": block(a=conv(4, 6, stride=2), b=conv(6, 6), s=conv(4, 6, 3, stride=2)),
    "single": {"forward": lambda m, x: x + m.a(x), "a": conv()},
    "no conv": {"forward": lambda m, x: x + F.silu(x)},
    "two branches": {
        "forward": lambda m, x: F.relu(m.a(x)) + m.c(F.silu(m.b(x))),
        "a": conv(), "b": conv(), "c": conv(4, 4, 1),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", BLOCKS)
def test_the_work_is_that_of_the_layers_that_get_built(name: str) -> None:
    for plan in plans_of(**BLOCKS[name]):
        assert plan.work == pytest.approx(work_of(built(plan)))


@pytest.mark.parametrize("name", BLOCKS)
def test_the_cheapest_plan_comes_first(name: str) -> None:
    prices = [plan.price for plan in plans_of(**BLOCKS[name])]
    assert prices == sorted(prices)


@pytest.mark.parametrize("name", BLOCKS)
def test_every_plan_fits_together(name: str) -> None:
    for plan in plans_of(**BLOCKS[name]):
        layers = built(plan)
        for before, after in itertools.pairwise(layers):
            assert before.out_channels == after.in_channels
        for column in plan.columns:
            if isinstance(column, Pointwise):
                assert sum(b.width for b in column.blocks) == sum(column.widths)


def test_a_narrow_shortcut_is_carried_behind_its_projection() -> None:
    best = plans_of(**BLOCKS["narrow projection"])[0]
    assert [c.carry.out_channels for c in best.columns if isinstance(c, Linear)] == [2, 2]


def test_a_wide_shortcut_is_carried_before_its_projection() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        y = F.relu(m.stem(x))
        return m.s(y) + m.b(F.relu(m.a(y)))

    parts = {"stem": conv(4, 2), "a": conv(2, 6), "b": conv(6, 8), "s": conv(2, 8, 1)}
    best = plans_of(forward, **parts)[0]
    assert [c.carry.out_channels for c in best.columns if isinstance(c, Linear)] == [2, 8]


def test_the_carry_is_padded_to_the_width_of_the_groups_where_that_is_cheaper() -> None:
    parts = {"a": conv(40, 90, 1), "b": conv(90, 90, groups=3), "c": conv(90, 40, 1)}
    best = plans_of(lambda m, x: x + m.c(F.relu(m.b(F.relu(m.a(x))))), channels=40, **parts)[0]
    layers = built(best)
    # 40 carried channels become 60, two more groups of 30 beside the three of the branch.
    assert (layers[1].groups, layers[1].in_channels) == (5, 150)


def wide(*widths: int, groups: Sequence[int], kernels: Sequence[int]) -> dict[str, Any]:
    """x beside layers of these widths with ReLU between them."""
    layers = [
        conv(ins, outs, kernel, groups=g)
        for (ins, outs), g, kernel in zip(itertools.pairwise(widths), groups, kernels, strict=True)
    ]
    names = "abcdefg"[: len(layers)]

    def forward(m: Any, x: Tensor) -> Any:
        y = getattr(m, names[0])(x)
        for name in names[1:]:
            y = getattr(m, name)(F.relu(y))
        return x + y

    return {"forward": forward, "channels": widths[0], **dict(zip(names, layers, strict=True))}


@pytest.mark.parametrize("target", [TIME, MACS], ids=["time", "macs"])
@pytest.mark.parametrize(
    ("given", "times"),
    [
        # A depthwise layer beside a carry is a depthwise layer of twice the channels; Δ and ∇ of
        # their own are groups, and the 1x1 between them reads and writes any order.
        (wide(64, 64, 64, 64, groups=(64, 1, 64), kernels=(3, 1, 3)), 4.2),
        # Twice M outputs of M inputs: with two copies of these, four groups instead of a dense 3x3.
        (wide(64, 32, 64, 64, groups=(1, 1, 64), kernels=(1, 3, 1)), 3.1),
        # Groups of 8 beside a carry of 8 groups.
        (wide(64, 64, 64, 64, groups=(1, 8, 1), kernels=(1, 3, 1)), 2.1),
    ],
    ids=["depthwise twice", "copies", "groups"],
)
def test_what_layouts_cost_beside_the_block(
    given: dict[str, Any], times: float, target: Target
) -> None:
    found = plans(site_of(**given), target)
    assert isinstance(found, list)
    layers = [layer for layer in given.values() if isinstance(layer, nn.Conv2d)]
    assert found[0].work < times * sum(layer.weight.numel() for layer in layers)


@pytest.mark.parametrize("name", ["depthwise first", "grouped first", "activation first"])
def test_main_and_carry_take_turns_so_that_the_first_layer_stays_grouped(name: str) -> None:
    found = plans(site_of(**BLOCKS[name]), MACS)
    assert isinstance(found, list)
    assert built(found[0])[0].groups > 1
    assert "in turns" in found[0].place


def test_narrow_groups_count_as_if_they_were_wide_where_time_is_the_target() -> None:
    given = wide(64, 64, 64, groups=(64, 1), kernels=(3, 1))
    found = {target: plans(site_of(**given), target)[0] for target in (TIME, MACS)}
    first = {target: built(plan)[0] for target, plan in found.items()}
    assert min(first[TIME].block) >= 8  # Δ of its own
    assert first[MACS].block == (1, 2)  # merged into the depthwise layer
    assert found[MACS].work < found[TIME].work


def test_nothing_is_multiplied_before_a_plan_is_chosen() -> None:
    """A depthwise shortcut of two layers at one place has the shape of their product alone."""
    parts = {"a": conv(4, 6), "b": conv(6, 6), "s": conv(4, 4, groups=4), "t": conv(4, 6, 1)}
    found = plans_of(lambda m, x: m.t(m.s(x)) + m.b(F.relu(m.a(x))), **parts)
    shapes = [c.carry for plan in found for c in plan.columns if isinstance(c, Linear)]
    waiting = [f for f in shapes if isinstance(f, Unmerged)]
    assert waiting
    assert all(f.weight.untyped_storage().nbytes() <= 8 for f in waiting)
    assert not any(
        isinstance(c.carry, Unmerged) for c in whole(found[0]).columns if isinstance(c, Linear)
    )


def test_a_batch_norm_may_stay_between_layers_but_not_at_the_end() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        return x + m.n2(m.b(F.relu(m.n1(m.a(x)))))

    parts = {"a": conv(), "b": conv(), "n1": nn.BatchNorm2d(4), "n2": nn.BatchNorm2d(4)}
    plan = plans_of(forward, keep_norms=True, **parts)[0]
    names = [type(c).__name__ for c in plan.columns]
    assert names == ["Linear", "Normalised", "Pointwise", "Linear"]
    norm = plan.columns[1]
    assert isinstance(norm, Normalised)
    assert norm.carried == 4


def test_equal_activations_of_two_branches_share_a_column() -> None:
    parts = {"a": conv(), "b": conv(), "c": conv(), "d": conv()}
    plan = plans_of(lambda m, x: m.b(F.relu(m.a(x))) + m.d(F.relu(m.c(x))), **parts)[0]
    assert [type(c).__name__ for c in plan.columns] == ["Linear", "Pointwise", "Linear"]


@pytest.mark.parametrize(
    ("forward", "parts", "reason"),
    [
        (lambda m, x: m.a(x) + x[:, :, 1:, 1:], {"a": conv(stride=1)}, "sizes"),
        (lambda m, x: m.a(x)[:, :, :-1] + m.b(x)[:, :, 1:],
         {"a": conv(stride=2), "b": conv(stride=1)}, "stride"),
        (lambda m, x: F.relu(m.a(x)) + F.silu(m.b(x)),
         {"a": conv(stride=2), "b": conv(stride=2, kernel=5, padding=1)}, "do not correspond"),
    ],
)  # fmt: skip
def test_branches_of_other_sizes_are_refused(
    forward: Forward, parts: dict[str, nn.Module], reason: str
) -> None:
    net = Net(rmfx.trace(ready(Apply(forward, **parts))))
    join = next(n for n in net.graph.nodes if n.target is torch.add)
    sites = find_sites(net, join, keep_norms=False)
    assert isinstance(sites, list), sites
    found = plans(sites[0])
    assert isinstance(found, Refusal)
    assert reason in found.reason
    assert found.nodes == (join.name,)
