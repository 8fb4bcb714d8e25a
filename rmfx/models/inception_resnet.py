"""A small network of Inception-ResNet-A blocks (Szegedy et al., arXiv 1602.07261, figure 10).

Three branches of one, two and three convolutions are concatenated, mixed by a linear 1x1
convolution, scaled down (section 3.3) and added; a ReLU follows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ._blocks import conv_bn


def conv_bn_relu(
    channels_in: int, channels_out: int, kernel: int, stride: int = 1
) -> nn.Sequential:
    """`conv_bn` with ReLU."""
    return conv_bn(channels_in, channels_out, kernel, stride, act=nn.ReLU(inplace=True))


class InceptionResNetA(nn.Module):
    """relu(x + scale * mix(cat(branches(x))))."""

    def __init__(self, channels: int, width: int, scale: float) -> None:
        super().__init__()
        narrow, middle, wide = width, width * 3 // 2, width * 2  # 32, 48 and 64 in the paper
        self.branch1 = conv_bn_relu(channels, narrow, 1)
        self.branch2 = nn.Sequential(
            conv_bn_relu(channels, narrow, 1), conv_bn_relu(narrow, narrow, 3)
        )
        self.branch3 = nn.Sequential(
            conv_bn_relu(channels, narrow, 1),
            conv_bn_relu(narrow, middle, 3),
            conv_bn_relu(middle, wide, 3),
        )
        self.mix = nn.Conv2d(narrow + narrow + wide, channels, 1)
        self.scale = scale
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, channels, H, W) to the same shape."""
        y = torch.cat([self.branch1(x), self.branch2(x), self.branch3(x)], 1)
        return self.relu(x + self.scale * self.mix(y))  # type: ignore[no-any-return]


class InceptionResNet(nn.Module):
    """A stem, blocks with one residual connection each, and a linear classifier.

    Args:
        blocks: how many; 5 in Inception-ResNet-v1.
        channels: of the value that the blocks add to; 256 in Inception-ResNet-v1.
        width: of the narrowest branch; 32 in the paper.
        scale: of each branch; the paper picks 0.1 to 0.3.
        num_classes: width of the classifier.

    Example:
        >>> import torch
        >>> InceptionResNet().eval()(torch.zeros(1, 3, 64, 64)).shape
        torch.Size([1, 10])
    """

    def __init__(
        self,
        blocks: int = 5,
        channels: int = 64,
        width: int = 16,
        scale: float = 0.17,
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_bn_relu(3, 32, 3, 2), conv_bn_relu(32, channels, 3, 2))
        self.blocks = nn.Sequential(
            *(InceptionResNetA(channels, width, scale) for _ in range(blocks))
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images (N, 3, H, W) to logits (N, num_classes)."""
        x = self.pool(self.blocks(self.stem(x)))
        return self.fc(torch.flatten(x, 1))  # type: ignore[no-any-return]
