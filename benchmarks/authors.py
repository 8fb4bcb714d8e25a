"""What the RMNet authors' own conversion costs, computed from the architecture alone.

The paper (arXiv 2111.00687) and its published code convert by hand-written rules; none of that
code runs here. This module counts multiply-adds and parameters of the networks those rules give:

- ResNet, dense form. A block on C_in channels carries its input through all its convolutions as
  C_in more channels of ONE dense kernel: with inner widths m the convolutions become
  C_in -> m + C_in, ..., m + C_in -> C_out. A bottleneck's 3x3 is then (m + C_in)^2 wide, 25 times
  the original where C_in = 4m. A projection goes into the last convolution's carry channels.
- MobileNetV2, merged form. The depthwise layer of a residual block carries C_in more channels, then
  every project convolution and the 1x1 convolution after it become one (the activation between
  expand and depthwise is replaced by PReLU, which is not equivalent above 6, but free).

Run alone, it prints the three figures the comparison in cost.py rests on.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torchvision
from tabulate import tabulate
from torch import nn
from torchvision.models.mobilenetv2 import InvertedResidual, MobileNetV2
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet


@dataclass(frozen=True)
class AuthorsCost:
    """Multiply-adds for one image, and parameters (weights and biases, batch norm folded)."""

    macs: int
    parameters: int


class _Tally:
    """Adds up layers while following the spatial size through the network."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.macs = 0
        self.parameters = 0

    def conv(
        self, channels_in: int, channels_out: int, kernel: int = 1, stride: int = 1, groups: int = 1
    ) -> None:
        """One convolution with "same" padding and a bias; the tracked size shrinks by `stride`."""
        self.size = -(-self.size // stride)
        weights = channels_out * (channels_in // groups) * kernel**2
        self.macs += weights * self.size**2
        self.parameters += weights + channels_out

    def classifier(self, layer: nn.Linear) -> None:
        """The fully connected layer, which the conversion leaves alone."""
        self.macs += layer.in_features * layer.out_features
        self.parameters += (layer.in_features + 1) * layer.out_features

    def result(self) -> AuthorsCost:
        """What has been counted so far."""
        return AuthorsCost(self.macs, self.parameters)


def count_resnet(net: ResNet, size: int = 224) -> AuthorsCost:
    """Cost of the dense form of a torchvision ResNet with square input of `size` pixels.

    Raises:
        ValueError: the network has grouped convolutions, which the authors' code has no rule for.
    """
    tally = _Tally(size)
    channels = net.conv1.out_channels
    tally.conv(3, channels, kernel=7, stride=2)
    tally.size = -(-tally.size // 2)  # max pooling
    for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
        for block in stage:
            channels = _count_residual_block(tally, block, channels)
    tally.classifier(net.fc)
    return tally.result()


def count_mobilenet_v2(net: MobileNetV2, size: int = 224) -> AuthorsCost:
    """Cost of the merged form of torchvision's MobileNetV2 with square input of `size` pixels."""
    tally = _Tally(size)
    pending = net.features[0][0].out_channels  # channels that reach the next 1x1 convolution
    tally.conv(3, pending, kernel=3, stride=2)
    for block in net.features:
        if isinstance(block, InvertedResidual):
            pending = _count_inverted_block(tally, block, pending)
    tally.conv(pending, net.last_channel)
    tally.classifier(net.classifier[1])
    return tally.result()


def count(net: nn.Module, size: int = 224) -> AuthorsCost | None:
    """Cost of the authors' form of `net`, or None where they published no conversion."""
    if isinstance(net, MobileNetV2):
        return count_mobilenet_v2(net, size)
    if isinstance(net, ResNet) and not _has_groups(net):
        return count_resnet(net, size)
    return None


def _has_groups(net: nn.Module) -> bool:
    return any(m.groups > 1 for m in net.modules() if isinstance(m, nn.Conv2d))


def _count_residual_block(tally: _Tally, block: nn.Module, carry: int) -> int:
    """Adds one block whose input has `carry` channels; returns the number of output channels."""
    convs: list[nn.Conv2d]
    if isinstance(block, BasicBlock):
        convs = [block.conv1, block.conv2]
    elif isinstance(block, Bottleneck):
        convs = [block.conv1, block.conv2, block.conv3]
    else:
        raise ValueError(f"no rule for a block of type {type(block).__name__}")
    if any(conv.groups != 1 for conv in convs):
        raise ValueError("the authors' conversion has no rule for grouped convolutions")
    width = carry
    for conv in convs:
        last = conv is convs[-1]
        out = conv.out_channels + (0 if last else carry)
        tally.conv(width, out, conv.kernel_size[0], conv.stride[0])
        width = out
    return width


def _count_inverted_block(tally: _Tally, block: InvertedResidual, pending: int) -> int:
    """Adds the merged 1x1 before the depthwise layer and that layer; returns its width.

    Without an expansion (the first block) the depthwise layer follows the stem directly.
    """
    convs = [m for m in block.modules() if isinstance(m, nn.Conv2d)]
    depthwise = convs[-2]
    carry = convs[0].in_channels if block.use_res_connect else 0
    width = depthwise.out_channels + carry
    if len(convs) == 3:
        tally.conv(pending, width)
    tally.conv(width, width, depthwise.kernel_size[0], depthwise.stride[0], groups=width)
    return width


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; returns 0."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(arguments)
    names = ("resnet18", "resnet34", "resnet50", "mobilenet_v2")
    costs = {name: count(torchvision.models.get_model(name)) for name in names}
    found = {name: cost for name, cost in costs.items() if cost is not None}
    if options.json:
        print(json.dumps({name: asdict(cost) for name, cost in found.items()}, indent=2))
        return 0
    rows = [(name, cost.macs / 1e9, cost.parameters / 1e6) for name, cost in found.items()]
    headers = ("network at 224x224", "multiply-adds (G)", "parameters (M)")
    print(tabulate(rows, headers=headers, floatfmt=".3f"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
