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
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rmfx.errors import Refusal, WeightError

from .layer import Layer

Ints = tuple[int, ...]
Pads = tuple[tuple[int, int], ...]
CONVS: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
MULTIPLYING = (*CONVS, *TRANSPOSED)  # whose weights are multiplied at every position
ZERO_PADS: tuple[type[nn.Module], ...] = (nn.Identity, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d)
SMALLEST_OF_USE = 1e-30  # no network depends on what is smaller
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

    @property
    def kernel(self) -> Ints:
        return tuple(self.weight.shape[2:])

    @property
    def out_channels(self) -> int:
        return int(self.weight.shape[0])

    @property
    def in_channels(self) -> int:
        return int(self.weight.shape[1]) * self.groups

    @property
    def block(self) -> tuple[int, int]:
        """(input channels, output channels) of one group."""
        return int(self.weight.shape[1]), self.out_channels // self.groups

    @property
    def span(self) -> Ints:
        """Distance between the first and the last tap."""
        return tuple(d * (k - 1) for d, k in zip(self.dilation, self.kernel, strict=True))

    @property
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
    def from_batch_norm(module: nn.Module, dims: int) -> AffineConv | Refusal:
        """Batch norm in eval mode: γ·(x − μ)/√(σ² + ε) + β."""
        mean, variance = module.running_mean, module.running_var
        if not isinstance(mean, Tensor) or not isinstance(variance, Tensor):
            return Refusal(
                "batch norm without running statistics normalises by the batch, which is not linear"
            )
        factor = 1 / torch.sqrt(_float64(variance) + float(module.eps))  # type: ignore[arg-type]
        if isinstance(module.weight, Tensor):
            factor = factor * _float64(module.weight)
        shift = -_float64(mean) * factor
        if isinstance(module.bias, Tensor):
            shift = shift + _float64(module.bias)
        return AffineConv.scale(factor, shift, dims=dims)

    @staticmethod
    def from_conv(module: nn.Module) -> AffineConv | Refusal:
        """An `nn.Linear` or `nn.Conv1d/2d/3d`."""
        own, given = module.weight, module.bias
        if not isinstance(own, Tensor):
            return Refusal(f"{type(module).__name__} has no weight")
        weight = own.detach()
        bias = given.detach() if isinstance(given, Tensor) else weight.new_zeros(weight.shape[0])
        if isinstance(module, nn.Linear):
            return AffineConv(weight, bias, (), (), ())
        if not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            return Refusal(f"{type(module).__name__} is not a convolution")
        padding = _conv_padding(module)
        if module.padding_mode != "zeros" and any(any(pair) for pair in padding):
            return Refusal(f"padding_mode={module.padding_mode!r} reads other values than zero")
        return AffineConv(
            weight, bias, tuple(module.stride), padding, tuple(module.dilation), module.groups
        )

    @staticmethod
    def from_transposed_conv(module: nn.Module) -> AffineConv | Refusal:
        """An `nn.ConvTranspose1d/2d/3d` of stride 1: a convolution with the kernel turned round."""
        if not isinstance(module, TRANSPOSED) or any(s > 1 for s in module.stride):
            return Refusal("a transposed convolution with a stride puts zeros between values")
        weight, given = module.weight.detach(), module.bias
        kernel = tuple(weight.shape[2:])
        padding = tuple(map(int, module.padding))
        blocks = grouped(weight, 0, module.groups).transpose(1, 2)  # (groups, out, in, *kernel)
        turned = blocks.flatten(0, 1).flip(tuple(range(2, weight.dim())))
        bias = weight.new_zeros(turned.shape[0]) if given is None else given.detach()
        pads = tuple(
            (d * (k - 1) - p, d * (k - 1) - p + extra)
            for k, d, p, extra in zip(
                kernel, module.dilation, padding, module.output_padding, strict=True
            )
        )
        ones = (1,) * len(kernel)
        return AffineConv(turned, bias, ones, pads, tuple(module.dilation), module.groups)

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
        if (kernel, dilation) == (self.kernel, self.dilation) and left == self._left:
            return self
        places = [
            torch.tensor([(t * d - own + new) // step for t in range(k)], device=self.weight.device)
            for k, d, own, new, step in zip(
                self.kernel, self.dilation, self._left, left, dilation, strict=True
            )
        ]
        weight = self.weight.new_zeros(*self.weight.shape[:2], *kernel)
        weight[at(torch.meshgrid(*places, indexing="ij"))] = self.weight
        padding = tuple(
            (new, a - new + d * (k - 1) + 1 - s)
            for new, a, d, k, s in zip(
                left, self.growth, dilation, kernel, self.stride, strict=True
            )
        )
        return replace(self, weight=weight, padding=padding, dilation=dilation)

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

    @property
    def _left(self) -> Ints:
        return tuple(left for left, _ in self.padding)

    # ---- turning it back into modules -------------------------------------------------------

    def to_modules(self, dtype: torch.dtype, device: torch.device) -> tuple[nn.Module, ...]:
        """Ordinary modules that apply this layer: one, or a padding and one.

        Raises:
            WeightError: a weight is not finite in `dtype`, or all weights of an output are so small
                that float16 has no digits for them.
        """
        groups = 1 if not self.dims else self.groups
        own = self.regroup(groups)
        weight, bias = own.weight.to(device, dtype), own.bias.to(device, dtype)
        if not (is_finite(weight) and is_finite(bias)):
            wider = [t for t in (torch.float32, torch.float64) if t.itemsize > dtype.itemsize]
            way_out = f"convert the model in {wider[0]}" if wider else "scale its weights down"
            raise WeightError(f"a merged weight is too large for {dtype}; {way_out}")
        if _vanishes(own, weight):
            raise WeightError(
                f"the merged weights of an output are too small for {dtype}; "
                "convert the model in torch.float32"
            )
        symmetric = all(left == right >= 0 for left, right in self.padding)
        layer = self._empty(own, symmetric, device, dtype)
        layer.weight = nn.Parameter(weight)
        layer.register_parameter("bias", nn.Parameter(bias) if self.has_bias else None)
        if symmetric:
            return (layer.eval(),)
        flat = tuple(p for pair in reversed(self.padding) for p in pair)
        return (ZERO_PADS[self.dims](flat).eval(), layer.eval())

    def _empty(
        self, own: AffineConv, symmetric: bool, device: torch.device, dtype: torch.dtype
    ) -> nn.Module:
        with torch.device("meta"):
            if not self.dims:
                return nn.Linear(self.in_channels, self.out_channels, dtype=dtype)
            return CONVS[self.dims](
                self.in_channels,
                self.out_channels,
                self.kernel,
                stride=self.stride,
                padding=self._left if symmetric else 0,
                dilation=self.dilation,
                groups=own.groups,
                dtype=dtype,
            )


def _conv_padding(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> Pads:
    """(left, right) per dimension; "same" puts the odd zero on the right, as PyTorch does."""
    if module.padding == "valid":
        return ((0, 0),) * len(module.kernel_size)
    if module.padding == "same":
        totals = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    return tuple((int(p), int(p)) for p in module.padding)


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


def _vanishes(layer: AffineConv, weight: Tensor) -> bool:
    """Whether an output of a layer loses its digits in a type whose normal numbers end early.

    Args:
        weight: that of the layer, in the type.
    """
    info = torch.finfo(weight.dtype)
    if info.tiny < SMALLEST_OF_USE:
        return False
    exact = layer.weight.to(weight.device, torch.float64).flatten(1)
    lost = (exact - weight.to(torch.float64).flatten(1)).abs().sum(1)
    beside = torch.maximum(exact.abs().sum(1), layer.bias.to(exact).abs())
    small = exact.abs().amax(1) < info.tiny
    return bool((small & (lost > info.eps * beside)).any())


def _float64(x: Tensor) -> Tensor:
    return x.detach().to(torch.float64)
