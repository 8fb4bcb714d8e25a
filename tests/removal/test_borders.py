"""Branches that pad with other values than zeros."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch.nn.functional as F
from builders import (
    Apply,
    Residual,
    assert_refused,
    assert_removed,
    chain,
    conv,
    image,
    ready,
    types,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import rmfx
from rmfx.testing import assert_equivalent

PAIRS = (1, 1, 1, 1)
MODES = ("reflect", "replicate", "circular")
SHAPES = {1: (2, 4, 9), 2: (2, 4, 9, 7), 3: (2, 4, 5, 6, 7)}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_padding_modes_of_convolutions(mode: str, dims: int) -> None:
    first, last = (conv(dims=dims, padding_mode=mode) for _ in range(2))
    model = ready(Residual(chain(first, nn.ReLU(), last)))
    gm = assert_removed(model, image(*SHAPES[dims]))
    assert sum("pad" in n.name for n in gm.graph.nodes) == 2


@pytest.mark.parametrize(
    "pad",
    [
        nn.ReflectionPad2d(1),
        nn.ReplicationPad2d((1, 1, 1, 1)),
        nn.CircularPad2d((1, 1, 1, 1)),
        nn.ConstantPad2d(1, 0.5),
        Apply(lambda m, x: F.pad(x, (1, 1, 1, 1), "reflect")),
        Apply(lambda m, x: F.pad(x, (1, 1, 1, 1), mode="constant", value=-2.0)),
    ],
    ids=str,
)
@pytest.mark.parametrize("act", [nn.ReLU(), nn.SiLU(), nn.ReLU6()], ids=str)
def test_paddings_of_their_own(pad: nn.Module, act: nn.Module) -> None:
    branch = chain(conv(), act, pad, nn.Conv2d(4, 4, 3), act, conv())
    assert_removed(ready(Residual(branch)), image())


@pytest.mark.parametrize("stride", [1, 2])
def test_a_blur_pool_inside_a_branch(stride: int) -> None:
    blur = nn.Conv2d(6, 6, 3, stride=stride, groups=6, bias=False)
    branch = chain(conv(4, 6), nn.ReLU(), nn.ReflectionPad2d(1), blur, conv(6, 4))
    shortcut = conv(4, 4, 1, stride=stride)
    assert_removed(ready(Residual(branch, shortcut)), image())


@pytest.mark.parametrize("where", ["first", "alone"])
def test_a_padding_at_the_beginning_of_a_branch(where: str) -> None:
    pad, valid = nn.ReflectionPad2d(1), nn.Conv2d(4, 4, 3)
    layers = {
        "first": (pad, valid, nn.ReLU(), conv()),
        "alone": (nn.ConstantPad2d(1, 1.0), nn.ReLU(), nn.Conv2d(4, 4, 3)),
    }
    assert_removed(ready(Residual(chain(*layers[where]))), image())


def test_a_padding_that_ends_a_branch_would_change_the_carry() -> None:
    branch = chain(nn.Conv2d(4, 4, 3), nn.ReLU(), conv(), nn.ReplicationPad2d(1))
    assert_refused(ready(Residual(branch)), image(), reason="fits beside no layer")


def test_a_shortcut_with_a_kernel_fits_beside_a_padding() -> None:
    branch = chain(conv(padding_mode="reflect"), nn.ReLU(), conv(padding_mode="circular"))
    assert_removed(ready(Residual(branch, conv(kernel=1))), image())
    wide = ready(
        Residual(chain(conv(), nn.ReLU(), nn.ReflectionPad2d(1), nn.Conv2d(4, 4, 3)), conv())
    )
    assert_removed(wide, image())


def test_a_padded_shortcut_stays() -> None:
    shortcut = conv(padding_mode="reflect")
    assert_refused(ready(Residual(chain(conv(), nn.ReLU(), conv()), shortcut)), image(), reason="")


def test_a_crop_with_a_value_is_no_padding() -> None:
    branch = chain(conv(), Apply(lambda m, x: F.pad(x, (1, -1, 0, 0), value=3.0)))
    assert_refused(ready(Residual(branch)), image(), reason="crops and pads")


@pytest.mark.parametrize("value", [3.0, 0.1, -1e6])
@pytest.mark.parametrize("pads", [(0, 1), (1, 0), (2, -1), (-1, 2), (-2, 3)])
def test_padding_of_channels_with_a_number_is_linear(value: float, pads: tuple[int, int]) -> None:
    pad = Apply(lambda m, x: F.pad(x, (0, 0, 0, 0, *pads), value=value))
    for branch in (
        chain(conv(4, 3), pad),
        chain(conv(4, 3), nn.ReLU(), pad, nn.SiLU(), conv(kernel=1)),
    ):
        assert_removed(ready(Residual(branch)), image())


@pytest.mark.parametrize("pads", [(0, 0, 1, -1), (1, -1, 0, 0), (0, 0, 0, 0, 1, -1), (1, -1)])
@pytest.mark.parametrize("shape", [(2, 4, 4), (2, 5, 4), (3, 2, 5, 4), (4, 4, 4, 4), (3, 4)])
@pytest.mark.parametrize("value", [0.0, 2.0])
def test_a_padding_of_features_is_no_padding_of_dimension_1(
    pads: tuple[int, ...], shape: tuple[int, ...], value: float
) -> None:
    if len(pads) > 2 * len(shape):
        return
    pad = Apply(lambda m, x: F.pad(x, pads, value=value))
    model = ready(Residual(chain(nn.Linear(4, 4), pad, nn.Linear(4, 4))))
    for example in (image(*shape), None):
        made = rmfx.remove_residuals(model, example)
        assert_equivalent(model, made, image(*shape))


@pytest.mark.parametrize(
    ("pads", "value"),
    [((1, 1, 0, 0, 0, 1), 3.0), ((0, 0, 0, 0, 0, 1), -math.inf), ((0, 0, 0, 0, 0, 1), -1e300)],
)
def test_what_cannot_be_a_bias_is_refused(pads: tuple[int, ...], value: float) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.conv(x)
        return F.pad(x, pads, value=value)[:, :, :, : x.shape[-1]].clamp(min=-9.0)

    branch = Apply(forward, conv=conv(4, 3))
    assert_refused(ready(Residual(branch)), image(), reason="")


@pytest.mark.parametrize("way", ["relu", "odd-pair"])
def test_codes_pass_a_padding(way: str) -> None:
    branch = chain(conv(padding_mode="reflect"), nn.ReLU6(), conv(padding_mode="reflect"))
    model = ready(chain(nn.Hardtanh(-2, 3), Residual(branch)))
    gm = assert_removed(model, image(), activation=way, without_inputs=False)
    assert "ChannelClamp" not in types(gm)


def test_a_conv_that_is_called_twice_keeps_its_padding() -> None:
    shared = conv(padding_mode="reflect")
    model = ready(Apply(lambda m, x: x + m.a(m.a(x)), a=shared))
    assert_removed(model, image())
    assert_refused(model, image(), reason="called 2 times", copy_shared=False)
    assert shared.padding_mode == "reflect"


def test_the_model_keeps_its_padding() -> None:
    model = ready(Residual(chain(conv(padding_mode="reflect"), nn.ReLU(), conv())))
    rmfx.remove_residuals(model, image())
    assert model.branch[0].padding_mode == "reflect"


Kernel = Callable[[Any, Tensor], Tensor]


@given(
    st.lists(
        st.tuples(st.sampled_from([*MODES, "zeros", "constant"]), st.integers(0, 2),
                  st.sampled_from([1, 3, 5]), st.booleans()),
        min_size=1, max_size=3,
    ),
    st.booleans(),
)  # fmt: skip
def test_a_carry_passes_any_paddings_that_keep_its_size(
    layers: list[tuple[str, int, int, bool]], projected: bool
) -> None:
    made: list[nn.Module] = []
    for mode, extra, kernel, act in layers:
        amount = (kernel - 1) // 2 + extra
        if mode == "constant":
            made.append(nn.ConstantPad2d(amount, 0.7))
        elif mode != "zeros":
            made.append(Apply(lambda m, x, a=amount, f=mode: F.pad(x, (a, a, a, a), f)))
        padding = amount if mode == "zeros" else 0
        made.append(nn.Conv2d(4, 4, kernel, padding=padding))
        if extra:
            made.append(nn.ZeroPad2d(-extra))
        if act:
            made.append(nn.ReLU())
    model = ready(Residual(chain(*made), conv(kernel=1) if projected else None))
    gm = rmfx.remove_residuals(model, image())
    assert rmfx.report(gm).removed == 1, str(rmfx.report(gm))
    assert_equivalent(model, gm, image())


# ---- what both branches do alike ----------------------------------------------------------------


def alike(last: Any, *, second: Any = None, shortcut: nn.Module | None = None) -> Any:
    """Two branches with an activation, or a shortcut beside one, that end in the same operation."""
    second = last if second is None else second
    parts = {"a": conv(), "b": conv(), "s": nn.Identity() if shortcut is None else shortcut}
    if shortcut is not None:
        return ready(Apply(lambda m, x: last(m.b(F.relu(m.a(x)))) + second(m.s(x)), **parts))
    return ready(Apply(lambda m, x: last(F.relu(m.a(x))) + second(F.silu(m.b(x))), **parts))


OF_CHANNELS: dict[str, Callable[[Any], Any]] = {
    "max pool": lambda y: F.max_pool2d(y, 3, 2, 1),
    "max pool, rounding up": lambda y: F.max_pool2d(y, (2, 3), ceil_mode=True),
    "dilated max pool": lambda y: F.max_pool2d(y, 2, 1, dilation=(1, 2)),
    "reflected": lambda y: F.pad(y, (1, 0, 2, 1), "reflect"),
    "filled": lambda y: F.pad(y, (1, 1), value=0.5),
    "padded, then pooled": lambda y: F.max_pool2d(F.pad(y, (1, 1, 1, 1), "replicate"), 3),
    "pooled before a conv": lambda y: F.avg_pool2d(F.max_pool2d(y, 2, 1), 2),
}


@pytest.mark.parametrize("name", OF_CHANNELS)
@pytest.mark.parametrize("shortcut", [None, nn.Identity(), conv(kernel=1)], ids=str)
def test_two_branches_that_end_alike(name: str, shortcut: nn.Module | None) -> None:
    assert_removed(alike(OF_CHANNELS[name], shortcut=shortcut), image())


@pytest.mark.parametrize("mode", MODES)
def test_a_module_and_a_function_may_pad_alike(mode: str) -> None:
    kinds = dict(
        zip(MODES, (nn.ReflectionPad2d, nn.ReplicationPad2d, nn.CircularPad2d), strict=True)
    )
    branch = chain(conv(), nn.ReLU(), kinds[mode](PAIRS))
    shortcut = chain(conv(), nn.SiLU(), Apply(lambda m, x: F.pad(x, PAIRS, mode)))
    assert_removed(ready(Residual(branch, shortcut)), image())


def test_one_pool_called_for_both_branches() -> None:
    pool = nn.MaxPool2d(3, 1, 1)
    parts = {"pool": pool, "a": conv(), "b": conv()}
    model = ready(Apply(lambda m, x: m.pool(F.relu(m.a(x))) + m.pool(F.silu(m.b(x))), **parts))
    assert_removed(model, image())


@pytest.mark.parametrize(
    ("last", "second"),
    [
        (lambda y: F.max_pool2d(y, 3, 1, 1), lambda y: F.max_pool2d(y, 3, 1, 1, ceil_mode=True)),
        (lambda y: F.max_pool2d(y, 3, 1, 1), lambda y: F.max_pool2d(y, 5, 1, 2)),
        (lambda y: F.max_pool2d(y, 3, 1, 1), lambda y: y),
        (lambda y: F.pad(y, (1, 1), value=0.5), lambda y: F.pad(y, (1, 1), value=0.25)),
        (lambda y: F.pad(y, PAIRS, "replicate"), lambda y: F.pad(y, PAIRS, "circular")),
        (lambda y: F.pad(y, PAIRS, "replicate"), lambda y: F.pad(y, (0, 2, 1, 1), "replicate")),
    ],
)
def test_two_branches_that_end_differently(last: Any, second: Any) -> None:
    assert_refused(alike(last, second=second), image(), reason="")


@given(st.data())
def test_any_max_pool_on_both_branches(data: st.DataObject) -> None:
    dims = data.draw(st.integers(1, 3))
    kernel = data.draw(st.integers(1, 3))
    options = {
        "kernel_size": kernel,
        "stride": data.draw(st.integers(1, 3)),
        "padding": data.draw(st.integers(0, kernel // 2)),
        "dilation": data.draw(st.integers(1, 2)),
        "ceil_mode": data.draw(st.booleans()),
    }
    pool = getattr(nn, f"MaxPool{dims}d")(**options)
    left, right = conv(dims=dims), conv(dims=dims)
    branch = chain(left, nn.ReLU(), pool)
    shortcut = chain(right, data.draw(st.sampled_from([nn.Identity(), nn.SiLU()])), pool)
    assert_removed(ready(Residual(branch, shortcut)), image(*SHAPES[dims]))


@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize("size", [8, 9, 10])
def test_a_max_pool_of_one_value_is_a_stride(size: int, ceil_mode: bool) -> None:
    shortcut = nn.MaxPool2d(1, 3, ceil_mode=ceil_mode)
    branch = chain(conv(stride=3), nn.ReLU(), conv())
    assert_removed(ready(Residual(branch, shortcut)), image(2, 4, size, size))
