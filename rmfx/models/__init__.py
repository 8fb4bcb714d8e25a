"""Small networks that rmfx ships as examples and as material for its tests and benchmarks."""

from rmfx.models.c2f import C2fNet
from rmfx.models.cifar import CifarResNet, cifar_resnet
from rmfx.models.digits import DigitsNet
from rmfx.models.edsr import Edsr
from rmfx.models.inception_resnet import InceptionResNet
from rmfx.models.preactivation import PreActivationResNet, preactivation_resnet

__all__ = [
    "C2fNet",
    "CifarResNet",
    "DigitsNet",
    "Edsr",
    "InceptionResNet",
    "PreActivationResNet",
    "cifar_resnet",
    "preactivation_resnet",
]
