"""Branches that pad with other values than zeros."""

from __future__ import annotations

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


def test_padding_of_channels_with_a_value_is_refused() -> None:
    branch = chain(conv(4, 3), Apply(lambda m, x: F.pad(x, (0, 0, 0, 0, 0, 1), value=3.0)))
    assert_refused(ready(Residual(branch)), image(), reason="beyond space")


@pytest.mark.parametrize("way", ["relu", "odd-pair"])
def test_codes_pass_a_padding(way: str) -> None:
    branch = chain(conv(padding_mode="reflect"), nn.ReLU6(), conv(padding_mode="reflect"))
    model = ready(chain(nn.Hardtanh(-2, 3), Residual(branch)))
    gm = assert_removed(model, image(), activation=way, without_inputs=False)
    assert "ChannelClamp" not in types(gm)


def test_a_conv_that_is_called_twice_keeps_its_padding() -> None:
    shared = conv(padding_mode="reflect")
    model = ready(Apply(lambda m, x: x + m.a(m.a(x)), a=shared))
    assert_refused(model, image(), reason="called 2 times")
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
