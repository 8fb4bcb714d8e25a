"""Networks that deploy through rmfx, and small ones for its examples, tests and benchmarks."""

from rmfx.models.c2f import C2fNet
from rmfx.models.cifar import CifarResNet, cifar_resnet
from rmfx.models.digits import DigitsNet
from rmfx.models.edsr import Edsr
from rmfx.models.inception_resnet import InceptionResNet
from rmfx.models.mobilenet import MobileNetV2, mobilenet_v2
from rmfx.models.preactivation import PreActivationResNet, preactivation_resnet
from rmfx.models.repvgg import RMRep, rmrep
from rmfx.models.rmnext import (
    RMNeXt,
    rmnext41x5_16,
    rmnext50x5_32,
    rmnext50x6_32,
    rmnext101x6_16,
    rmnext152x6_32,
)

__all__ = [
    "C2fNet",
    "CifarResNet",
    "DigitsNet",
    "Edsr",
    "InceptionResNet",
    "MobileNetV2",
    "PreActivationResNet",
    "RMNeXt",
    "RMRep",
    "cifar_resnet",
    "mobilenet_v2",
    "preactivation_resnet",
    "rmnext41x5_16",
    "rmnext50x5_32",
    "rmnext50x6_32",
    "rmnext101x6_16",
    "rmnext152x6_32",
    "rmrep",
]
