"""The networks the conversion must handle, with batch norms that hide no error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torchvision
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rmfx.models.cifar import Shortcut, cifar_resnet

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ZooNet:
    """One network of the zoo.

    Attributes:
        name: how it is called in tables and on the command line.
        build: makes it with random weights.
        adds: residual additions it has.
        even, odd: input shapes at full size: the usual one and one with odd sides.
        small_even, small_odd: the same, small enough for a test suite.
        classifier: whether it is a plain chain apart from its residual connections.
    """

    name: str
    build: Callable[[], nn.Module]
    adds: int
    even: Shape
    odd: Shape
    small_even: Shape
    small_odd: Shape
    classifier: bool = True


def zoo() -> dict[str, ZooNet]:
    """All networks, by name."""
    nets = [_imagenet(name, adds) for name, adds in _TORCHVISION.items()]
    nets.append(_segmentation())
    nets.append(_video())
    for depth in (20, 56, 110, 1202):
        nets += [_cifar(depth, "A"), _cifar(depth, "B")]
    return {net.name: net for net in nets}


def prepared(net: ZooNet, seed: int = 0) -> nn.Module:
    """Builds `net` in float64 and eval mode, with random batch norm statistics."""
    torch.manual_seed(seed)
    model = net.build().double().eval()
    calibration = torch.randn(4, *net.small_even[1:], dtype=torch.float64)
    randomise_batch_norms(model, calibration)
    return model


def random_input(shape: Shape, seed: int = 1) -> Tensor:
    """A standard normal input in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


@torch.no_grad()
def randomise_batch_norms(model: nn.Module, calibration: Tensor) -> None:
    """Gives every batch norm random parameters and statistics that keep activations sane.

    Fresh statistics (mean 0, variance 1, no affine part) hide errors, and careless random ones
    explode or vanish over a thousand layers, after which a relative error says nothing. So each
    layer, in the order of one forward pass, takes the mean and variance of what reaches it, moves
    the mean by about half a standard deviation and the variance by a factor from 0.5 to 2; its
    scale is 0.5 to 1.5 of either sign, its offset normal with deviation 0.5.

    Args:
        model: in eval mode; changed in place.
        calibration: one batch the model accepts.
    """
    handles = [
        module.register_forward_pre_hook(_randomise_batch_norm)
        for module in model.modules()
        if isinstance(module, _BatchNorm)
    ]
    try:
        model(calibration)
    finally:
        for handle in handles:
            handle.remove()


def _randomise_batch_norm(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    if not isinstance(module, _BatchNorm) or module.running_var is None:
        return
    if module.running_mean is None:
        return
    x = inputs[0].transpose(0, 1).flatten(1)
    variance = x.var(1, unbiased=False)
    # A dead channel has variance 0; a division by nearly 0 would make it the loudest one.
    variance = variance.clamp_min(0.01 * variance.mean() + 1e-6)
    mean = x.mean(1) + 0.5 * variance.sqrt() * torch.randn_like(variance)
    module.running_mean.copy_(mean)
    module.running_var.copy_(variance * torch.empty_like(variance).uniform_(0.5, 2.0))
    sign = torch.where(torch.rand_like(variance) < 0.5, -1.0, 1.0)
    module.weight.copy_(sign * torch.empty_like(variance).uniform_(0.5, 1.5))
    module.bias.copy_(0.5 * torch.randn_like(variance))


_TORCHVISION = {
    "resnet18": 8,
    "resnet34": 16,
    "resnet50": 16,
    "resnet101": 33,
    "resnet152": 50,
    "resnext50_32x4d": 16,
    "wide_resnet50_2": 16,
    "mobilenet_v2": 10,
    "mnasnet1_0": 10,
    "regnet_x_400mf": 22,
}


def _imagenet(name: str, adds: int) -> ZooNet:
    return ZooNet(
        name,
        lambda: torchvision.models.get_model(name, weights=None),
        adds,
        even=(1, 3, 224, 224),
        odd=(1, 3, 225, 193),
        small_even=(1, 3, 64, 64),
        small_odd=(1, 3, 75, 67),
    )


def _segmentation() -> ZooNet:
    return ZooNet(
        "fcn_resnet50",
        lambda: torchvision.models.get_model(
            "fcn_resnet50", weights=None, weights_backbone=None, num_classes=21
        ),
        adds=16,
        even=(1, 3, 224, 224),
        odd=(1, 3, 225, 193),
        small_even=(1, 3, 64, 64),
        small_odd=(1, 3, 75, 67),
        classifier=False,
    )


def _video() -> ZooNet:
    return ZooNet(
        "r3d_18",
        lambda: torchvision.models.get_model("r3d_18", weights=None),
        adds=8,
        even=(1, 3, 4, 112, 112),
        odd=(1, 3, 5, 113, 97),
        small_even=(1, 3, 4, 32, 32),
        small_odd=(1, 3, 5, 37, 45),
    )


def _cifar(depth: int, shortcut: Shortcut) -> ZooNet:
    return ZooNet(
        f"cifar{depth}{shortcut}",
        lambda: cifar_resnet(depth, shortcut),
        adds=(depth - 2) // 2,
        even=(1, 3, 32, 32),
        odd=(1, 3, 37, 33),
        small_even=(1, 3, 16, 16),
        small_odd=(1, 3, 19, 21),
    )
