"""The networks of the coverage report: what they are, what is demanded of each, how they are made.

Whoever adds a network adds its name to one of the lists below; a network from elsewhere than
torchvision and timm gets a function of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torchvision
from _randomise import randomise
from torch import Tensor, nn

import rmfx.models
from rmfx.models import (
    C2fNet,
    Edsr,
    InceptionResNet,
    cifar_resnet,
    mobilenet_v2,
    preactivation_resnet,
    rmrep,
)
from rmfx.models.cifar import Shortcut

BATCH = 8  # of the calibration
Shape = tuple[int, ...]
# What is demanded: every add removed; what can be; none, for reasons known; nothing to do.
Kind = Literal["whole", "open", "refused", "untouched"]


@dataclass(frozen=True)
class Shapes:
    """Input shapes: the usual one, one with odd sides, and both small enough for a test suite."""

    even: Shape
    odd: Shape
    small_even: Shape
    small_odd: Shape


_IMAGES = Shapes((1, 3, 96, 96), (1, 3, 99, 85), (1, 3, 64, 64), (1, 3, 75, 67))
_CIFAR = Shapes((1, 3, 32, 32), (1, 3, 37, 33), (1, 3, 16, 16), (1, 3, 19, 21))
_VIDEO = Shapes((1, 3, 4, 48, 48), (1, 3, 5, 53, 45), (1, 3, 4, 32, 32), (1, 3, 5, 37, 45))
# Of smaller images these keep one pixel at the end. Statistics over one pixel of a few images are
# so nearly degenerate that folding batch norm alone loses nine digits.
_LARGE = Shapes((1, 3, 128, 128), (1, 3, 131, 139), (1, 3, 128, 128), (1, 3, 131, 139))


@dataclass(frozen=True)
class ZooNet:
    """One network of the zoo.

    Attributes:
        name: how it is called in tables and on the command line.
        build: makes it with random weights.
        shapes: of its inputs.
        kind: what is demanded of it.
        adds: residual additions it has, where that is known beforehand ("whole").
        hidden: whether the next layer after some of them may be one with the layer before them, so
            that no node of the result holds their sum ("whole").
        chain: whether it is a plain chain apart from its residual connections ("whole").
        causes: classes of refusals that are right for it ("refused"), see _blocked.py.
    """

    name: str
    build: Callable[[], nn.Module]
    shapes: Shapes
    kind: Kind = "open"
    adds: int | None = None
    hidden: bool = False
    chain: bool = False
    causes: frozenset[str] = frozenset()


def zoo() -> dict[str, ZooNet]:
    """The list, by name."""
    nets = [*_whole(), *_own(), *_open(), *_controls()]
    return {net.name: net for net in nets}


def everything() -> dict[str, ZooNet]:
    """Every network of torchvision (classification, segmentation, video) and timm, by name."""
    import timm  # here and below, since the tests run without it

    modules = (
        (torchvision.models, _IMAGES),
        (torchvision.models.segmentation, _IMAGES),
        (torchvision.models.video, _VIDEO),
    )
    nets = [
        ZooNet(f"torchvision:{name}", _from_torchvision(name), shapes)
        for module, shapes in modules
        for name in torchvision.models.list_models(module=module)
    ]
    nets += [ZooNet(f"timm:{name}", _from_timm(name), _IMAGES) for name in timm.list_models()]
    return {net.name: net for net in nets}


def prepared(net: ZooNet, shape: Shape | None = None, seed: int = 0) -> nn.Module:
    """Builds `net` in float64 and eval mode, with random statistics and no constant parameter.

    Args:
        net: which network.
        shape: of the inputs it is for, by default the small ones. Statistics of smaller images rest
            on few pixels in the last layers; with those the network would magnify every rounding.
        seed: of the random values.
    """
    torch.manual_seed(seed)
    model = net.build().double().eval()
    size = (shape or net.shapes.small_even)[1:]
    randomise(model, torch.randn(BATCH, *size, dtype=torch.float64))
    return model


def random_input(shape: Shape, seed: int = 1) -> Tensor:
    """A standard normal input in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


# ---- the lists ----------------------------------------------------------------------------------

_WHOLE = {
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
_TORCHVISION = """
deeplabv3_resnet50 efficientnet_b0 efficientnet_v2_s googlenet inception_v3 mobilenet_v3_large
mobilenet_v3_small regnet_y_400mf shufflenet_v2_x1_0 squeezenet1_1
"""
_TIMM = """
cs3darknet_s cspdarknet53 cspresnet50 darknet53 dla34 dpn68 ecaresnet26t edgenext_xx_small
efficientnet_lite0 ese_vovnet19b_dw fastvit_t8 fbnetc_100 gernet_s ghostnet_100 hardcorenas_a
hrnet_w18_small inception_resnet_v2 inception_v4 lcnet_050 legacy_seresnet18 mixnet_s mnasnet_small
mobilenetv3_large_100 mobilenetv4_conv_small mobileone_s0 nf_resnet26 nf_resnet50 nfnet_l0
regnetz_b16 repghostnet_050 repvgg_a0 repvit_m0_9 res2net50_26w_4s resnest14d resnet26d resnet50d
resnetblur18 resnetblur50 resnetv2_18 resnetv2_50 rexnet_100 selecsls42 semnasnet_100 seresnet18
seresnet50 skresnet18 spnasnet_100 starnet_s1 tf_efficientnet_b0 tinynet_a tinynet_e tresnet_m
vovnet39a xception41
"""
_NEEDS_ROOM = ("inception_v3", "inception_v4", "inception_resnet_v2")


def _whole() -> list[ZooNet]:
    nets = [
        ZooNet(name, _from_torchvision(name), _IMAGES, kind="whole", adds=adds, chain=True)
        for name, adds in _WHOLE.items()
    ]
    fcn, video = _from_torchvision("fcn_resnet50"), _from_torchvision("r3d_18")
    nets.append(ZooNet("fcn_resnet50", fcn, _IMAGES, kind="whole", adds=16))
    nets.append(ZooNet("r3d_18", video, _VIDEO, kind="whole", adds=8, chain=True))
    for depth in (20, 56, 110, 1202):
        nets += [_cifar(depth, "A"), _cifar(depth, "B")]
    return nets


# depth -> share of the channels that pass, as in the paper, and additions
_RMREP = {21: (0.25, 46), 37: (0.25, 86), 69: (0.5, 166), 133: (0.75, 326)}
_RMNEXT = {
    "rmnext41x5_16": 15,
    "rmnext50x5_32": 18,
    "rmnext50x6_32": 18,
    "rmnext101x6_16": 35,
    "rmnext152x6_32": 52,
}


def _own() -> list[ZooNet]:
    """Of rmfx.models."""
    return [
        ZooNet("edsr", Edsr, _CIFAR, kind="whole", adds=17, hidden=True, chain=True),
        ZooNet("c2f_net", C2fNet, _IMAGES, kind="whole", adds=5),
        ZooNet(
            "preactivation110",
            lambda: preactivation_resnet(110),
            _CIFAR,
            kind="whole",
            adds=54,
            hidden=True,
            chain=True,
        ),
        ZooNet("inception_resnet", InceptionResNet, _IMAGES, kind="whole", adds=5),
        ZooNet("mobilenet_v2_free", lambda: mobilenet_v2(1.5), _IMAGES, "whole", 10, chain=True),
        *(_rmrep(depth, ratio, adds) for depth, (ratio, adds) in _RMREP.items()),
        *(_rmnext(name, adds) for name, adds in _RMNEXT.items()),
    ]


def _open() -> list[ZooNet]:
    made = {name: _from_torchvision(name) for name in _TORCHVISION.split()}
    made |= {name: _from_timm(name) for name in _TIMM.split()}
    nets = [
        ZooNet(name, build, _LARGE if name in _NEEDS_ROOM else _IMAGES)
        for name, build in made.items()
    ]
    videos = ("mc3_18", "r2plus1d_18")
    return nets + [ZooNet(name, _from_torchvision(name), _VIDEO) for name in videos]


def _controls() -> list[ZooNet]:
    """What must be left alone."""
    norm = frozenset({"layer or group norm"})
    convnext, swin = _from_torchvision("convnext_tiny"), _from_torchvision("swin_t")
    vgg, densenet = _from_torchvision("vgg11_bn"), _from_torchvision("densenet121")
    return [
        ZooNet("convnext_tiny", convnext, _IMAGES, kind="refused", causes=norm),
        ZooNet("swin_t", swin, _IMAGES, kind="refused", causes=norm | {"attention"}),
        ZooNet("resnet50_gn", _from_timm("resnet50_gn"), _IMAGES, kind="refused", causes=norm),
        ZooNet("vgg11_bn", vgg, _IMAGES, kind="untouched"),
        ZooNet("densenet121", densenet, _IMAGES, kind="untouched"),
    ]


def _cifar(depth: int, shortcut: Shortcut) -> ZooNet:
    return ZooNet(
        f"cifar{depth}{shortcut}",
        lambda: cifar_resnet(depth, shortcut),
        _CIFAR,
        kind="whole",
        adds=(depth - 2) // 2,
        chain=True,
    )


def _rmrep(depth: int, ratio: float, adds: int) -> ZooNet:
    """Of a block's additions no value of the result holds any but the last."""
    build = partial(rmrep, depth, ratio)
    return ZooNet(f"rmrep{depth}", build, _IMAGES, "whole", adds, hidden=True, chain=True)


def _rmnext(name: str, adds: int) -> ZooNet:
    return ZooNet(name, getattr(rmfx.models, name), _IMAGES, "whole", adds, chain=True)


def _from_torchvision(name: str) -> Callable[[], nn.Module]:
    options: dict[str, object] = {"weights": None}
    if name in torchvision.models.list_models(module=torchvision.models.segmentation):
        options["weights_backbone"] = None
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False  # their initial weights would take a minute
    return lambda: _module(torchvision.models.get_model(name, **options))


def _from_timm(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        return _module(timm.create_model(name, pretrained=False))

    return build


def _module(made: nn.Module) -> nn.Module:
    """Gives what torchvision and timm make its type."""
    return made
