"""Small networks that rmfx ships as examples and as material for its tests and benchmarks."""

from rmfx.models.cifar import CifarResNet, cifar_resnet
from rmfx.models.digits import DigitsNet

__all__ = ["CifarResNet", "DigitsNet", "cifar_resnet"]
