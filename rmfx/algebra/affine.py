"""Linear layers as values.

An `AffineConv` is y[n] = b + Σ_t W[t]·x[n·stride + t·dilation − left], with x read as 0 outside its
borders. Linear layers, convolutions, batch norm in eval mode, average pooling, constant scales,
crops, zero padding and strided slices are all of this form. Channels come first, then 0 (a Linear
layer) to 3 spatial dimensions.

Per dimension one number fixes the output size: with `span` = dilation·(kernel − 1) and
`growth` = left + right − span − 1 + stride, a layer maps size H to ⌊(H + growth) / stride⌋. Sizes
of a chain follow the same law with stride s₁·s₂ and growth a₁ + s₁·a₂: nested floors combine.
So two layers give equal sizes for every input exactly when stride and growth agree.

Whatever is computed is computed in float64 and cast once, by `to_modules`. Weights that were only
read or moved keep their own type, which holds them exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rmfx.errors import Refusal

from .layer import Layer

Ints = tuple[int, ...]
Pads = tuple[tuple[int, int], ...]
CONVS: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
MULTIPLYING = (*CONVS, *TRANSPOSED)  # whose weights are multiplied at every position
CONV_FUNCTIONS = (F.linear, F.conv1d, F.conv2d, F.conv3d)


@dataclass(frozen=True, eq=False)
class AffineConv(Layer):
    """A linear layer as an immutable value.

    Attributes:
        weight: shape (out, in // groups, *kernel).
        bias: shape (out,).
        stride: per spatial dimension.
        padding: (left, right) zeros per spatial dimension; a negative number crops.
        dilation: per spatial dimension.
        groups: number of channel groups.
    """

    weight: Tensor
    bias: Tensor
    stride: Ints
    padding: Pads
    dilation: Ints
    groups: int = 1
    is_linear: ClassVar[bool] = True
    keeps_channels: ClassVar[bool] = False

    # ---- what it is -------------------------------------------------------------------------

    @property
    def dims(self) -> int:
        """Number of spatial dimensions, 0 for a Linear layer."""
        return len(self.stride)

    @cached_property
    def kernel(self) -> Ints:
        return tuple(self.weight.shape[2:])

    @cached_property
    def out_channels(self) -> int:
        return int(self.weight.shape[0])

    @cached_property
    def in_channels(self) -> int:
        return int(self.weight.shape[1]) * self.groups

    @cached_property
    def block(self) -> tuple[int, int]:
        """(input channels, output channels) of one group."""
        return int(self.weight.shape[1]), self.out_channels // self.groups

    @property
    def left(self) -> Ints:
        """Zeros before the first value, per spatial dimension."""
        return tuple(left for left, _ in self.padding)

    @cached_property
    def span(self) -> Ints:
        """Distance between the first and the last tap."""
        return tuple(d * (k - 1) for d, k in zip(self.dilation, self.kernel, strict=True))

    @cached_property
    def growth(self) -> Ints:
        """a in: output size = ⌊(size + a) / stride⌋."""
        return tuple(
            left + right - span - 1 + s
            for (left, right), span, s in zip(self.padding, self.span, self.stride, strict=True)
        )

    @property
    def is_depthwise(self) -> bool:
        """One input channel and one output channel in each group."""
        return self.block == (1, 1)

    @property
    def is_pointwise(self) -> bool:
        """One tap per dimension (it may stride, crop or shift)."""
        return math.prod(self.kernel) == 1

    @property
    def preserves_size(self) -> bool:
        return all(s == 1 for s in self.stride) and not any(self.growth)

    @property
    def pads(self) -> bool:
        """Whether a border of zeros is added somewhere."""
        return any(left > 0 or right > 0 for left, right in self.padding)

    @property
    def has_bias(self) -> bool:
        return bool(self.bias.any())

    def output_size(self, size: Sequence[int]) -> Ints:
        """Spatial output sizes for spatial input sizes."""
        return tuple((h + a) // s for h, a, s in zip(size, self.growth, self.stride, strict=True))

    def multiply_adds(self, positions: int = 1) -> int:
        """Multiply-adds for `positions` output positions (pixels or tokens)."""
        return self.weight.numel() * positions

    def __call__(self, x: Tensor) -> Tensor:
        """Apply to x: (batch, in, *size), or (..., in) where there are no spatial dimensions."""
        weight, bias = self.weight.to(x), self.bias.to(x)
        if not self.dims:
            return F.linear(x, self.regroup(1).weight.to(x), bias)
        flat = [p for pair in reversed(self.padding) for p in pair]
        convolve: Callable[..., Tensor] = CONV_FUNCTIONS[self.dims]
        padded = F.pad(x, flat)
        return convolve(padded, weight, bias, self.stride, 0, self.dilation, self.groups)

    # ---- among other layers -----------------------------------------------------------------

    @property
    def reads_one_position(self) -> bool:
        return math.prod((*self.kernel, *self.stride)) == 1

    def unfit(self, channels: int, dims: int, rank: int | None) -> Refusal | None:
        if self.dims != dims:
            return Refusal(f"a layer of {self.dims} spatial dimensions among layers of {dims}")
        if self.in_channels != channels:
            return Refusal(f"a layer for {self.in_channels} channels on {channels}")
        return None

    def channels_behind(self, channels: int, dims: int) -> int:
        return self.out_channels

    def geometry(self, channels: int) -> AffineConv:
        return self

    # ---- making one -------------------------------------------------------------------------

    @staticmethod
    def pointwise(
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        dims: int,
        groups: int = 1,
        stride: Ints | None = None,
        padding: Pads | None = None,
    ) -> AffineConv:
        """One tap per position; weight: (out, in // groups)."""
        bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
        return AffineConv(
            weight.reshape(*weight.shape, *[1] * dims),
            bias,
            stride or (1,) * dims,
            padding or ((0, 0),) * dims,
            (1,) * dims,
            groups,
        )

    @staticmethod
    def scale(factor: Tensor, shift: Tensor | None = None, *, dims: int) -> AffineConv:
        """x ↦ factor·x + shift, channel by channel; factor, shift: (channels,)."""
        return AffineConv.pointwise(factor.reshape(-1, 1), shift, dims=dims, groups=factor.numel())

    @staticmethod
    def identity(
        channels: int,
        dims: int,
        *,
        stride: Ints | None = None,
        padding: Pads | None = None,
        device: torch.device | None = None,
    ) -> AffineConv:
        """x ↦ x, subsampled by `stride` and padded or cropped by `padding`."""
        # 0 and 1 are exact in the smallest type, which never widens the type of a neighbour.
        ones = torch.ones(channels, 1, dtype=torch.bfloat16, device=device)
        return AffineConv.pointwise(
            ones, dims=dims, groups=channels, stride=stride, padding=padding
        )

    @staticmethod
    def average_pool(
        channels: int,
        kernel: Ints,
        stride: Ints,
        padding: Ints,
        *,
        count_include_pad: bool = True,
        divisor: int | None = None,
        device: torch.device | None = None,
    ) -> AffineConv | Refusal:
        """Average pooling as a depthwise convolution with equal taps, the sizes rounded down."""
        if any(padding) and not count_include_pad and divisor is None:
            return Refusal(
                "average pooling with count_include_pad=False averages fewer values at the border"
            )
        tap = 1.0 / (divisor or math.prod(kernel))
        weight = torch.full((channels, 1, *kernel), tap, dtype=torch.float64, device=device)
        pads = tuple((p, p) for p in padding)
        return AffineConv(
            weight, weight.new_zeros(channels), stride, pads, (1,) * len(kernel), channels
        )

    def in_float64(self) -> AffineConv:
        """The same layer, ready to compute with."""
        return replace(self, weight=self.weight.to(torch.float64), bias=self.bias.to(torch.float64))

    # ---- changing its form, not its function ------------------------------------------------

    def regroup(self, groups: int) -> AffineConv:
        """The same map with fewer groups, the new places filled with zeros."""
        if groups == self.groups:
            return self
        per = self.groups // groups
        (n_in, n_out), kernel = self.block, self.kernel
        weight = self.weight.new_zeros(groups, per, n_out, per, n_in, *kernel)
        # The diagonal over the two `per` axes lands last: (groups, n_out, n_in, *kernel, per).
        diagonal = weight.diagonal(dim1=1, dim2=3)
        blocks = self.weight.reshape(groups, per, n_out, n_in, *kernel)
        diagonal.copy_(blocks.movedim(1, -1))
        return replace(
            self,
            weight=weight.reshape(self.out_channels, per * n_in, *kernel),
            groups=groups,
        )

    def in_window(self, left: Ints, dilation: Ints, kernel: Ints) -> AffineConv:
        """The same map with the taps placed in a larger window that starts at −left.

        Every tap must lie on the window's grid; `growth` (so the output size) stays.
        """
        if (kernel, dilation) == (self.kernel, self.dilation) and left == self.left:
            return self
        places = [
            torch.tensor([(t * d - own + new) // step for t in range(k)], device=self.weight.device)
            for k, d, own, new, step in zip(
                self.kernel, self.dilation, self.left, left, dilation, strict=True
            )
        ]
        weight = self.weight.new_zeros(*self.weight.shape[:2], *kernel)
        weight[at(torch.meshgrid(*places, indexing="ij"))] = self.weight
        padding = self.padding_in(left, dilation, kernel)
        return replace(self, weight=weight, padding=padding, dilation=dilation)

    def padding_in(self, left: Ints, dilation: Ints, kernel: Ints) -> Pads:
        """The padding of a window that starts at −left and gives the same output size."""
        return tuple(
            (new, a - new + d * (k - 1) + 1 - s)
            for new, a, d, k, s in zip(
                left, self.growth, dilation, kernel, self.stride, strict=True
            )
        )

    def pad_channels(self, n_in: int, n_out: int) -> AffineConv:
        """Append channels: new inputs are ignored, new outputs are zero."""
        if (n_in, n_out) == (self.in_channels, self.out_channels):
            return self
        if self.is_depthwise and n_in == n_out:
            extra = n_out - self.out_channels
            weight = torch.cat([self.weight, self.weight.new_zeros(extra, *self.weight.shape[1:])])
            bias = torch.cat([self.bias, self.bias.new_zeros(extra)])
            return replace(self, weight=weight, bias=bias, groups=n_out)
        own = self.regroup(1)
        weight = own.weight.new_zeros(n_out, n_in, *own.kernel)
        weight[: own.out_channels, : own.in_channels] = own.weight
        bias = own.bias.new_zeros(n_out)
        bias[: own.out_channels] = own.bias
        return replace(own, weight=weight, bias=bias)

    def split_into_groups(self) -> AffineConv:
        """The same map with as many groups as its zeros allow; for a layer with one group."""
        if self.groups != 1 or not self.dims or bool((self.weight[-1, 0] != 0).any()):
            return self  # with two groups or more the last output would not read the first input
        rows, columns = (self.weight != 0).flatten(2).any(2).nonzero().unbind(1)
        n_out, n_in = self.out_channels, self.in_channels
        for groups in range(math.gcd(n_out, n_in), 1, -1):
            fits = n_out % groups == 0 == n_in % groups
            if fits and bool((rows * groups // n_out == columns * groups // n_in).all()):
                blocks = self.weight.unflatten(0, (groups, -1)).unflatten(2, (groups, -1))
                weight = blocks.diagonal(dim1=0, dim2=2).movedim(-1, 0).flatten(0, 1)
                return replace(self, weight=weight.contiguous(), groups=groups)
        return self

    def reading(self, order: Tensor) -> AffineConv:
        """The same map of inputs in another order, for a layer with one group."""
        return replace(self, weight=self.weight[:, order.to(self.weight.device)])


def device_of(layers: Iterable[AffineConv]) -> torch.device:
    """Where layers live together: those made of constants are on the CPU and follow the others."""
    devices = {f.weight.device for f in layers}
    return next((d for d in devices if d.type != "cpu"), torch.device("cpu"))


def on_one_device(layers: Sequence[AffineConv]) -> list[AffineConv]:
    """The layers, all where they live together."""
    device = device_of(layers)
    return [replace(f, weight=f.weight.to(device), bias=f.bias.to(device)) for f in layers]


def at(place: Iterable[Any]) -> Any:
    """An index that leaves the leading dimensions whole."""
    return (..., *place)


def grouped(x: Tensor, dim: int, groups: int) -> Tensor:
    """A view with dimension `dim` split into (groups, rest)."""
    return x.view(*x.shape[:dim], groups, -1, *x.shape[dim + 1 :])


def is_finite(x: Tensor) -> bool:
    """Whether no element is NaN or infinite."""
    # One number tells it for nearly every tensor: NaN and Inf survive a sum.
    return bool(torch.isfinite(x.sum())) or bool(torch.isfinite(x).all())
