"""Training-time blocks of the literature that no library at hand has, in small networks.

Each block computes as its paper says; none knows how to deploy itself.
"""

from __future__ import annotations

from torch import Tensor, nn

CHANNELS = 64
BLOCKS = 4


def _conv_bn(channels: int, kernel: int | tuple[int, int], groups: int = 1) -> nn.Sequential:
    size = (kernel, kernel) if isinstance(kernel, int) else kernel
    padding = (size[0] // 2, size[1] // 2)
    conv = nn.Conv2d(channels, channels, size, padding=padding, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels))


class AsymmetricBlock(nn.Module):
    """ACNet (arXiv 1908.03930): 3x3, 1x3 and 3x1 side by side."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.square = _conv_bn(channels, 3)
        self.row = _conv_bn(channels, (1, 3))
        self.column = _conv_bn(channels, (3, 1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.square(x) + self.row(x) + self.column(x)
        return out


class DiverseBranchBlock(nn.Module):
    """DBB (arXiv 2103.13425): 3x3; 1x1; 1x1 then 3x3; 1x1 then average.

    The paper pads behind the 1x1's batch norm with what that gives for zero, which is the same as
    padding before the 1x1.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.origin = _conv_bn(channels, 3)
        self.point = _conv_bn(channels, 1)
        self.sequence = nn.Sequential(
            self._padded_point(channels),
            nn.BatchNorm2d(channels),
            nn.Conv2d(channels, channels, 3, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.average = nn.Sequential(
            self._padded_point(channels),
            nn.BatchNorm2d(channels),
            nn.AvgPool2d(3, 1),
            nn.BatchNorm2d(channels),
        )

    @staticmethod
    def _padded_point(channels: int) -> nn.Module:
        return nn.Conv2d(channels, channels, 1, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.origin(x) + self.point(x) + self.sequence(x) + self.average(x)
        return out


class LargeKernelBlock(nn.Module):
    """RepLKNet (arXiv 2203.06717): a depthwise 13x13 beside a 5x5, between 1x1 convolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.before = _conv_bn(channels, 1)
        self.large = _conv_bn(channels, 13, groups=channels)
        self.small = _conv_bn(channels, 5, groups=channels)
        self.act = nn.ReLU()
        self.after = _conv_bn(channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.before(x))
        return self.after(self.act(self.large(y) + self.small(y)))  # type: ignore[no-any-return]


def network(block: type[nn.Module]) -> nn.Module:
    """A small classifier made of one kind of block."""
    layers: list[nn.Module] = [nn.Conv2d(3, CHANNELS, 7, stride=4, padding=3), nn.ReLU()]
    for _ in range(BLOCKS):
        layers += [block(CHANNELS), nn.ReLU()]
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(CHANNELS, 10))
    return nn.Sequential(*layers, *head)


OWN = {
    "acnet": AsymmetricBlock,
    "dbb": DiverseBranchBlock,
    "replknet": LargeKernelBlock,
}
