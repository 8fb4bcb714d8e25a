"""Parallel linear branches become one layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from builders import Apply, Residual, adds, chain, conv, conv_bn, image, ready, shapes, types
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import rmfx
from rmfx.testing import NetworkSpec, assert_equivalent, residual_networks

Forward = Callable[[Any, Tensor], Any]


def merged(model: Any, *inputs: Tensor, **options: Any) -> Any:
    gm = rmfx.merge_branches(model, inputs, **options)
    assert_equivalent(model, gm, inputs)
    return gm


def scaled(*channels: int) -> nn.Parameter:
    return nn.Parameter(torch.rand(*channels) + 0.5)


def pooled(channels: int = 4) -> nn.Module:
    """DBB's third branch, whose average pool reads no border of the batch norm before it."""
    return chain(conv_bn(channels, channels, 1), nn.AvgPool2d(3, 1))


ONE_LAYER: dict[str, Callable[[], nn.Module]] = {
    "RepVGG": lambda: Apply(
        lambda m, x: m.three(x) + m.one(x) + m.norm(x),
        three=conv_bn(), one=conv_bn(kernel=1), norm=nn.BatchNorm2d(4),
    ),
    "RepVGG, strided": lambda: Residual(conv_bn(4, 8, stride=2), conv_bn(4, 8, 1, stride=2)),
    "MobileOne": lambda: Apply(
        lambda m, x: m.skip(x) + m.scale(x) + sum(branch(x) for branch in (m.a, m.b, m.c)),
        skip=nn.BatchNorm2d(4), scale=conv_bn(kernel=1, groups=4),
        **{name: conv_bn(groups=4) for name in "abc"},
    ),
    "ACNet": lambda: Apply(
        lambda m, x: m.square(x) + m.row(x) + m.column(x),
        square=conv_bn(),
        row=chain(conv(kernel=(1, 3), padding=(0, 1)), nn.BatchNorm2d(4)),
        column=chain(conv(kernel=(3, 1), padding=(1, 0)), nn.BatchNorm2d(4)),
    ),
    "DBB": lambda: Apply(
        lambda m, x: m.origin(x) + m.sequence(x) + m.point(x[:, :, 1:-1, 1:-1]) + m.average(x),
        origin=conv_bn(padding=0), point=conv_bn(kernel=1), average=pooled(),
        sequence=chain(conv_bn(4, 8, 1), conv_bn(8, 4, padding=0)),
    ),
    "DBB, padded before": lambda: Residual(
        conv_bn(), chain(conv_bn(4, 6, 1, padding=1), conv_bn(6, 4, padding=0))
    ),
    "RepLKNet": lambda: Residual(conv_bn(kernel=13, groups=4), conv_bn(kernel=5, groups=4)),
    "ResConv": lambda: Apply(
        lambda m, x: m.s * m.conv(x) + m.a * x, conv=conv_bn(), s=scaled(1), a=scaled(1)
    ),
    "ResConv, strided": lambda: Apply(
        lambda m, x: m.s * m.conv(x) + m.a * x[:, :, ::2, ::2],
        conv=conv_bn(stride=2), s=scaled(1), a=scaled(1),
    ),
    "DiracNet": lambda: Apply(lambda m, x: m.a * x + m.conv(x), a=scaled(4, 1, 1), conv=conv()),
    "layer scale": lambda: Apply(lambda m, x: x + m.g * m.conv(x), g=scaled(4, 1, 1), conv=conv()),
    "a difference": lambda: Apply(lambda m, x: 2 * m.a(x) - m.b(x) / 3, a=conv(), b=conv()),
    "equal branches": lambda: Residual(conv(), conv()),
    "one branch twice": lambda: Apply(lambda m, x: (lambda y: y + y)(m.a(x)), a=conv()),
    "nested": lambda: Residual(Residual(conv(), conv(kernel=1)), Residual(conv_bn(), conv())),
    "a sum in a sequence": lambda: Residual(
        chain(Residual(conv(kernel=1, bias=False)), conv()), conv_bn()
    ),
    "grouped": lambda: Residual(conv(4, 8, groups=2), conv(4, 8, 1, groups=4)),
    "concatenated": lambda: Apply(
        lambda m, x: torch.cat([m.a(x), m.b(x), m.c(x)], 1),
        a=conv(), b=conv_bn(4, 2), c=chain(conv(4, 8, 1, bias=False), conv(8, 3)),
    ),
    "concatenated after sums": lambda: Apply(
        lambda m, x: torch.cat([m.a(x) + m.b(x), m.c(x) + x], 1),
        a=conv(kernel=1), b=conv(kernel=1), c=conv(kernel=1),
    ),
    "a sum of concatenations": lambda: Residual(
        Apply(lambda m, x: torch.cat((m.a(x), m.b(x)), -3), a=conv(4, 2), b=conv(4, 2)), conv()
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ONE_LAYER)
def test_linear_branches_become_one_layer(name: str) -> None:
    model = ready(ONE_LAYER[name]())
    gm = merged(model, image(2, 4, 14, 13))
    assert len(shapes(gm)) == 1 == len(types(gm)), gm
    assert adds(gm) == 0
    assert all(row.status == "removed" for row in rmfx.report(gm).rows)
    assert rmfx.merge_branches(gm, image(2, 4, 14, 13)).code == gm.code
    without = rmfx.merge_branches(model)
    assert types(without) == types(gm)
    assert_equivalent(model, without, image(2, 4, 14, 13))


@pytest.mark.parametrize("form", ["tokens", "features"])
def test_linear_layers_on_features(form: str) -> None:
    x = image(2, 4) if form == "features" else image(2, 5, 4)
    parts = {"a": nn.Linear(4, 4), "b": nn.Linear(4, 6), "c": nn.Linear(6, 4, bias=False)}
    model = ready(Apply(lambda m, x: x + m.a(x) + m.c(m.b(x)), **parts))
    assert types(merged(model, x)) == ["Linear"]
    side_by_side = ready(Apply(lambda m, x: torch.cat([m.a(x), m.b(x)], -1), **parts))
    assert shapes(merged(side_by_side, x)) == [(10, 4)]


@pytest.mark.parametrize("dims", [1, 3])
def test_other_dimensions(dims: int) -> None:
    branches = conv_bn(dims=dims), conv_bn(kernel=1, dims=dims)
    gm = merged(ready(Residual(*branches)), image(2, 4, *(5,) * dims))
    assert types(gm) == [f"Conv{dims}d"]


STAY: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "an activation": (lambda: Residual(chain(conv(), nn.ReLU(), conv())), "not linear"),
    "a padded conv after a bias": (
        lambda: Residual(chain(conv(kernel=1), conv())), "fill with its bias",
    ),
    "a padded conv after a wide one": (
        lambda: Residual(chain(conv(bias=False), conv())), "still see its input",
    ),
    "an average of a border": (
        lambda: Residual(chain(conv(kernel=1), nn.AvgPool2d(3, 1, 1))), "fill with its bias",
    ),
    "a value read elsewhere": (
        lambda: Apply(lambda m, x: (x + m.b(y := m.a(x)), y), a=conv(kernel=1), b=conv(kernel=1)),
        "read elsewhere",
    ),
    "other padding than zeros": (
        lambda: Residual(conv(padding_mode="reflect"), conv()), "not linear",
    ),
    "two inputs": (
        lambda: Apply(lambda m, x: m.a(x) + m.b(F.softmax(x, 1)), a=conv(), b=conv()), "softmax",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STAY)
def test_what_is_not_one_layer_stays(name: str) -> None:
    make, reason = STAY[name]
    model = ready(make())
    gm = merged(model, image())
    (row,) = rmfx.report(gm).rows
    assert row.status == "refused"
    assert reason in row.reason
    with pytest.raises(rmfx.RefusedError, match="merge_branches"):
        rmfx.merge_branches(model, image(), strict=True)


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: torch.cat([m.a(x), F.relu(m.b(x))], 1),  # not linear
        lambda m, x: torch.cat([m.a(x), m.b(x)], 2),  # along space
        lambda m, x: torch.cat([m.depthwise(x), x], 1),  # one layer would be dense
        lambda m, x: torch.cat([m.a(x), m.wide(x)], 1),  # read at other places
        lambda m, x: (torch.cat([y := m.a(x), m.b(x)], 1), y),  # a part is read elsewhere
        lambda m, x: torch.cat([x, x], 1),  # nothing to merge
    ],
)
def test_concatenations_that_stay(forward: Forward) -> None:
    parts = {"a": conv(), "b": conv(), "depthwise": conv(groups=4)}
    model = ready(Apply(forward, wide=conv(padding_mode="circular"), **parts))
    gm = merged(model, image())
    assert sorted(types(gm)) == sorted(types(rmfx.trace(model, image())))


def bottleneck() -> Any:
    """Two thin layers: as one they cost eight times the multiply-adds."""
    return ready(Residual(chain(conv(64, 4, 1), conv(4, 64, 1))))


def test_a_policy_chooses() -> None:
    model, x = bottleneck(), image(1, 64, 6, 6)
    whole = merged(model, x)
    assert len(shapes(whole)) == 1
    assert "1 of 1 sums of parallel branches merged" in str(rmfx.report(whole))
    rows = []

    def never(row: rmfx.SiteReport) -> bool:
        rows.append(row)
        return False

    gm = merged(model, x, policy=never)
    (row,) = rmfx.report(gm).rows
    assert (row.status, rmfx.report(gm).kept, rmfx.report(gm).adds_left) == ("kept", 1, 1)
    assert "policy" in row.reason
    assert "0 of 1 sums of parallel branches merged, 1 kept by choice" in str(rmfx.report(gm))
    assert (rows[0].macs_before, rows[0].macs_after) == (2 * 64 * 4 * 36, 64 * 64 * 36)
    assert rows[0].layout == "one layer"
    assert len(shapes(merged(model, x, policy=lambda row: row.macs_after > row.macs_before))) == 1
    with pytest.raises(rmfx.RmfxError, match="policy='some'"):
        rmfx.merge_branches(model, x, policy="some")


def test_what_would_not_pay_is_kept() -> None:
    thin = ready(Residual(chain(conv(256, 4, 1), conv(4, 256, 1))))
    x = image(1, 256, 6, 6)
    (row,) = rmfx.report(merged(thin, x, policy="profitable")).rows
    assert row.status == "kept"
    assert "would not pay" in row.reason
    assert not rmfx.report(merged(ready(Residual(conv())), image(), policy="profitable")).adds_left
    (unknown,) = rmfx.report(rmfx.merge_branches(thin, policy="profitable")).rows
    assert "pass example_inputs" in unknown.reason
    rmfx.merge_branches(thin, x, policy="profitable", strict=True)  # a choice is no refusal


def test_a_policy_for_residual_blocks() -> None:
    dear, cheap = Residual(chain(conv(), nn.ReLU(), conv())), Residual(conv_bn())
    model = ready(chain(dear, nn.ReLU(), cheap))
    gm = rmfx.remove_residuals(model, image(), policy="profitable")
    assert [row.status for row in rmfx.report(gm).rows] == ["kept", "removed"]
    assert_equivalent(model, gm, image())


@settings(deadline=None)
@given(residual_networks(), st.sampled_from(["all", "profitable"]), st.booleans())
def test_random_networks_keep_their_values(spec: NetworkSpec, policy: str, given_x: bool) -> None:
    model, inputs = spec.build(), spec.inputs()
    gm = rmfx.merge_branches(model, inputs if given_x else None, policy=policy)
    assert_equivalent(model, gm, inputs)
