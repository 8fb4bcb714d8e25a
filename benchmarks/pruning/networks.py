"""The two networks of the study, for images of 28 x 28 and one channel."""

from __future__ import annotations

from torch import nn
from torchvision.models.mobilenetv2 import InvertedResidual
from torchvision.ops import Conv2dNormActivation

from rmfx.models import cifar_resnet

CLASSES = 10


def resnet20() -> nn.Module:
    """A CIFAR ResNet-20 with projections: nine basic blocks of 16, 32 and 64 channels."""
    net = cifar_resnet(20, "B", CLASSES)
    net.conv1 = nn.Conv2d(1, 16, 3, padding=1, bias=False)
    return net


def mobilenet() -> nn.Module:
    """A small MobileNetV2: expansion 6, widths 16, 24 and 40, strides as for CIFAR, four skips."""
    layers: list[nn.Module] = [
        Conv2dNormActivation(1, 32, 3, stride=2, activation_layer=nn.ReLU6),
        InvertedResidual(32, 16, 1, 1),
    ]
    width = 16
    for channels in (24, 40):
        layers.append(InvertedResidual(width, channels, 2, 6))
        layers += [InvertedResidual(channels, channels, 1, 6) for _ in range(2)]
        width = channels
    layers += [
        Conv2dNormActivation(width, 160, 1, activation_layer=nn.ReLU6),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(160, CLASSES),
    ]
    return nn.Sequential(*layers)


NETWORKS = {"resnet20": resnet20, "mobilenet": mobilenet}
