"""The shapes behind common layers by their laws, which is far quicker than running them."""

from __future__ import annotations

from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from rmfx.algebra.activation import is_activation
from rmfx.algebra.affine import CONVS
from rmfx.algebra.modules import from_conv
from rmfx.errors import Refusal

RANKS_OF_NORM: dict[type[nn.Module], tuple[int, ...]] = {
    nn.BatchNorm1d: (2, 3),
    nn.BatchNorm2d: (4,),
    nn.BatchNorm3d: (5,),
}


def shape_after(module: nn.Module, x: Tensor) -> tuple[int, ...] | None:
    """Shape behind a common layer, None where only running it can tell (or would fail)."""
    shape = tuple(x.shape)
    if is_activation(module) and not isinstance(module, nn.PReLU):
        return shape
    ranks = RANKS_OF_NORM.get(type(module))
    if ranks is not None:
        fits = len(shape) in ranks and shape[1] == module.num_features
        return shape if fits else None
    if type(module) not in CONVS or x.dtype != module.weight.dtype:
        return None
    if isinstance(module, nn.Linear):
        return (*shape[:-1], module.out_features) if shape[-1] == module.in_features else None
    with unset_fake_temporarily():  # fakes of its weights would take ten times as long
        layer = from_conv(module)
    if isinstance(layer, Refusal) or len(shape) != layer.dims + 2 or shape[1] != layer.in_channels:
        return None
    size = layer.output_size(shape[2:])
    return (shape[0], layer.out_channels, *size) if min(size) > 0 else None
