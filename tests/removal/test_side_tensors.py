"""Sites whose branch combines other tensors, or whose inner values are read elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from builders import (
    Apply,
    assert_removed,
    chain,
    conv,
    conv_bn,
    image,
    ready,
    types,
)
from torch import Tensor, nn

import rmfx
from rmfx.ir.conditions import take_conditions
from rmfx.ir.converted import copy_graph
from rmfx.testing import assert_equivalent

Forward = Callable[[Any, Tensor], Any]


def excite(m: Any, y: Tensor) -> Tensor:
    """Squeeze and excite."""
    return y * m.gate(m.up(F.relu(m.down(m.pool(y)))))


def gated(gate: nn.Module | None = None, **parts: Any) -> dict[str, nn.Module]:
    squeeze = {"pool": nn.AdaptiveAvgPool2d(1), "down": conv(6, 2, 1), "up": conv(2, 6, 1)}
    layers = {"a": conv(4, 6, 1), "b": conv(6, 6, groups=6), "c": conv(6, 4, 1)}
    return {"gate": nn.Sigmoid() if gate is None else gate} | squeeze | layers | parts


GATES: dict[str, Forward] = {
    "before the last layer": lambda m, x: x + m.c(excite(m, F.relu(m.b(F.relu(m.a(x)))))),
    "before the activation": lambda m, x: x + m.c(F.silu(excite(m, m.b(F.relu(m.a(x)))))),
    "in the middle": lambda m, x: x + m.c(F.relu(m.b(excite(m, F.relu(m.a(x)))))),
    "twice": lambda m, x: x + m.c(excite(m, m.b(excite(m, m.a(x))))),
    "with its factors the other way round": lambda m, x: (
        x
        + m.c((lambda y: torch.mul(m.gate(m.up(m.down(y.mean((2, 3), keepdim=True)))), y))(m.a(x)))
    ),
}


@pytest.mark.parametrize(
    "gate", [nn.Sigmoid(), nn.Hardsigmoid(), nn.Tanh(), nn.Softmax(1)], ids=str
)
@pytest.mark.parametrize("place", GATES)
def test_a_carry_passes_squeeze_and_excite(place: str, gate: nn.Module) -> None:
    model = ready(Apply(GATES[place], **gated(gate)))
    named = place != "with its factors the other way round" and not isinstance(gate, nn.Softmax)
    assert_removed(model, image(), without_inputs=named)


def test_the_gate_at_the_end_of_a_branch() -> None:
    parts = gated(a=conv(4, 6), c=conv(4, 4), down=conv(4, 2, 1), up=conv(2, 4, 1))
    model = ready(Apply(lambda m, x: F.relu(x + excite(m, m.c(F.relu(x)))), **parts))
    assert_removed(model, image())


def test_a_gate_spread_out_like_its_value_leaves_all_sizes_open() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        gate = m.gate(m.up(m.down(y.mean((2, 3), keepdim=True))))
        return x + m.c(y * gate.expand_as(y))

    model = ready(Apply(forward, **gated(a=conv(4, 6), c=conv(6, 4))))
    converted = assert_removed(model, image(), without_inputs=False)
    for shape in [(2, 4, 11, 5), (1, 4, 3, 3)]:
        assert_equivalent(model, converted, [image(*shape)])


@pytest.mark.parametrize("gate", [nn.Sigmoid(), nn.Hardsigmoid()], ids=str)
def test_the_layer_before_a_sigmoid_makes_the_ones(gate: nn.Module) -> None:
    gm = assert_removed(ready(Apply(GATES["before the last layer"], **gated(gate))), image())
    graph = copy_graph(gm)
    take_conditions(graph)
    called = {str(n.target) for n in graph.nodes if n.op == "call_function"}
    assert len(called) == 1, called  # the product; no slice and no padding is left
    assert gm.get_submodule("up").weight.shape == (10, 2, 1, 1)
    assert gm.get_submodule("down").weight.shape == (2, 10, 1, 1)
    assert (gm.get_submodule("down").weight[:, 6:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gate", [nn.Sigmoid(), nn.Hardsigmoid()], ids=str)
def test_the_ones_are_exactly_one(gate: nn.Module, dtype: torch.dtype) -> None:
    model = ready(Apply(GATES["before the last layer"], **gated(gate)), dtype)
    gm = rmfx.remove_residuals(model, image(dtype=dtype))
    up = gm.get_submodule("up")
    made = gate.to(dtype)(up(torch.randn(1, 2, 1, 1).to(dtype)))
    assert (made[:, 6:] == 1).all()


def test_a_gate_that_is_read_elsewhere_is_left_alone() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        g = m.gate(m.up(m.down(m.pool(y))))
        return x + m.c(F.relu(y * g)), g, m.up.weight.sum()

    assert_removed(ready(Apply(forward, **gated())), image())


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: x + m.c(F.relu(m.a(x)) * torch.sigmoid(m.b(x))),
        lambda m, x: x + m.c(m.a(x) * torch.sigmoid(m.a2(x))),
        lambda m, x: x + m.c((lambda y: y * torch.sigmoid(y))(m.a(x))),  # SiLU, spelt out
        lambda m, x: x + m.c((lambda y: y * y)(m.a(x))),
        lambda m, x: x + m.c((lambda y: y * F.relu6(y + 3) / 6)(m.a(x))),
        lambda m, x: x * torch.sigmoid(m.b4(x)) + x,
        lambda m, x: m.s(x) + m.c(m.a(x) * m.b(x)) * 0.5,
        lambda m, x: (lambda y: y + m.c(m.a(y) * m.b(y)))(x - m.s(m.a2(x)[:, :4] * x)),
    ],
)  # fmt: skip
def test_a_carry_passes_a_product_of_two_branches(forward: Forward) -> None:
    parts = {"a": conv(4, 6), "a2": conv(4, 6), "b": conv(4, 6), "c": conv(6, 4), "b4": conv()}
    model = ready(Apply(forward, s=conv(kernel=1), **parts))
    gm = rmfx.remove_residuals(model, image())
    assert rmfx.report(gm).adds_left == 0, str(rmfx.report(gm))
    assert_equivalent(model, gm, image())


CHOICES: dict[str, Forward] = {
    "maximum": lambda m, x: x + m.c(torch.maximum(m.a(x), m.b(x))),
    "a method": lambda m, x: m.s(x) + m.c(F.relu(m.b(x).minimum(m.a(x)))),
    "maxout": lambda m, x: x + torch.maximum(m.e(x), F.silu(m.b4(x))),
    "where": lambda m, x: x + m.c(torch.where(m.a(x) > 0, m.a2(x), m.b(x))),
    "where, the other way": lambda m, x: x + m.c(torch.where(m.pool(m.a(x)) > 0, x[:, :1], m.b(x))),
    "an activation of its own": lambda m, x: x + m.c(
        (lambda y: torch.where(y > 0, y, 0.1 * y))(m.a(x))
    ),
    "a number": lambda m, x: x + m.c(torch.where(m.a(x) > 0, m.b(x), 0.5)),
    "masked": lambda m, x: x + m.c(m.a(x) * (m.b(x) > 0)),
    "a quotient": lambda m, x: x + m.c(F.relu(m.a(x) / (1 + F.relu(m.b(x))))),
    "a difference that stays": lambda m, x: x + m.c(F.relu(m.a(x) - F.max_pool2d(m.b(x), 3, 1, 1))),
    "with a factor": lambda m, x: x + m.c(
        F.relu(torch.add(m.a(x), F.max_pool2d(m.b(x), 3, 1, 1), alpha=0.5))
    ),
    "one gate for all channels": lambda m, x: x + m.c(m.a(x) * torch.sigmoid(m.one(x))),
    "attention to places": lambda m, x: x + m.e(x) * torch.sigmoid(m.one(x)),
    "one summand for all channels": lambda m, x: x + m.c(
        F.relu(m.a(x) + F.max_pool2d(m.one(x), 3, 1, 1))
    ),
    "one limit for all channels": lambda m, x: x + m.c(torch.maximum(m.one(x), m.a(x))),
}  # fmt: skip


@pytest.mark.parametrize("name", CHOICES)
def test_a_carry_passes_a_choice(name: str) -> None:
    parts = {n: conv(4, 6) for n in ("a", "a2", "b")} | {"c": conv(6, 4), "one": conv(4, 1)}
    parts |= {n: conv() for n in ("e", "b4", "s")} | {"pool": nn.AdaptiveAvgPool2d(1)}
    model = ready(Apply(CHOICES[name], **parts))
    gm = rmfx.remove_residuals(model, image())
    row = rmfx.report(gm).rows[-1]
    assert row.status == "removed", row.reason
    assert_equivalent(model, gm, image())
    assert_equivalent(model, rmfx.remove_residuals(model), image())
    exported = rmfx.remove_residuals(torch.export.export(model, (image(),)), image())
    assert rmfx.report(exported).rows[-1].status == "removed"


def test_what_divides_or_is_subtracted_is_no_path() -> None:
    for forward in (
        lambda m, x: x + F.max_pool2d(m.b(x), 3, 1, 1) / (2 + F.relu(m.a(x))),
        lambda m, x: x + (F.max_pool2d(m.b(x), 3, 1, 1) - F.relu(m.a(x))),
    ):
        model = ready(Apply(forward, a=conv(), b=conv()))
        gm = rmfx.remove_residuals(model, image())
        assert rmfx.report(gm).rows[-1].status == "refused"
        assert_equivalent(model, gm, image())


def test_a_limit_of_whole_numbers_is_refused() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return x + m.c(torch.maximum(m.a(x), m.a(x).round().long()))

    model = ready(Apply(forward, a=conv(), c=conv()))
    gm = rmfx.remove_residuals(model, image())
    assert_equivalent(model, gm, image())


@pytest.mark.parametrize("form", ["tokens", "features"])
def test_a_gate_on_the_last_dimension(form: str) -> None:
    x = image(2, 4) if form == "features" else image(2, 5, 4)
    parts = {"a": nn.Linear(4, 6), "b": nn.Linear(4, 6), "c": nn.Linear(6, 4)}
    model = ready(Apply(lambda m, x: x + m.c(m.a(x) * torch.sigmoid(m.b(x))), **parts))
    assert_removed(model, x, without_inputs=False)


# ---- values that are read elsewhere -------------------------------------------------------------

TAPS: dict[str, Forward] = {
    "a conv's": lambda m, x: (x + m.b(F.relu(y := m.a(x))), y),
    "an activation's": lambda m, x: (x + m.b(y := F.silu(m.a(x))), y * 2),
    "the branch's": lambda m, x: (x + (y := m.b(F.relu(m.a(x)))), y),
    "all of them": lambda m, x: (x + (z := m.b(y := F.relu(w := m.a(x)))), z, y, w),
    "the shortcut's": lambda m, x: ((s := m.s(x)) + m.b(F.relu(m.a(x))), F.relu(s)),
    "pooled": lambda m, x: (x + m.b(F.relu(y := m.a(x))), m.pool(y), y.mean((2, 3))),
    "pooled over all dimensions": lambda m, x: (
        x + m.b(F.relu(y := m.a(x))), y.mean([], keepdim=True)
    ),
    "by a later layer": lambda m, x: (lambda y: m.c(x + m.b(F.relu(y))) + m.s(y))(m.a(x)),
    "by a site of its own": lambda m, x: (
        lambda y: (x + m.b(F.relu(y)), y + m.c(F.relu(m.s(y))))
    )(m.a(x)),
    "of a linear branch": lambda m, x: (m.b(y := m.a(x)) + x, y),
    "of two branches": lambda m, x: (F.relu(y := m.a(x)) + F.silu(z := m.b(x)), y, z),
}  # fmt: skip


@pytest.mark.parametrize("name", TAPS)
def test_values_inside_a_branch_may_be_read_elsewhere(name: str) -> None:
    parts = {"a": conv(), "b": conv(), "c": conv(), "s": conv(kernel=1)}
    model = ready(Apply(TAPS[name], pool=nn.AdaptiveAvgPool2d(1), **parts))
    for inputs in (image(), None):
        gm = rmfx.remove_residuals(model, inputs)
        report = rmfx.report(gm)
        assert report.rows[0].status == "removed", str(report)
        assert_equivalent(model, gm, image())


def test_a_value_that_holds_an_inner_join_is_still_compared() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        y = x + m.b(F.relu(m.a(x)))
        return x + m.c(F.relu(y)), y

    model = ready(Apply(forward, a=conv(), b=conv(), c=conv()))
    gm = assert_removed(model, image(), sites=2)
    assert len(assert_equivalent(model, gm, image()).joins) == 2


def test_an_inner_join_that_only_a_pool_reads_is_held_by_no_node() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        y = x + m.b(F.relu(m.a(x)))
        return x + m.c(F.relu(y)), m.pool(y)

    parts = {"a": conv(), "b": conv(), "c": conv(), "pool": nn.AdaptiveAvgPool2d(1)}
    model = ready(Apply(forward, **parts))
    gm = assert_removed(model, image(), sites=2)
    assert rmfx.report(gm).rows[0].node is None


# ---- two branches that read each other -----------------------------------------------------------


def interleaved(m: Any, x: Tensor) -> Tensor:
    y, z = F.relu(m.a(x)), F.silu(m.b(x))
    y2, z2 = m.c(y * torch.tanh(z)), m.s(z) * torch.tanh(y)
    return F.relu(y2 * torch.sigmoid(z2)) + F.silu(z2)


READ_EACH_OTHER: dict[str, Forward] = {
    "one reads the other": lambda m, x: (
        F.relu(m.a(x)) * torch.tanh(z := F.silu(m.b(x)))
    ) + F.silu(m.c(z)),
    "through other layers": lambda m, x: (
        lambda y, z: F.relu(y * F.softmax(m.s(z), 1)) + F.silu(m.c(z))
    )(F.relu(m.a(x)), F.silu(m.b(x))),
    "a concatenation": lambda m, x: (
        lambda y, z: m.d(F.relu(torch.cat([y, m.s(z)], 1))) + F.silu(m.c(z))
    )(F.relu(m.a(x)), F.silu(m.b(x))),
    "both": interleaved,
    "what is read comes first in the code": lambda m, x: (
        lambda y, z, r: F.relu(m.c(y) * torch.tanh(r)) + F.silu(m.s(z) * torch.tanh(y))
    )(*(lambda z: (F.relu(m.a(x)), z, m.b(z)))(F.silu(m.b2(x)))),
}  # fmt: skip


@pytest.mark.parametrize("name", READ_EACH_OTHER)
def test_branches_may_read_each_other(name: str) -> None:
    parts = {n: conv() for n in ("a", "b", "b2", "c")} | {"d": conv(8, 4), "s": conv(kernel=1)}
    assert_removed(ready(Apply(READ_EACH_OTHER[name], **parts)), image(), without_inputs=False)


def test_branches_of_other_sizes_that_read_each_other_are_refused() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y, z = F.relu(m.a(x)), F.silu(m.down(x))
        y = F.relu(m.c(y) + F.interpolate(z, scale_factor=2))
        return m.down2(y) + F.silu(m.b(z))

    down, down2 = conv(stride=2), conv(stride=2)
    model = ready(Apply(forward, a=conv(), b=conv(), c=conv(), down=down, down2=down2))
    gm = rmfx.remove_residuals(model, image(2, 4, 8, 8))
    reasons = [row.reason for row in rmfx.report(gm).rows]
    assert "resizes" in reasons[0]
    assert reasons[1].startswith("interpolate, add_1: one branch reads this")


def test_readers_that_would_have_to_move_past_a_write_stay() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        y, z = F.relu(m.a(x)), F.silu(m.b(x))
        view = m.s(x)
        r = torch.tanh(z) + view[:, :, :1]
        view[:, :, :1] += 1
        return F.relu(m.c(y) * r) + F.silu(m.d(z)), view

    parts = {n: conv() for n in ("a", "b", "c", "d", "s")}
    model = ready(Apply(forward, **parts))
    gm = rmfx.remove_residuals(model, image())
    assert_equivalent(model, gm, image())


# ---- sums and concatenations --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("forward", "status"),
    [
        (lambda m, x: x + m.b(F.relu(m.a(x) + F.max_pool2d(x, 3, 1, 1))), "refused"),
        (lambda m, x: x + m.b(F.relu(F.max_pool2d(x, 3, 1, 1) + m.a(x))), "refused"),
        (lambda m, x: x + m.b(F.relu(m.a(x) + x.amax((2, 3), keepdim=True))), "other"),
    ],
)
def test_a_carry_passes_a_sum_that_stays(forward: Forward, status: str) -> None:
    model = ready(Apply(forward, a=conv(), b=conv()))
    gm = rmfx.remove_residuals(model, image())
    assert [row.status for row in rmfx.report(gm).rows] == [status, "removed"]
    assert_equivalent(model, gm, image())


CONCATENATIONS: dict[str, Forward] = {
    "first": lambda m, x: x + m.c(torch.cat([m.a(x), m.b(x)], 1)),
    "last, after an activation": lambda m, x: x + m.c(F.relu(torch.cat([m.b(x), m.a(x)], 1))),
    "negative dimension": lambda m, x: x + m.c(torch.cat((m.b(x), F.silu(m.a(x))), -3)),
    "by name": lambda m, x: x + m.c(torch.concat(tensors=[m.a(x), m.b(x)], dim=1)),
    "of three": lambda m, x: x + m.d(torch.cat([m.b(x), F.relu(m.a(x)), x], 1)),
    "ghost": lambda m, x: x + m.c((lambda y: torch.cat([y, m.g(y)], 1))(F.relu(m.a(x)))),
    "twice the same": lambda m, x: x + m.c((lambda y: torch.cat([y, y], 1))(F.relu(m.a(x)))),
    "ends the branch": lambda m, x: m.w(x) + torch.cat([F.relu(m.a(x)), m.b(x)], 1),
}


@pytest.mark.parametrize("name", CONCATENATIONS)
def test_a_carry_passes_a_concatenation(name: str) -> None:
    parts = {
        "a": conv(4, 3), "b": conv(4, 3), "c": conv(6, 4), "d": conv(10, 4),
        "g": conv(3, 3, groups=3), "w": conv(4, 6, 1),
    }  # fmt: skip
    model = ready(Apply(CONCATENATIONS[name], **parts))
    assert_removed(model, image())


def test_a_concatenation_along_space_is_refused() -> None:
    model = ready(Apply(lambda m, x: x + m.a(torch.cat([x, x], 2)), a=conv(stride=(2, 1))))
    reason = rmfx.report(rmfx.remove_residuals(model, image(2, 4, 8, 8))).rows[0].reason
    assert "another dimension" in reason


def test_the_cheapest_way_through_a_concatenation_is_taken() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return x + m.c(torch.cat([m.wide2(F.relu(m.wide1(x))), m.narrow(x)], 1))

    parts = {
        "wide1": conv(4, 40),
        "wide2": conv(40, 4),
        "narrow": conv(4, 2, 1),
        "c": conv(6, 4, 1),
    }
    gm = assert_removed(ready(Apply(forward, **parts)), image())
    assert gm.get_submodule("wide1").weight.shape == (40, 4, 3, 3)


def test_a_sum_that_stayed_and_goes_later_holds_no_value_of_its_own() -> None:
    """Once it was widened, its node holds a carry as well."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return ((x + x) + m.pool(x)) + m.norm(x)

    model = ready(Apply(forward, pool=nn.AvgPool2d(2), norm=nn.BatchNorm2d(1)))
    x = image(1, 1, 2, 2)
    for inputs in (x, None):
        gm = rmfx.remove_residuals(model, inputs)
        assert_equivalent(model, gm, x)


# ---- together -----------------------------------------------------------------------------------


def test_sites_with_gates_inside_each_other() -> None:
    def inner(m: Any, x: Tensor) -> Tensor:
        return x + m.c(excite(m, F.relu(m.a(x))))

    model = ready(
        Apply(lambda m, x: x + m.e(F.silu(inner(m, m.d(x)))), d=conv(), e=conv(), **gated())
    )
    assert_removed(model, image(), sites=2)


@pytest.mark.parametrize("way", ["relu", "odd-pair"])
def test_a_code_passes_a_gate(way: str) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = F.relu6(m.stem(x))
        return y + m.c(excite(m, F.relu6(m.b(F.relu6(m.a(y))))))

    model = ready(Apply(forward, stem=conv(), **gated()))
    gm = assert_removed(model, image(), activation=way, without_inputs=False)
    assert "ChannelClamp" not in types(gm)


def test_a_second_run_changes_nothing() -> None:
    model = ready(chain(Apply(GATES["in the middle"], **gated()), conv_bn()))
    once = rmfx.remove_residuals(model, image())
    twice = rmfx.remove_residuals(once, image())
    assert not rmfx.report(twice).rows
    assert twice.code == once.code


def test_gradients_reach_the_weights_of_a_gate() -> None:
    model = ready(Apply(GATES["before the last layer"], **gated()))
    gm = rmfx.remove_residuals(model, image(), differentiable=True)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
    torch.testing.assert_close(gm(image()), model(image()))


@pytest.mark.parametrize(
    ("dims", "pool"),
    [
        (1, nn.AdaptiveAvgPool2d(1)), (1, nn.AdaptiveAvgPool2d((4, 1))),
        (2, nn.AdaptiveAvgPool3d(1)), (2, nn.AdaptiveAvgPool3d((4, 1, 1))),
        (1, nn.AdaptiveAvgPool1d(1)), (2, nn.AdaptiveAvgPool2d(1)),
    ],
    ids=str,
)  # fmt: skip
def test_a_pool_over_channels_reads_the_branch_alone(dims: int, pool: nn.Module) -> None:
    """On a batch of fewer dimensions than it is for, it averages channels as well."""

    def forward(m: Any, x: Tensor) -> Any:
        y = F.relu(m.a(x))
        return x + m.b(y), m.pool(y)

    parts = {name: conv(dims=dims) for name in "ab"}
    x = image(2, 4, *(9, 8)[:dims])
    model = ready(Apply(forward, pool=pool, **parts))
    made = rmfx.remove_residuals(model, x, strict=True, verify=False)
    for one, other in zip(made(x), model(x), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize(
    "pad", [nn.ConstantPad1d(1, 2.0), nn.ConstantPad1d((2, 0), -1.0), nn.ZeroPad1d(1)], ids=str
)
def test_a_padding_of_fewer_dimensions_than_the_site(pad: nn.Module, first: bool) -> None:
    narrow = conv(4, 4, (3, 3), padding=(1, 0))

    def forward(m: Any, x: Tensor) -> Any:
        y = F.relu(x)
        branch = m.a(F.relu(m.b(m.pad(y)))) if first else m.b(m.pad(F.relu(m.a(y))))
        return y + branch

    assert_removed(
        ready(Apply(forward, a=conv(), b=narrow, pad=pad)), image(), without_inputs=not first
    )
