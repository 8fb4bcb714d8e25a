"""Each row of the table against PyTorch, and activations that differ from block to block."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from rmfx.algebra.activation import TABLE, Activation, Block, is_activation
from rmfx.algebra.blockwise import Blockwise, way_of
from rmfx.modules.activations import (
    ChannelClamp,
    ChannelPReLU,
    Composed,
    MaskedActivation,
    Pointwise,
)

CPU = torch.device("cpu")


def prelu(*slopes: float) -> nn.PReLU:
    module = nn.PReLU(len(slopes))
    module.weight = nn.Parameter(torch.tensor(slopes))
    return module


# One entry for each kind and for each option that changes a row's facts.
MODULES: tuple[nn.Module, ...] = (
    nn.ReLU(),
    nn.ReLU(inplace=True),
    nn.LeakyReLU(0.2),
    nn.LeakyReLU(-0.5),
    nn.LeakyReLU(1.5),
    prelu(0.25),
    prelu(-0.5),
    nn.RReLU(0.1, 0.3),
    nn.ReLU6(),
    nn.Hardtanh(-2.0, 0.5),
    nn.ELU(0.7),
    nn.CELU(0.7),
    nn.SELU(),
    nn.GELU(),
    nn.GELU(approximate="tanh"),
    nn.SiLU(),
    nn.Mish(),
    nn.Softplus(),
    nn.Softplus(beta=2.0, threshold=1.0),
    nn.Softplus(beta=1.0, threshold=-5.0),
    nn.Softsign(),
    nn.Tanh(),
    nn.Sigmoid(),
    nn.LogSigmoid(),
    nn.Hardsigmoid(),
    nn.Hardswish(),
    nn.Hardshrink(0.5),
    nn.Softshrink(0.5),
    nn.Tanhshrink(),
    nn.Threshold(0.0, 0.0),
    nn.Threshold(0.5, -1.0),
    nn.Threshold(-1.0, 20.0),
    Pointwise("abs"),
    Pointwise("square"),
    Pointwise("pow", 2),
    Pointwise("pow", 3),
    Composed(fx.symbolic_trace(lambda x: torch.floor(x) * (x > 0))),
    *map(Pointwise, ("exp", "expm1", "sinh", "cosh", "asinh", "atan", "sin", "cos", "erf", "sign")),
)
IDS = [str(module) for module in MODULES]
SAMPLES = torch.cat([torch.linspace(-30, 30, 6001), torch.linspace(-1, 1, 2001)]).double()


def value(module: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        y: Tensor = module.double().eval()(x.clone())
    return y


def clipped(samples: Tensor, low: float, high: float) -> Tensor:
    ends = [end for end in (low, high) if math.isfinite(end)]
    inside = samples[(samples >= low) & (samples <= high)]
    return torch.cat([inside, torch.tensor(ends, dtype=samples.dtype)]) if low <= high else inside


def test_every_row_is_sampled() -> None:
    assert {type(module) for module in MODULES} == set(TABLE)


@pytest.mark.parametrize("module", MODULES, ids=IDS)
def test_the_identity_interval_is_true(module: nn.Module) -> None:
    x = clipped(SAMPLES, *Activation(module).identity)
    torch.testing.assert_close(value(module, x), x, rtol=1e-15, atol=0)


@pytest.mark.parametrize("module", MODULES, ids=IDS)
def test_the_image_holds_every_value(module: nn.Module) -> None:
    low, high = Activation(module).row.image(module)
    y = value(module, SAMPLES)
    assert low <= y.min()
    assert y.max() <= high


@pytest.mark.parametrize("module", MODULES, ids=IDS)
def test_a_monotone_row_never_decreases(module: nn.Module) -> None:
    if Activation(module).row.monotone:
        assert (value(module, SAMPLES.sort().values).diff() >= 0).all()


@pytest.mark.parametrize("module", MODULES, ids=IDS)
def test_a_row_with_slope_or_bounds_is_that_formula(module: nn.Module) -> None:
    row, y = Activation(module).row, value(module, SAMPLES)
    if row.slope:
        slope = torch.as_tensor(row.slope(module), dtype=torch.float64)
        torch.testing.assert_close(y, SAMPLES.clamp(min=0) + slope * SAMPLES.clamp(max=0))
    if row.bounds:
        torch.testing.assert_close(y, SAMPLES.clamp(*row.bounds(module)), rtol=0, atol=0)


@pytest.mark.parametrize("module", MODULES, ids=IDS)
def test_apply_is_the_activation_in_float64(module: nn.Module) -> None:
    x = SAMPLES.clone()
    torch.testing.assert_close(Activation(module).apply(x), value(module, x), rtol=0, atol=0)
    assert torch.equal(x, SAMPLES)  # also where the module works in place


def test_only_pointwise_modules_are_activations() -> None:
    assert is_activation(nn.ReLU())
    assert not is_activation(nn.Softmax(1))
    assert not is_activation(type("MyReLU", (nn.ReLU,), {})())


@pytest.mark.parametrize(
    ("module", "low", "high", "fixed"),
    [
        (nn.ReLU(), 0.0, math.inf, True),
        (nn.ReLU(), -1e-9, 1.0, False),
        (nn.ReLU6(), 0.0, 6.0, True),
        (nn.ReLU6(), 0.0, 6.1, False),
        (nn.SiLU(), 0.0, 0.0, False),
        (nn.Threshold(1.0, 0.0), 1.0, 2.0, False),
        (nn.Threshold(1.0, 1.0), 1.0, 2.0, True),
    ],
)
def test_it_fixes_what_lies_in_its_identity(
    module: nn.Module, low: float, high: float, fixed: bool
) -> None:
    ends = (torch.tensor([end], dtype=torch.float64) for end in (low, high))
    assert Activation(module).fixes(*ends) is fixed


def test_nan_is_never_fixed() -> None:
    nan = torch.tensor([math.nan])
    assert not Activation(nn.ReLU()).fixes(nan, nan)


# ---- signatures ---------------------------------------------------------------------------------

SHARED = prelu(0.1, 0.2)


@pytest.mark.parametrize(
    ("a", "b", "equal"),
    [
        (nn.ReLU(), nn.ReLU(inplace=True), True),
        (nn.ReLU().eval(), nn.ReLU().train(), True),
        (nn.LeakyReLU(0.1), nn.LeakyReLU(0.1), True),
        (nn.LeakyReLU(0.1), nn.LeakyReLU(0.2), False),
        (nn.Hardtanh(0, 6), nn.ReLU6(), False),
        (nn.GELU(), nn.GELU(approximate="tanh"), False),
        (prelu(0.5), prelu(0.5), True),
        (prelu(0.5), prelu(0.4), False),
        (prelu(0.1, 0.2), prelu(0.1, 0.2), False),
        (SHARED, SHARED, True),
    ],
)
def test_equal_signatures_mean_the_same_function(a: nn.Module, b: nn.Module, equal: bool) -> None:
    assert (Activation(a).signature == Activation(b).signature) is equal


def test_blockwise_signatures_tell_widths_and_activations() -> None:
    def whole(*widths: int) -> Blockwise:
        acts = (Activation(nn.ReLU()), None)
        blocks = tuple(Block(w, a) for w, a in zip(widths, acts, strict=True))
        return Blockwise(blocks, 2)

    assert whole(2, 3).signature == whole(2, 3).signature
    assert whole(2, 3).signature != whole(3, 2).signature


# ---- blocks -------------------------------------------------------------------------------------


def blocks(*parts: tuple[int, nn.Module | None]) -> tuple[Block, ...]:
    return tuple(Block(width, module and Activation(module)) for width, module in parts)


MIXTURES = [
    ("identity", nn.ReLU, blocks((2, nn.ReLU()), (3, nn.ReLU(inplace=True)))),
    ("identity", nn.SiLU, blocks((2, nn.SiLU()))),
    ("identity", nn.ReLU, blocks((2, nn.ReLU()), (0, None))),
    ("identity", nn.ReLU, blocks((0, nn.SiLU()), (2, nn.ReLU()))),
    ("per-channel", nn.PReLU, blocks((2, nn.ReLU()), (3, None))),
    ("per-channel", nn.PReLU, blocks((2, nn.LeakyReLU(0.3)), (3, None), (1, nn.ReLU()))),
    ("per-channel", nn.PReLU, blocks((2, prelu(0.3)), (2, prelu(0.1, 0.2)))),
    ("per-channel", nn.PReLU, blocks((2, prelu(0.1, 0.2)))),
    ("per-channel", nn.PReLU, blocks((2, nn.RReLU(0.1, 0.3)), (3, None))),
    ("per-channel", ChannelClamp, blocks((2, nn.ReLU6()), (3, None))),
    ("per-channel", ChannelClamp, blocks((2, nn.ReLU()), (3, nn.ReLU6()), (1, None))),
    ("per-channel", ChannelClamp, blocks((2, nn.Hardtanh(-1, 2)), (3, nn.ReLU6()))),
    ("masked", MaskedActivation, blocks((2, nn.SiLU()), (3, None))),
    ("masked", MaskedActivation, blocks((2, nn.LeakyReLU(0.3)), (3, nn.ReLU6()))),
    ("masked", MaskedActivation, blocks((2, nn.SiLU()), (3, nn.GELU()), (1, None))),
    ("masked", MaskedActivation, blocks((2, prelu(0.1, 0.2)), (3, nn.SiLU()), (1, None))),
]


def block_by_block(parts: tuple[Block, ...], x: Tensor) -> Tensor:
    """The oracle: each activation on its own channels, which are dimension 1."""
    done = []
    for part, own in zip(parts, x.split([b.width for b in parts], 1), strict=True):
        module = part.activation.module if part.activation and part.width else None
        done.append(value(module, own) if module is not None else own)
    return torch.cat(done, 1)


@pytest.mark.parametrize(("strategy", "kind", "parts"), MIXTURES)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_one_module_applies_every_block(
    strategy: str, kind: type[nn.Module], parts: tuple[Block, ...], dims: int
) -> None:
    assert way_of(parts) == strategy
    module = Blockwise(parts, dims).to_module(torch.float64, CPU)
    x = 4 * torch.randn(2, sum(b.width for b in parts), *[3] * dims, dtype=torch.float64)
    given = x.clone()
    assert type(module) is kind
    torch.testing.assert_close(module(given).detach(), block_by_block(parts, x))
    assert torch.equal(given, x)  # nothing is written in place
    assert not module.training


@pytest.mark.parametrize(("strategy", "kind", "parts"), MIXTURES)
@pytest.mark.parametrize("shape", [(5,), (2, 5)], ids=["features", "tokens"])
def test_without_space_the_channels_come_last(
    strategy: str, kind: type[nn.Module], parts: tuple[Block, ...], shape: tuple[int, ...]
) -> None:
    whole = Blockwise(parts, 0)
    x = 4 * torch.randn(*shape, sum(b.width for b in parts), dtype=torch.float64)
    found = whole.to_module(torch.float64, CPU)(x.clone()).detach()
    expected = block_by_block(parts, x.reshape(-1, x.shape[-1])).reshape(x.shape)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("strategy", "kind", "parts"), MIXTURES)
@pytest.mark.parametrize("dims", [0, 2])
def test_what_is_left_in_a_network_is_read_back(
    strategy: str, kind: type[nn.Module], parts: tuple[Block, ...], dims: int
) -> None:
    whole = Blockwise(parts, dims)
    module = whole.to_module(torch.float64, CPU)
    found = Blockwise.of(module)
    if strategy == "identity" or (strategy == "per-channel" and kind is nn.PReLU and dims):
        assert found is None  # a module of torch's, which is an activation by itself
        return
    assert found is not None
    assert (found.width, found.dims) == (whole.width, dims)
    assert sum(b.width for b in found.blocks if b.activation is None) == (
        0 if kind is nn.PReLU else sum(b.width for b in parts if b.activation is None)
    )
    again = found.to_module(torch.float64, CPU)
    x = 4 * torch.randn(2, 3, *([whole.width] if not dims else []), dtype=torch.float64)
    x = x if not dims else 4 * torch.randn(2, whole.width, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(again(x), module(x), rtol=0, atol=0)


def test_bounds_that_are_equal_or_crossed_are_read_back() -> None:
    module = ChannelClamp(
        torch.tensor([0.0, 1.0, 2.0, -1.0]), torch.tensor([0.0, 1.0, 1.0, 3.0]), 2
    )
    found = Blockwise.of(module)
    assert found is not None
    x = 4 * torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(found.to_module(torch.float32, CPU)(x), module(x), rtol=0, atol=0)


def test_modules_that_are_not_of_our_making_are_not_read_back() -> None:
    assert Blockwise.of(nn.ReLU()) is None
    strange = MaskedActivation([nn.Softmax(1)], [torch.tensor([True, False])], 2)
    assert Blockwise.of(strange) is None


@pytest.mark.parametrize(("strategy", "kind", "parts"), MIXTURES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_carry_passes_bit_for_bit(
    strategy: str, kind: type[nn.Module], parts: tuple[Block, ...], dtype: torch.dtype
) -> None:
    module = Blockwise(parts, 1).to_module(dtype, CPU)
    x = (100 * torch.randn(4, sum(b.width for b in parts), 50)).to(dtype)
    y = module(x)
    assert y.dtype == dtype
    before, after = (t.split([b.width for b in parts], 1) for t in (x, y))
    for part, a, b in zip(parts, before, after, strict=True):
        if part.activation is None:
            assert torch.equal(a, b)


ODD = [
    (nn.ReLU(), 1.0),
    (nn.LeakyReLU(0.3), 1.3),
    (prelu(0.25), 1.25),
    (nn.RReLU(0.2, 0.4), 1.3),
    (nn.ReLU6(), 1.0),
    (nn.Hardtanh(0.0, 2.0), 1.0),
    (nn.GELU(), 1.0),
    (nn.GELU("tanh"), 1.0),
    (nn.SiLU(), 1.0),
    (nn.LogSigmoid(), 1.0),
    (nn.Hardswish(), 1.0),
]


@pytest.mark.parametrize(("module", "factor"), ODD, ids=lambda v: str(v))
def test_the_odd_part_is_a_multiple_of_x(module: nn.Module, factor: float) -> None:
    act = Activation(module.eval())
    assert act.odd == pytest.approx(factor)
    x = torch.linspace(-1, 1, 2001, dtype=torch.float64) * min(act.reach, 20.0)
    torch.testing.assert_close(act.apply(x) - act.apply(-x), act.odd * x)
    if act.splits:
        assert torch.equal(act.apply(x), x.clamp(min=0))


NEED_ARGUMENTS = (nn.Threshold, Pointwise, Composed)


@pytest.mark.parametrize("kind", [k for k in TABLE if k not in NEED_ARGUMENTS])
def test_every_other_activation_has_no_odd_factor(kind: type[nn.Module]) -> None:
    act = Activation(kind().eval())
    x = torch.linspace(-1, 1, 2001, dtype=torch.float64) * min(act.reach, 30.0)
    part = act.apply(x) - act.apply(-x)
    is_multiple = torch.allclose(part, part[-1] / x[-1] * x, rtol=0, atol=1e-12)
    # Clamps around 0 are odd themselves: a scale suffices.
    assert bool(act.odd) == is_multiple or isinstance(act.module, nn.Hardtanh)


@pytest.mark.parametrize("module", [m for m in MODULES if isinstance(m, NEED_ARGUMENTS)], ids=str)
def test_what_takes_arguments_has_no_odd_factor(module: nn.Module) -> None:
    assert Activation(module.eval()).odd == 0


def test_copied_activations_do_not_share_weights() -> None:
    module = prelu(0.5)
    copied = Blockwise(blocks((2, module)), 1).to_module(torch.float32, CPU)
    assert next(copied.parameters()) is not module.weight


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (lambda s: ChannelPReLU(s, 1), lambda x, s: F.prelu(x, s)),
        (lambda s: ChannelClamp(-s, s, 1), lambda x, s: x.clamp(-s.view(-1, 1), s.view(-1, 1))),
        (
            lambda s: MaskedActivation([nn.Tanh()], [s > 0.5], 1),
            lambda x, s: torch.where((s > 0.5).view(-1, 1), x.tanh(), x),
        ),
    ],
    ids=["ChannelPReLU", "ChannelClamp", "MaskedActivation"],
)
def test_made_modules_are_their_formula(
    made: Callable[[Tensor], nn.Module], expected: Callable[[Tensor, Tensor], Tensor]
) -> None:
    own, x = torch.rand(4), torch.randn(2, 4, 5)
    module = made(own)
    torch.testing.assert_close(module(x).detach(), expected(x, own))
    loaded = made(torch.zeros(4))
    loaded.load_state_dict(module.state_dict())
    assert torch.equal(loaded(x), module(x))
