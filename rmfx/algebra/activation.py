"""The table of pointwise activations. A new activation is one new row of `TABLE`."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rmfx.errors import Refusal, WeightValueError
from rmfx.interval import EVERYWHERE, INF, Interval
from rmfx.modules.activations import POINTWISE, Composed, Pointwise

from .layer import Layer


@dataclass(frozen=True)
class Row:
    """What the compiler knows of one kind of pointwise activation.

    Attributes:
        identity: the closed interval on which it returns its input, (inf, -inf) if none.
        image: a closed interval that holds every value it can take.
        monotone: whether it never decreases, so that the ends of a range map to the ends.
        slope: slope (float or per channel) below zero, for max(x, 0) + slope·min(x, 0).
        bounds: (low, high), for clamp(x, low, high).
        odd: κ in act(x) − act(−x) = κ·x, which holds for |x| up to the end of `identity`, or for
            every x if there is no such interval; nan if the module's options spoil it.
        rounds: whether it computes a rounded value even where it is the identity.
    """

    identity: Callable[[nn.Module], Interval] = lambda m: (INF, -INF)
    image: Callable[[nn.Module], Interval] = lambda m: EVERYWHERE
    monotone: bool = False
    slope: Callable[[nn.Module], Tensor | float] | None = None
    bounds: Callable[[nn.Module], Interval] | None = None
    odd: Callable[[nn.Module], float] | None = None
    rounds: bool = False


def _slopes(m: nn.Module) -> Interval:
    """Identity on [0, ∞), or everywhere if the slope is 1."""
    return (0.0, INF)


def _bounds(m: nn.Module) -> Interval:
    return (float(m.min_val), float(m.max_val))  # type: ignore[arg-type]


def _leaky_slope(m: nn.Module) -> float:
    return float(m.negative_slope)  # type: ignore[arg-type]


def _odd_clamp(m: nn.Module) -> float:
    """Nan, which is no factor, unless the clamp starts at 0."""
    return 1.0 if float(m.min_val) == 0 else math.nan  # type: ignore[arg-type]


def _rrelu_slope(m: nn.Module) -> float:
    """RReLU in eval mode uses the mean of its two slopes."""
    return (float(m.lower) + float(m.upper)) / 2  # type: ignore[arg-type]


def _softplus_image(m: nn.Module) -> Interval:
    """Positive, but the identity takes over above threshold / beta, which may be negative."""
    beta, threshold = float(m.beta), float(m.threshold)  # type: ignore[arg-type]
    return (min(0.0, threshold / beta), INF) if beta > 0 else EVERYWHERE


def _threshold_identity(m: nn.Module) -> Interval:
    # Where it jumps no rounding, be it of bfloat16, may take a value from above to the threshold.
    threshold, value = float(m.threshold), float(m.value)  # type: ignore[arg-type]
    room = 0.0 if threshold == value else max(abs(threshold), 1.0) / 64
    return (threshold + room, INF)


def _pointwise_image(m: nn.Module) -> Interval:
    even = m.name == "pow" and m.options[0] % 2 == 0  # type: ignore[index]
    return (0.0, INF) if even else POINTWISE[str(m.name)]


TABLE: dict[type[nn.Module], Row] = {
    nn.ReLU: Row(
        _slopes, lambda m: (0.0, INF), True, lambda m: 0.0, lambda m: (0.0, INF), lambda m: 1.0
    ),
    nn.LeakyReLU: Row(_slopes, slope=_leaky_slope, odd=lambda m: 1 + _leaky_slope(m)),
    nn.PReLU: Row(
        _slopes,
        slope=lambda m: m.weight.detach(),  # type: ignore[operator]
        odd=lambda m: 1 + float(m.weight.detach()),  # type: ignore[operator]
    ),
    nn.RReLU: Row(_slopes, slope=_rrelu_slope, odd=lambda m: 1 + _rrelu_slope(m)),
    nn.ReLU6: Row(_bounds, _bounds, True, bounds=_bounds, odd=_odd_clamp),
    nn.Hardtanh: Row(_bounds, _bounds, True, bounds=_bounds, odd=_odd_clamp),
    # Everything below passes an arbitrary carry by the mask or as an odd pair only.
    nn.ELU: Row(_slopes),
    nn.CELU: Row(_slopes),
    nn.SELU: Row(),
    nn.GELU: Row(image=lambda m: (-0.2, INF), odd=lambda m: 1.0),
    nn.SiLU: Row(image=lambda m: (-0.3, INF), odd=lambda m: 1.0),
    nn.Mish: Row(image=lambda m: (-0.4, INF)),
    nn.Softplus: Row(image=_softplus_image),
    nn.Softsign: Row(image=lambda m: (-1.0, 1.0), monotone=True),
    nn.Tanh: Row(image=lambda m: (-1.0, 1.0), monotone=True),
    nn.Sigmoid: Row(image=lambda m: (0.0, 1.0), monotone=True),
    nn.LogSigmoid: Row(image=lambda m: (-INF, 0.0), odd=lambda m: 1.0),
    nn.Hardsigmoid: Row(image=lambda m: (0.0, 1.0), monotone=True),
    nn.Hardswish: Row(lambda m: (3.0, INF), lambda m: (-0.4, INF), odd=lambda m: 1.0, rounds=True),
    nn.Hardshrink: Row(),
    nn.Softshrink: Row(),
    nn.Tanhshrink: Row(),
    nn.Threshold: Row(_threshold_identity),
    Pointwise: Row(
        identity=lambda m: (0.0, INF) if m.name == "abs" else (INF, -INF), image=_pointwise_image
    ),
    Composed: Row(),
}


@dataclass(frozen=True, eq=False)
class Activation(Layer):
    """One pointwise activation of a graph, as a value."""

    module: nn.Module

    @property
    def row(self) -> Row:
        return TABLE[type(self.module)]

    @property
    def identity(self) -> Interval:
        return self.row.identity(self.module)

    @property
    def image(self) -> Interval:
        return self.row.image(self.module)

    @property
    def bounds(self) -> Interval | None:
        """(low, high) of a clamp, None of any other."""
        return None if self.row.bounds is None else self.row.bounds(self.module)

    @property
    def odd(self) -> float:
        """κ in act(x) − act(−x) = κ·x for |x| up to `reach`; 0 if there is none."""
        if self.row.odd is None or self.is_per_channel:
            return 0.0
        try:
            factor = self.row.odd(self.module)
        except WeightValueError:  # a slope that may come to be -1 leaves no odd part
            return 0.0
        return factor if math.isfinite(factor) else 0.0

    @property
    def reach(self) -> float:
        """Up to which |x| the law of `odd` holds."""
        begin, end = self.identity
        return end if begin < end else INF

    @property
    def splits(self) -> bool:
        """Whether it takes x and −x, up to `reach`, to the positive and the negative part of x."""
        begin, _ = self.identity
        return bool(self.odd) and begin == 0 and self.image[0] >= 0

    def terms(self, size: float) -> float:
        """How much larger than κ·x the terms of its odd pair are, for |x| of about `size`."""
        slope = self.odd - 1 if self.row.slope is not None else 0.0
        middle = 2 * abs(float(self.apply(torch.zeros(1, dtype=torch.float64))))
        return (1 + abs(slope) + middle / size) / abs(1 + slope)

    @property
    def has_kink(self) -> bool:
        """Whether its slope jumps at an end of `identity`, where it has no gradient of its own."""
        return self.row.slope is not None or self.row.bounds is not None

    @property
    def is_per_channel(self) -> bool:
        """Whether its own parameters already differ from channel to channel."""
        return is_per_channel(self.module)

    @property
    def signature(self) -> tuple[object, ...]:
        """Equal for two activations that are the same function of every channel."""
        module = self.module
        if isinstance(module, nn.PReLU):
            return (nn.PReLU, module.num_parameters, _slope_as_key(module))
        ignored = ("training", "inplace")
        options = {k: v for k, v in vars(module).items() if k[0] != "_" and k not in ignored}
        constants = (id(tensor) for tensor in (*module.parameters(), *module.buffers()))
        return (type(module), *sorted(options.items()), *constants)

    @property
    def has_parameters(self) -> bool:
        return next(self.module.parameters(), None) is not None

    def over(self, width: int) -> tuple[Block, ...]:
        """As blocks of some channels."""
        return (Block(width, self),)

    def unfit(self, channels: int, dims: int, rank: int | None) -> Refusal | None:
        if not self.is_per_channel:
            return None
        if not dims and rank != 2:
            return Refusal(
                "PReLU with a slope per channel acts on dimension 1, not on the features"
            )
        if self.module.num_parameters != channels:
            return Refusal(f"a PReLU for other than {channels} channels")
        return None

    def apply(self, x: Tensor) -> Tensor:
        """Value at x: (channels,) float64, computed in float64."""
        module = copy.deepcopy(self.module).to("cpu", torch.float64)
        value: Tensor
        with torch.no_grad():
            value = plain_copy(module)(x.unsqueeze(0)).squeeze(0)
        return value

    def fixes_all_of(self, low: float, high: float) -> bool:
        """Whether it returns every value between two numbers unchanged."""
        begin, end = self.identity
        return begin <= low and high <= end

    def fixes(self, low: Tensor, high: Tensor) -> bool:
        """Whether it returns every value between `low` and `high` unchanged."""
        return self.fixes_all_of(float(low.min()), float(high.max()))


def is_per_channel(module: nn.Module | None) -> bool:
    """Whether a module of torch has a parameter for each channel that it acts on."""
    return isinstance(module, nn.PReLU) and module.num_parameters > 1


def is_activation(module: nn.Module) -> bool:
    """Whether a module is in the table."""
    return type(module) in TABLE


def _slope_as_key(module: nn.PReLU) -> float:
    """Equal for two PReLUs of one slope; their own if slopes are several or may change."""
    if module.num_parameters == 1:
        with contextlib.suppress(WeightValueError):
            return float(module.weight.detach())
    return id(module.weight)


@dataclass(frozen=True, eq=False)
class Block:
    """`width` channels to which `activation` applies; None leaves them unchanged."""

    width: int
    activation: Activation | None


def plain_copy(module: nn.Module) -> nn.Module:
    """A copy that does not write into its input."""
    module = copy.deepcopy(module)
    if hasattr(module, "inplace"):
        module.inplace = False  # type: ignore[assignment]
    return module.eval()
