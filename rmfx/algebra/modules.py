"""Linear layers from the modules of torch, and back."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rmfx.errors import Refusal, WeightError

from .affine import CONVS, TRANSPOSED, AffineConv, Pads, grouped, is_finite

ZERO_PADS: tuple[type[nn.Module], ...] = (nn.Identity, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d)
SMALLEST_OF_USE = 1e-30  # no network depends on what is smaller


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


def _conv_padding(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> Pads:
    """(left, right) per dimension; "same" puts the odd zero on the right, as PyTorch does."""
    if module.padding == "valid":
        return ((0, 0),) * len(module.kernel_size)
    if module.padding == "same":
        totals = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    return tuple((int(p), int(p)) for p in module.padding)


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


def _float64(x: Tensor) -> Tensor:
    return x.detach().to(torch.float64)


def to_modules(
    layer: AffineConv, dtype: torch.dtype, device: torch.device
) -> tuple[nn.Module, ...]:
    """Ordinary modules that apply a layer: one, or a padding and one.

    Raises:
        WeightError: a weight is not finite in `dtype`, or all weights of an output are so small
            that float16 has no digits for them.
    """
    own = layer if layer.dims else layer.regroup(1)
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
    symmetric = all(left == right >= 0 for left, right in own.padding)
    module = _empty(own, symmetric, dtype)
    module.weight = nn.Parameter(weight)
    module.register_parameter("bias", nn.Parameter(bias) if own.has_bias else None)
    if symmetric:
        return (module.eval(),)
    flat = tuple(p for pair in reversed(own.padding) for p in pair)
    return (ZERO_PADS[own.dims](flat).eval(), module.eval())


def _empty(layer: AffineConv, symmetric: bool, dtype: torch.dtype) -> nn.Module:
    """A module of a layer's geometry, without weights."""
    with torch.device("meta"):
        if not layer.dims:
            return nn.Linear(layer.in_channels, layer.out_channels, dtype=dtype)
        return CONVS[layer.dims](
            layer.in_channels,
            layer.out_channels,
            layer.kernel,
            stride=layer.stride,
            padding=layer.left if symmetric else 0,
            dilation=layer.dilation,
            groups=layer.groups,
            dtype=dtype,
        )


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
