"""Residual removal: what a block becomes, that it computes the same, and what is refused."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from builders import (
    Apply,
    Residual,
    assert_all_gone,
    assert_refused,
    assert_removed,
    assert_same,
    basic_branch,
    chain,
    conv,
    conv_bn,
    conv_branch,
    image,
    ready,
    shapes,
    snapshot,
    types,
)
from hypothesis import given, settings
from torch import Tensor, nn

import rmfx
from rmfx.testing import NetworkSpec, assert_equivalent, residual_blocks

pytestmark = pytest.mark.oldest

Make = Callable[[], nn.Module]
plus_in_place: Callable[[Any, Any], Any] = operator.iadd
minus_in_place: Callable[[Any, Any], Any] = operator.isub


class Functional(nn.Module):
    """A block without layer modules: every call is a function of its own parameters."""

    mean: Tensor
    variance: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2 = (nn.Parameter(torch.randn(4, 4, 3, 3)) for _ in range(2))
        self.b1 = nn.Parameter(torch.randn(4))
        self.register_buffer("mean", torch.randn(4))
        self.register_buffer("variance", torch.rand(4) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x, self.w1, self.b1, padding=1)
        y = F.batch_norm(y, self.mean, self.variance)
        return torch.add(input=x, other=torch.conv2d(y.relu(), self.w2, None, 1, 1))


class Methods(nn.Module):
    """Tensor methods and in-place operators."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv(), conv()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.conv1(x).relu_())
        y += x
        out: Tensor = y.relu_()
        return out


# ---- structure ----------------------------------------------------------------------------------


def test_basic_block_becomes_conv_prelu_conv() -> None:
    converted = assert_removed(ready(Residual(basic_branch())), image())
    assert types(converted) == ["Conv2d", "PReLU", "Conv2d"]
    assert shapes(converted) == [(8, 4, 3, 3), (4, 8, 3, 3)]


def test_block_behind_a_relu_keeps_its_relu() -> None:
    model = ready(chain(conv_bn(), nn.ReLU(), Residual(basic_branch()), nn.ReLU()))
    converted = assert_removed(model, image(), strategy="identity")
    assert types(converted) == ["Conv2d", "ReLU", "Conv2d", "ReLU", "Conv2d", "ReLU"]


def _depthwise_first(act: nn.Module, width: int, groups: int) -> nn.Module:
    first = conv_bn(4, width, groups=groups)
    return ready(chain(conv_bn(), Residual(chain(first, act, *conv_bn(width, 4, 1)))))


@pytest.mark.parametrize("keep_norms", [False, True])
@pytest.mark.parametrize(("width", "groups"), [(4, 4), (8, 4), (6, 2)])
@pytest.mark.parametrize("act", [nn.ReLU6(), nn.PReLU(), nn.SiLU(), nn.Tanh()], ids=str)
def test_a_grouped_first_layer_stays_grouped(
    act: nn.Module, width: int, groups: int, keep_norms: bool
) -> None:
    model = _depthwise_first(act, width, groups)
    options = {"fold_batch_norm": not keep_norms, "calibration": [image(8, 4, 9, 7)]}
    converted = assert_removed(model, image(), minimise="macs", **options)
    grouped = [m for m in converted.modules() if isinstance(m, nn.Conv2d) and m.groups == groups]
    assert [(m.in_channels, m.out_channels) for m in grouped] == [(4, width + 4)]
    closed = rmfx.close_carries(converted, image())
    assert_equivalent(model, closed, [image()])


def test_slopes_for_each_channel_keep_the_carry_below() -> None:
    model = _depthwise_first(nn.PReLU(8), 8, 4)
    slopes: Tensor = model[1].branch[1].weight  # type: ignore[index,union-attr,assignment]
    slopes.data.uniform_(0.1, 0.9)
    converted = assert_removed(model, image())
    assert [m.groups for m in converted.modules() if isinstance(m, nn.Conv2d)] == [1, 1, 1]


def test_reserved_filters_are_dirac_and_merged_ones_sit_beside_the_weights() -> None:
    model = ready(Residual(conv_branch()))
    converted = assert_removed(model, image())
    first, last = (m for m in converted.modules() if isinstance(m, nn.Conv2d))
    dirac = nn.init.dirac_(torch.empty(4, 4, 3, 3, dtype=torch.float64))
    assert torch.equal(first.weight, torch.cat([model.branch[0].weight, dirac]))
    assert torch.equal(last.weight, torch.cat([model.branch[2].weight, dirac], 1))


def test_bottleneck_carries_in_groups_where_that_is_cheaper() -> None:
    branch = chain(conv(16, 4, 1), nn.ReLU(), conv(4, 4, groups=1), nn.ReLU(), conv(4, 16, 1))
    converted = assert_removed(ready(chain(nn.ReLU(), Residual(branch))), image(2, 16, 7, 7))
    assert shapes(converted) == [(20, 16, 1, 1), (20, 4, 3, 3), (16, 20, 1, 1)]


def test_depthwise_conv_stays_depthwise() -> None:
    branch = chain(conv(4, 8, 1), nn.ReLU6(), conv(8, 8, groups=8), nn.ReLU6(), conv(8, 4, 1))
    converted = assert_removed(ready(Residual(branch)), image(), strategy="per-channel")
    assert shapes(converted) == [(12, 4, 1, 1), (12, 1, 3, 3), (4, 12, 1, 1)]
    assert types(converted)[1] == types(converted)[3] == "ChannelClamp"


def test_purely_linear_branches_become_one_conv() -> None:
    model = ready(Residual(conv_bn(), conv_bn(kernel=1)))
    converted = assert_removed(model, image(), strategy="linear")
    assert types(converted) == ["Conv2d"]


# ---- numbers: sites of every kind ---------------------------------------------------------------


def inverted(stride: int = 1, n_out: int = 4) -> nn.Module:
    return chain(
        *(conv_bn(4, 12, 1), nn.ReLU6()),
        *(conv_bn(12, 12, groups=12, stride=stride), nn.ReLU6()),
        conv_bn(12, n_out, 1),
    )


def bottleneck(strides: tuple[int, int] = (1, 1), groups: int = 1) -> nn.Module:
    return chain(
        *(conv_bn(4, 6, 1, stride=strides[0]), nn.ReLU()),
        *(conv_bn(6, 6, stride=strides[1], groups=groups), nn.ReLU()),
        conv_bn(6, 8, 1),
    )


def pre_activation() -> nn.Module:
    return chain(nn.BatchNorm2d(4), nn.ReLU(), conv(), nn.BatchNorm2d(4), nn.ReLU(), conv())


SITES: dict[str, Make] = {
    "identity": lambda: Residual(conv_branch()),
    "one conv": lambda: Residual(chain(nn.ReLU(), conv())),
    "crop of valid convs": lambda: Residual(
        chain(conv(padding=0), nn.ReLU(), conv(padding=0)), Apply(lambda m, x: x[:, :, 2:-2, 2:-2])
    ),
    "crop of one side": lambda: Residual(
        chain(conv(padding=0), nn.ReLU()), Apply(lambda m, x: x[..., 2:, :-2])
    ),
    "crop by negative padding": lambda: Residual(
        chain(conv(padding=0), nn.ReLU()), Apply(lambda m, x: F.pad(x, [-1, -1, -1, -1]))
    ),
    "strided identity": lambda: Residual(
        chain(conv(stride=2), nn.ReLU(), conv()), Apply(lambda m, x: x[:, :, ::2, ::2])
    ),
    "option A: strided and padded channels": lambda: Residual(
        basic_branch(4, 8, stride=2),
        Apply(lambda m, x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))),
    ),
    "projection 1x1": lambda: Residual(basic_branch(4, 8), conv_bn(4, 8, 1)),
    "strided projection 1x1": lambda: Residual(
        basic_branch(4, 8, stride=2), conv_bn(4, 8, 1, stride=2)
    ),
    "strided projection 3x3": lambda: Residual(
        basic_branch(4, 8, stride=2), conv_bn(4, 8, 3, stride=2)
    ),
    "projection 3x3": lambda: Residual(basic_branch(4, 8), conv_bn(4, 8, 3)),
    "projection 2x2 beside 4x4": lambda: Residual(
        chain(conv(4, 8, 4, stride=2, padding=1), nn.ReLU(), conv(8, 8)),
        conv(4, 8, 2, stride=2, padding=0),
    ),
    "projection without bias or BN": lambda: Residual(conv_branch(), conv(kernel=1, bias=False)),
    "average pool then conv": lambda: Residual(
        basic_branch(4, 8, stride=2),
        chain(nn.AvgPool2d(3, 2, 1), conv_bn(4, 8, 1)),
    ),
    "bottleneck": lambda: Residual(bottleneck(), conv_bn(4, 8, 1)),
    "bottleneck, stride in the 1x1": lambda: Residual(
        bottleneck((2, 1)), conv_bn(4, 8, 1, stride=2)
    ),
    "bottleneck, stride in the 3x3": lambda: Residual(
        bottleneck((1, 2)), conv_bn(4, 8, 1, stride=2)
    ),
    "ResNeXt groups": lambda: Residual(bottleneck(groups=3), conv_bn(4, 8, 1)),
    "groups that do not divide the carry": lambda: Residual(
        chain(conv(4, 9, 1), nn.ReLU(), conv(9, 9, groups=3), nn.ReLU(), conv(9, 4, 1))
    ),
    "grouped first and last conv": lambda: Residual(
        chain(conv(groups=2), nn.ReLU(), conv(groups=4))
    ),
    "inverted residual": lambda: Residual(inverted()),
    "depthwise only": lambda: Residual(chain(conv(groups=4), nn.ReLU6(), conv(groups=4))),
    "dilated": lambda: Residual(chain(conv(dilation=2), nn.ReLU(), conv(dilation=3))),
    "oblong kernels": lambda: Residual(
        chain(conv(kernel=(1, 3), padding=(0, 1)), nn.ReLU(), conv(kernel=(5, 1), padding=(2, 0)))
    ),
    "even kernels whose sizes cancel": lambda: Residual(
        chain(conv(kernel=2, padding=1), nn.ReLU(), conv(kernel=2, padding=0))
    ),
    "padding same": lambda: Residual(
        chain(conv(padding="same"), nn.ReLU(), conv(kernel=5, padding="same", dilation=2))
    ),
    "explicit zero padding": lambda: Residual(
        chain(nn.ZeroPad2d(1), conv(padding=0), nn.ReLU(), conv())
    ),
    "with bias": lambda: Residual(chain(conv(bias=True), nn.ReLU(), conv(bias=True))),
    "BN before conv": lambda: Residual(pre_activation()),
    "many layers": lambda: Residual(
        chain(*(layer for _ in range(4) for layer in (conv(), nn.ReLU())), conv())
    ),
    "transposed convs": lambda: Residual(
        chain(nn.ConvTranspose2d(4, 6, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(6, 4, 1))
    ),
    "two activations in a row": lambda: Residual(
        chain(conv(), nn.LeakyReLU(0.3), nn.Hardtanh(-0.2, 0.7), conv())
    ),
    "branch that ends in an activation": lambda: Residual(chain(conv(), nn.ReLU())),
    "branch of an activation alone": lambda: Residual(nn.LeakyReLU(0.2)),
    "branch of a batch norm alone": lambda: Residual(nn.BatchNorm2d(4)),
    "two nonlinear branches": lambda: Residual(conv_branch(), conv_branch(nn.LeakyReLU(0.4))),
    "two nonlinear branches of unlike length": lambda: Residual(
        chain(conv(), nn.ReLU(), conv(), nn.ReLU(), conv()), chain(conv(kernel=1), nn.ReLU6())
    ),
    "two purely linear branches": lambda: Residual(conv_bn(), conv_bn(kernel=1)),
    "shortcut with a scale": lambda: Residual(conv_branch(), Apply(lambda m, x: x * 0.5)),
    "layer scale": lambda: Residual(
        chain(conv_branch(), Apply(lambda m, x: x * m.g, g=nn.Parameter(torch.randn(4, 1, 1))))
    ),
    "instance norm with running statistics": lambda: Residual(
        chain(
            conv(), nn.InstanceNorm2d(4, affine=True, track_running_stats=True), nn.ReLU(), conv()
        )
    ),
    "functional instance norm": lambda: Residual(
        chain(
            conv(),
            Apply(
                lambda m, x: F.instance_norm(x, m.mean, m.var, use_input_stats=False),
                mean=nn.Buffer(torch.randn(4)),
                var=nn.Buffer(torch.rand(4) + 0.5),
            ),
            *(nn.ReLU(), conv()),
        )
    ),
    "another memory format": lambda: Residual(
        chain(
            conv(), Apply(lambda m, x: x.to(memory_format=torch.channels_last)), nn.ReLU(), conv()
        )
    ),
    "an absolute value": lambda: Residual(chain(conv(), Apply(lambda m, x: x.abs()), conv())),
    "a square": lambda: Residual(
        chain(conv(), nn.ReLU(), Apply(lambda m, x: x**2), nn.BatchNorm2d(4), conv())
    ),
    "a sine": lambda: Residual(chain(conv(), Apply(lambda m, x: torch.sin(30 * x)), conv())),
    "dropout in the branch": lambda: Residual(chain(conv(), nn.ReLU(), nn.Dropout(), conv())),
    "functional form": Functional,
    "method form": Methods,
    "x - f(x)": lambda: Residual(conv_branch(), combine=lambda x, y: x - y),
    "f(x) - x": lambda: Residual(conv_branch(), combine=lambda x, y: y - x),
    "x + c f(x)": lambda: Residual(conv_branch(), combine=lambda x, y: x + 0.3 * y),
    "x - f(x) / c": lambda: Residual(conv_branch(), combine=lambda x, y: x - y / 3),
    "-x + f(x)": lambda: Residual(conv_branch(), combine=lambda x, y: -x + y),
    "torch.add alpha": lambda: Residual(
        conv_branch(), combine=lambda x, y: torch.add(x, y, alpha=-0.7)
    ),
    "torch.sub alpha": lambda: Residual(
        conv_branch(), combine=lambda x, y: torch.sub(y, x, alpha=2)
    ),
    "x.add(alpha)": lambda: Residual(conv_branch(), combine=lambda x, y: y.add(x, alpha=3)),
    "y += x": lambda: Residual(conv_branch(), combine=lambda x, y: plus_in_place(y, x)),
    "y -= x": lambda: Residual(conv_branch(), combine=lambda x, y: minus_in_place(y, x)),
    "y.add_(x)": lambda: Residual(conv_branch(), combine=lambda x, y: y.add_(x, alpha=2)),
    "y.sub_(x)": lambda: Residual(conv_branch(), combine=lambda x, y: y.sub_(x)),
    "in-place activations": lambda: chain(
        conv(), Residual(chain(conv(), nn.ReLU(inplace=True), conv())), nn.ReLU(inplace=True)
    ),
    "sum() of a list": lambda: Residual(conv_branch(), combine=lambda x, y: sum([x, y])),
    "sum of a stack": lambda: Residual(
        conv_branch(), combine=lambda x, y: torch.stack([x, y]).sum(0)
    ),
    "sum() of a stack": lambda: Residual(
        conv_branch(), combine=lambda x, y: torch.sum(torch.stack((x, y), dim=2), dim=2)
    ),
    "mean of a stack": lambda: Residual(
        conv_branch(), combine=lambda x, y: torch.mean(torch.stack((x, y), -1), dim=(-1,))
    ),
    "x + x": lambda: Apply(lambda m, x: x + x),
}
# Where no layer with weights tells the channels, only example inputs can.
NEED_INPUTS = ("branch of an activation alone", "x + x", "one conv", "explicit zero padding")


@pytest.mark.parametrize("name", SITES)
def test_site_of_every_kind_is_removed_exactly(name: str) -> None:
    assert_removed(ready(SITES[name]()), image(), without_inputs=name not in NEED_INPUTS)


@pytest.mark.parametrize("cast", ["double", "to", "type", "type_as"])
@pytest.mark.parametrize("export", [False, True])
def test_a_cast_to_the_type_that_a_value_has_is_nothing(cast: str, export: bool) -> None:
    def same(m: Any, x: Tensor) -> Tensor:
        given = {"to": (torch.float64,), "type": (torch.float64,), "type_as": (x,)}
        return getattr(x, cast)(*given.get(cast, ()))  # type: ignore[no-any-return]

    model = ready(Residual(chain(conv(), Apply(same), nn.ReLU(), conv())))
    held = torch.export.export(model, (image(),)) if export else model
    gm = rmfx.remove_residuals(held, image())
    assert_all_gone(model, gm, (image(),), 1, None)


def test_a_cast_to_another_type_and_back_is_no_linear_layer() -> None:
    """It rounds, so a carry in float64 passes it by a mask, and the branch is rounded as before."""
    branch = chain(conv(), Apply(lambda m, x: x.float().double()), nn.ReLU(), conv())
    gm = assert_removed(ready(Residual(branch)), image(), strategy="masked", without_inputs=False)
    assert rmfx.report(gm).rows[0].exactness == "bit-exact"


@pytest.mark.parametrize(
    "combine",
    [
        lambda x, y: torch.stack([x, y]).sum(1),
        lambda x, y: torch.stack([x, y]).sum((0, 1)),
        lambda x, y: torch.stack([x, y]).sum(0, keepdim=True),
        lambda x, y: torch.stack([x, y]).sum(),
        lambda x, y: torch.stack([x, y]).sum(0, dtype=torch.float32),
    ],
)
def test_other_sums_of_a_stack_are_left_alone(combine: Any) -> None:
    model = ready(Residual(conv_branch(), combine=combine))
    gm = rmfx.remove_residuals(model, image())
    assert rmfx.report(gm).removed == 0
    torch.testing.assert_close(gm(image()), model(image()), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_padding_same_of_an_even_kernel() -> None:
    branch = chain(conv(kernel=2, padding="same"), nn.ReLU(), conv(kernel=4, padding="same"))
    assert_removed(ready(Residual(branch)), image())


@pytest.mark.parametrize("size", [(8, 8), (5, 11), (1, 1)])
@pytest.mark.parametrize("name", ["strided projection 3x3", "bottleneck, stride in the 3x3"])
def test_conversion_holds_for_other_sizes_than_the_example(
    name: str, size: tuple[int, int]
) -> None:
    model = ready(SITES[name]())
    converted = rmfx.remove_residuals(model, image(1, 4, 9, 7))
    assert_equivalent(model, converted, image(3, 4, *size))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_convs_of_one_two_and_three_dimensions(dims: int) -> None:
    model = chain(
        Residual(basic_branch(4, 6, dims=dims, stride=2), conv_bn(4, 6, 1, dims=dims, stride=2)),
        nn.ReLU(),
        Residual(basic_branch(6, 6, dims=dims)),
    )
    converted = assert_removed(ready(model), image(2, 4, *(7, 5, 6)[:dims]), sites=2)
    assert f"Conv{dims}d" in types(converted)


@pytest.mark.parametrize("shape", [(5, 6), (2, 5, 6), (2, 3, 5, 6)])
@pytest.mark.parametrize("act", [nn.ReLU(), nn.PReLU(), nn.ReLU6(), nn.GELU()])
def test_linear_layers_on_features_and_on_tokens(shape: tuple[int, ...], act: nn.Module) -> None:
    model = ready(Residual(chain(nn.Linear(6, 9), act, nn.Linear(9, 6))))
    x = image(*shape)
    report = rmfx.report(converted := rmfx.remove_residuals(model, x))
    if len(shape) < 4:
        assert report.removed == 1
    assert_equivalent(model, converted, x)


def test_linear_projection_with_batch_norm_on_features() -> None:
    branch = chain(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 4))
    shortcut = chain(nn.Linear(6, 4, bias=False), nn.BatchNorm1d(4))
    assert_removed(ready(Residual(branch, shortcut)), image(5, 6), without_inputs=False)


# ---- numbers: several sites ---------------------------------------------------------------------


def test_nested_sites_go_inner_first() -> None:
    inner = Residual(conv_branch(), conv(kernel=1))
    model = Residual(chain(conv(), nn.ReLU(), inner, nn.ReLU6(), conv()))
    assert_removed(ready(model), image(), sites=2)


def test_site_nested_in_a_shortcut() -> None:
    model = Residual(conv_branch(), Residual(conv(kernel=1), conv()))
    assert_removed(ready(model), image(), sites=2)


def test_sum_of_three_branches_and_the_identity() -> None:
    model = Apply(
        lambda m, x: x + m.a(x) - m.b(x) + 0.5 * m.c(x),
        **{name: conv_branch(nn.LeakyReLU(0.1)) for name in "abc"},
    )
    assert_removed(ready(model), image(), sites=3)


def test_sum_of_sums() -> None:
    model = Apply(
        lambda m, x: (x + m.a(x)) + (m.b(x) + m.c(x)), **{name: conv_branch() for name in "abc"}
    )
    assert_removed(ready(model), image(), sites=3)


def test_several_sites_in_a_row_whose_forks_feed_each_other() -> None:
    model = chain(*(Residual(basic_branch()) for _ in range(4)))
    assert_removed(ready(model), image(), sites=4)


def test_several_sites_on_one_fork_where_one_may_go() -> None:
    """x is read by both sums, so each chain starts from x; the outputs are a dict."""
    model = ready(
        Apply(
            lambda m, x: {"sum": x + m.a(x), "difference": [m.b(x) - x]},
            a=conv_branch(),
            b=basic_branch(),
        )
    )
    assert_removed(model, image(), sites=2)


def test_densely_nested_sites_on_one_fork() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        y = x + m.a(x)
        return x + m.c(torch.relu(y))

    model = ready(Apply(forward, a=conv_branch(), c=conv()))
    assert_removed(model, image(), sites=2)


def test_several_inputs_and_a_tuple_of_outputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left = Residual(basic_branch())
            self.right = Residual(conv_branch(channels=3), conv(3, 3, 1))

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            left = self.left(x)
            return left, (self.right(y), left.mean((2, 3)))

    assert_removed(ready(Two()), image(2, 4, 5, 5), image(2, 3, 6, 6), sites=2)


def test_residual_head_behind_pooling_and_flatten() -> None:
    model = chain(
        *(conv_bn(3, 4), nn.ReLU(), Residual(basic_branch()), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        Residual(chain(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))),
    )
    assert_removed(ready(model), image(2, 3, 9, 9), sites=2)


# ---- numbers: activations and strategies --------------------------------------------------------

PER_CHANNEL = {
    "relu": nn.ReLU(),
    "leaky_relu": nn.LeakyReLU(0.2),
    "leaky_relu of slope above 1": nn.LeakyReLU(1.7),
    "leaky_relu of negative slope": nn.LeakyReLU(-0.4),
    "prelu": nn.PReLU(),
    "prelu per channel": nn.PReLU(4),
    "rrelu": nn.RReLU(),
    "relu6": nn.ReLU6(),
    "hardtanh": nn.Hardtanh(-0.3, 0.4),
    "clamp from below": Apply(lambda m, x: x.clamp(min=-0.2)),
    "clamp from above": Apply(lambda m, x: torch.clamp(x, max=0.2)),
    "F.relu6": Apply(lambda m, x: F.relu6(x)),
    "F.leaky_relu": Apply(lambda m, x: F.leaky_relu(x, 0.3)),
}
MASKED = {
    **{
        type(act).__name__.lower(): act
        for act in (
            *(nn.ELU(0.7), nn.CELU(0.6), nn.SELU(), nn.GELU(), nn.SiLU(), nn.Mish()),
            *(nn.Softplus(2.0), nn.Softsign(), nn.Tanh(), nn.Sigmoid(), nn.LogSigmoid()),
            *(nn.Hardsigmoid(), nn.Hardswish(), nn.Hardshrink(0.2), nn.Softshrink(0.2)),
            *(nn.Tanhshrink(), nn.Threshold(0.1, -0.3)),
        )
    },
    "gelu tanh": nn.GELU("tanh"),
    "F.gelu": Apply(lambda m, x: F.gelu(x, approximate="tanh")),
    "torch.sigmoid": Apply(lambda m, x: torch.sigmoid(x)),
    "x.tanh": Apply(lambda m, x: x.tanh()),
}


@pytest.mark.parametrize("name", PER_CHANNEL)
def test_activation_passed_by_one_operation_per_channel(name: str) -> None:
    model = ready(Residual(conv_branch(PER_CHANNEL[name])))
    converted = assert_removed(model, image(), strategy="per-channel")
    assert types(converted)[1] in ("PReLU", "ChannelClamp")


@pytest.mark.parametrize("name", MASKED)
def test_activation_passed_by_a_mask(name: str) -> None:
    model = ready(Residual(conv_branch(MASKED[name])))
    converted = assert_removed(model, image(), strategy="masked")
    assert types(converted) == ["Conv2d", "MaskedActivation", "Conv2d"]


@pytest.mark.parametrize("before", [nn.ReLU(), nn.ReLU6(), nn.Sigmoid(), nn.Hardsigmoid()])
@pytest.mark.parametrize("act", [nn.ReLU(), nn.LeakyReLU(), nn.PReLU(), nn.ELU(), nn.CELU()])
def test_carry_of_proven_sign_passes_unchanged(before: nn.Module, act: nn.Module) -> None:
    model = ready(chain(conv(), before, Residual(conv_branch(act))))
    assert_removed(model, image(), strategy="identity")


def test_carry_behind_a_max_pool_keeps_its_proven_sign() -> None:
    model = ready(chain(conv(), nn.ReLU(), nn.MaxPool2d(3, 2, 1), Residual(conv_branch())))
    assert_removed(model, image(), strategy="identity")


def test_carry_outside_the_clamp_is_not_clamped() -> None:
    """The carry is nonnegative but far above 6; treating ReLU6 as ReLU would be wrong."""
    scale = Apply(lambda m, x: 50 * x)
    model = ready(chain(conv(), nn.ReLU(), scale, Residual(conv_branch(nn.ReLU6()))))
    assert_removed(model, image(), strategy="per-channel")


def test_carry_of_a_sum_is_not_taken_for_nonnegative() -> None:
    model = ready(chain(nn.ReLU(), Residual(conv_branch()), Residual(conv_branch())))
    converted = assert_removed(model, image(), sites=2)
    assert [row.strategy for row in rmfx.report(converted).rows] == ["identity", "per-channel"]


@pytest.mark.parametrize(
    ("act", "bounds", "strategy"),
    [
        (nn.ReLU(), (0.0, 9.0), "identity"),
        (nn.ReLU(), (-0.1, 1.0), "per-channel"),
        (nn.ReLU6(), (0.0, 1.0), "identity"),
        (nn.ReLU6(), (0.0, 6.1), "scale"),
        (nn.ReLU6(), (-0.1, 6.0), "per-channel"),
        (nn.Hardtanh(), (-1.0, 1.0), "identity"),
        (nn.Hardswish(), (3.0, 4.0), "identity"),
        (nn.Hardswish(), (2.9, 4.0), "masked"),
        (nn.Threshold(0.5, 0.5), (0.5, 2.0), "identity"),
        (nn.Threshold(0.5, 0.0), (0.5, 2.0), "masked"),
    ],
)
def test_input_range_decides_whether_an_activation_is_the_identity(
    act: nn.Module, bounds: tuple[float, float], strategy: str
) -> None:
    low, high = bounds
    x = low + (high - low) * torch.rand(2, 4, 9, 7, dtype=torch.float64)
    x.flatten()[:2] = torch.tensor(bounds, dtype=torch.float64)
    assert_removed(ready(Residual(conv_branch(act))), x, strategy=strategy, input_range=bounds)


def test_unbounded_softsign_does_not_spoil_the_range_analysis() -> None:
    scale = Apply(lambda m, x: 100 * x)
    model = chain(nn.Softsign(), conv(), nn.ReLU(), scale, Residual(conv_branch(nn.ReLU6())))
    assert_removed(ready(model), image(), strategy="scale")


def test_shared_activation_module_is_no_hindrance() -> None:
    for act in (nn.ReLU(), nn.PReLU(), nn.SiLU()):
        assert_removed(ready(Residual(chain(conv(), act, conv(), act, conv()))), image())


# ---- the options --------------------------------------------------------------------------------


def test_allowing_identity_only_refuses_with_the_strategy_it_would_need() -> None:
    model = ready(Residual(conv_branch()))
    assert_refused(model, image(), reason="per-channel", activation={"identity"})
    assert_refused(model, image(), reason="excludes", activation="identity", example=False)


def test_allowing_identity_only_still_removes_what_is_proven() -> None:
    model = ready(chain(nn.ReLU(), Residual(conv_branch())))
    assert_removed(model, image(), strategy="identity", activation="identity", without_inputs=False)


def test_excluding_the_mask_refuses_a_silu() -> None:
    model = ready(Residual(conv_branch(nn.SiLU())))
    assert_refused(model, image(), reason="masked", activation={"identity", "per-channel"})


@pytest.mark.parametrize("activation", ["auto mask", {"identity", "mask"}, set()])
def test_unknown_strategy_names_the_known_ones(activation: Any) -> None:
    with pytest.raises(rmfx.RmfxError, match="per-channel, odd-pair, shift, double-relu, masked"):
        rmfx.remove_residuals(ready(Residual(conv_branch())), activation=activation)


def test_strict_raises_at_the_first_refusal_and_not_without_one() -> None:
    model = ready(Residual(conv_branch(nn.SiLU())))
    assert rmfx.report(rmfx.remove_residuals(model, strict=True)).removed == 1
    with pytest.raises(rmfx.RefusedError, match=r"remove_residuals: the add add .*'masked'"):
        rmfx.remove_residuals(model, strict=True, activation="identity")


# ---- fold_batch_norm=False ----------------------------------------------------------------------


def test_batch_norm_is_kept_in_the_form_of_the_paper() -> None:
    model = ready(Residual(basic_branch()))
    converted = assert_removed(model, image(), fold_batch_norm=False)
    assert types(converted) == ["Conv2d", "BatchNorm2d", "PReLU", "Conv2d"]


def test_identity_batch_norm_has_the_statistics_of_the_carry() -> None:
    model = ready(Residual(basic_branch()))
    batches = [image(3, 4, 9, 7), 3 * image(2, 4, 5, 5) + 1]
    converted = rmfx.remove_residuals(model, fold_batch_norm=False, calibration=batches)
    norm: Any = next(m for m in converted.modules() if isinstance(m, nn.BatchNorm2d))
    values = torch.cat([b.transpose(0, 1).flatten(1) for b in batches], 1)
    assert torch.allclose(norm.running_mean[4:], values.mean(1))
    assert torch.allclose(norm.running_var[4:], values.var(1, unbiased=False))
    assert_equivalent(model, converted, image())


@pytest.mark.parametrize("act", [nn.ReLU(), nn.ReLU6(), nn.SiLU()])
def test_network_with_kept_batch_norm_trains_on(act: nn.Module) -> None:
    model = ready(chain(conv_bn(), nn.ReLU(), Residual(basic_branch(act=act)), nn.ReLU()))
    converted = rmfx.remove_residuals(model, image(), fold_batch_norm=False, calibration=[image()])
    assert rmfx.report(converted).adds_left == 0
    assert "BatchNorm2d" in types(converted)[2:]
    converted.train()
    optimizer = torch.optim.SGD(converted.parameters(), lr=0.01)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = (converted(image()) - 0.2).square().mean()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in converted.parameters())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", ["bottleneck, stride in the 3x3", "inverted residual"])
def test_deeper_blocks_keep_their_inner_batch_norms(name: str) -> None:
    converted = assert_removed(ready(SITES[name]()), image(), fold_batch_norm=False)
    assert types(converted).count("BatchNorm2d") == 2


def test_converted_network_with_folded_batch_norm_gets_gradients_everywhere() -> None:
    converted = rmfx.remove_residuals(ready(Residual(basic_branch(act=nn.ReLU6()))), image())
    converted(image()).square().mean().backward()
    assert all(p.grad is not None for p in converted.parameters())


# ---- types --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("act", [nn.ReLU(), nn.ReLU6(), nn.SiLU()])
def test_other_floating_types_stay_what_they_are(dtype: torch.dtype, act: nn.Module) -> None:
    model = ready(chain(conv_bn(), nn.ReLU(), Residual(basic_branch(act=act))), dtype)
    converted = assert_removed(model, image(dtype=dtype))
    assert {p.dtype for p in converted.parameters()} == {dtype}
    assert not converted.training


# ---- refusals -----------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Make, str]] = {
    "a layer norm": (
        lambda: Residual(chain(conv(), nn.GroupNorm(2, 4), conv())),
        "GroupNorm divides by statistics of each sample",
    ),
    "a value with one channel, gated by several": (
        lambda: Residual(
            Apply(lambda m, x: m.a(x) * torch.sigmoid(F.softmax(m.b(x), 1)), a=conv(4, 1), b=conv())
        ),
        "a tensor of 1 channel meets one of 4",
    ),
    "max pooling in a branch": (
        lambda: Residual(nn.MaxPool2d(3, 1, 1)),
        "MaxPool2d takes the largest",
    ),
    "a transposed conv": (
        lambda: Residual(chain(nn.ConvTranspose2d(4, 4, 2, stride=2), nn.AvgPool2d(2))),
        "ConvTranspose2d is a transposed convolution with a stride",
    ),
    "strides that do not correspond": (
        lambda: Residual(
            chain(conv(kernel=1, stride=2), nn.ReLU(), conv(kernel=1, stride=3)),
            chain(conv(kernel=1, stride=3), nn.ReLU(), conv(kernel=1, stride=2)),
        ),
        "do not correspond",
    ),
    "a shift from pixel to pixel": (
        lambda: Residual(
            Apply(lambda m, x: m.c(x) + m.p, c=conv(), p=nn.Parameter(torch.randn(9, 7)))
        ),
        "not one number per channel",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_exact_is_refused_with_its_reason(name: str) -> None:
    make, reason = REFUSED[name]
    assert_refused(ready(make()), image(), reason=reason)


SPREAD_OUT: dict[str, tuple[Make, str]] = {
    "over channels": (
        lambda: Residual(chain(conv(4, 1), nn.ReLU(), conv(1, 1))),
        "the add broadcasts, of 2x4x9x7 and 2x1x9x7",
    ),
    "over space": (
        lambda: Residual(chain(conv(), nn.AdaptiveAvgPool2d(1))),
        "the add broadcasts, of 2x4x9x7 and 2x4x1x1",
    ),
}


@pytest.mark.parametrize("name", SPREAD_OUT)
def test_an_add_that_broadcasts_is_no_residual_connection(name: str) -> None:
    make, reason = SPREAD_OUT[name]
    model = ready(make())
    converted = rmfx.remove_residuals(model, image())
    report = rmfx.report(converted)
    assert (report.removed, report.refused, report.other) == (0, 0, 1), str(report)
    assert reason in report.rows[0].reason
    assert report.rows[0].node in {node.name for node in converted.graph.nodes}
    assert_equivalent(model, converted, image())


def test_branches_that_agree_for_some_sizes_only_need_example_inputs() -> None:
    model = ready(Residual(conv(kernel=2, stride=2, padding=0), conv(kernel=1, stride=2)))
    x = image(2, 4, 8, 6)
    assert_refused(model, x, reason="for some input sizes only", example=False)
    plain = rmfx.remove_residuals(model, x)
    assert rmfx.report(plain).removed == 1
    for inputs in (x, image(1, 4, 6, 10)):
        assert_equivalent(model, plain, (inputs,))


def test_unknown_channels_ask_for_example_inputs() -> None:
    report = assert_refused(
        ready(Apply(lambda m, x: x + torch.relu(x))),
        image(),
        reason="pass example_inputs",
        example=False,
    )
    assert report.rows[0].shape is None


def test_write_to_the_networks_input_freezes_the_site() -> None:
    model = Residual(conv_branch(), combine=lambda x, y: x.add_(y))
    assert_refused(ready(model), image(), reason="writes to the network's input")


def test_write_seen_under_another_name_freezes_the_site() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        view = y.view(2, -1)
        y += x
        return view.view(2, 4, 9, 7) * 2 + y

    model = ready(Apply(forward, a=conv()))
    converted = rmfx.remove_residuals(model, image())
    assert "read under another name" in rmfx.report(converted).rows[0].reason
    assert_equivalent(model, converted, image())


def test_write_after_the_fork_was_read_goes_to_the_later_readers_only() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        y = m.a(x)
        z = m.b(y)
        y += x
        return z + m.c(y)

    model = ready(Apply(forward, a=conv(), b=conv(kernel=1), c=conv()))
    assert_equivalent(model, rmfx.remove_residuals(model, image()), image())


def test_refused_inner_site_lets_the_carry_of_the_outer_one_pass() -> None:
    model = ready(Residual(chain(conv(), Residual(nn.MaxPool2d(3, 1, 1)))))
    converted = rmfx.remove_residuals(model, image())
    rows = rmfx.report(converted).rows
    assert [(row.status, row.node) for row in rows[:1]] == [("refused", None)]
    assert rows[1].status == "removed"
    assert_equivalent(model, converted, image())


def test_refused_site_leaves_its_neighbours_alone() -> None:
    model = ready(
        chain(Residual(conv_branch()), Residual(nn.MaxPool2d(3, 1, 1)), Residual(conv_branch()))
    )
    converted = rmfx.remove_residuals(model, image())
    assert [r.status for r in rmfx.report(converted).rows] == ["removed", "refused", "removed"]
    assert_equivalent(model, converted, image())


# ---- idempotence, the model untouched -----------------------------------------------------------


@pytest.mark.parametrize("name", SITES)
def test_second_run_finds_nothing_and_the_model_is_unchanged(name: str) -> None:
    model = ready(SITES[name]())
    before = snapshot(model)
    once = rmfx.remove_residuals(model, image())
    assert_same(before, snapshot(model))
    twice = rmfx.remove_residuals(once, image())
    assert rmfx.report(twice).rows == ()
    assert types(twice) == types(once)
    assert_equivalent(once, twice, image())


@pytest.mark.parametrize(
    ("channels", "inner", "layout"),
    [
        (16, 4, "inner ones grouped"),
        (20, 8, "inner ones grouped, carry padded to whole groups"),
        (6, 16, "inner ones full"),
    ],
)
def test_the_report_tells_how_the_carry_passes(channels: int, inner: int, layout: str) -> None:
    branch = chain(conv(channels, inner, 1), nn.ReLU(), conv(inner, inner), nn.ReLU())
    model = ready(Residual(chain(branch, conv(inner, channels, 1))))
    (row,) = rmfx.report(rmfx.remove_residuals(model, image(1, channels, 6, 6))).rows
    assert row.layout == f"carried past 3 layers, {layout}"


def test_result_shares_no_memory_with_the_model() -> None:
    model = ready(chain(conv(), nn.GroupNorm(2, 4), Residual(conv_branch())))
    converted = rmfx.remove_residuals(model, image())
    expected = converted(image())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(converted(image()), expected)


def test_graph_module_and_exported_program_convert_like_the_module() -> None:
    model = ready(chain(conv_bn(), nn.ReLU(), Residual(basic_branch()), nn.ReLU()))
    traced = torch.fx.symbolic_trace(model)
    before = snapshot(traced)
    exported = torch.export.export(model, (image(),))
    for held in (traced, exported):
        converted = rmfx.remove_residuals(held, image())
        assert rmfx.report(converted).removed == 1
        assert types(converted) == ["Conv2d", "ReLU", "Conv2d", "ReLU", "Conv2d", "ReLU"]
        assert_equivalent(model, _without_report(converted), image())
    assert_same(before, snapshot(traced))


def _without_report(gm: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """Only outputs are compared: exported joins have names of their own."""
    gm.meta = {}
    return gm


def test_result_is_the_same_in_every_run() -> None:
    model = ready(chain(Residual(basic_branch()), Residual(bottleneck(), conv_bn(4, 8, 1))))
    first, second = (rmfx.remove_residuals(model, image()) for _ in range(2))
    assert first.code == second.code
    assert all(
        torch.equal(a, b)
        for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


# ---- property -----------------------------------------------------------------------------------


@settings(max_examples=8)
@given(residual_blocks())
def test_random_blocks_keep_their_function(spec: NetworkSpec) -> None:
    model, inputs = spec.build(seed=0), spec.inputs(seed=0)
    converted = rmfx.remove_residuals(model, inputs)
    assert_equivalent(model, converted, inputs)
    assert not rmfx.report(rmfx.remove_residuals(converted, inputs)).removed


@pytest.mark.parametrize("act", [nn.ReLU(), nn.ReLU6(), nn.SiLU(), nn.PReLU(4)], ids=str)
@pytest.mark.parametrize("tokens", [False, True], ids=["maps", "tokens"])
def test_a_block_that_was_converted_alone_stands_in_another_skip(
    act: nn.Module, tokens: bool
) -> None:
    """What rmfx leaves in a network is read back as what it was made of."""
    if tokens and isinstance(act, nn.PReLU):
        return  # torch's own takes dimension 1 for the channels
    layer = (lambda: nn.Linear(4, 4)) if tokens else (lambda: conv(4, 4))
    x = torch.randn(2, 5, 4).double() if tokens else image(2, 4, 8, 8)
    inner = ready(Residual(chain(layer(), act, layer())))
    plain = rmfx.remove_residuals(inner, x)
    assert rmfx.report(plain).removed == 1
    later = ready(Residual(chain(plain, layer())))
    out = rmfx.remove_residuals(later, x)
    assert rmfx.report(out).removed == 1
    assert_equivalent(later, out, x)
