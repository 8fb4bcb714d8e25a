"""EDSR, a super-resolution network (Lim et al., arXiv 1707.02921, section 3.2).

Residual blocks of two convolutions without batch norm, each scaled before it is added, and one
long skip around all of them; the resolution is raised at the end only. Images are taken as they
are: the published networks subtract a mean first, which is a convolution more and no addition.
"""

from __future__ import annotations

from torch import Tensor, nn


class EdsrBlock(nn.Module):
    """x + scale * conv(relu(conv(x))); nothing after the addition."""

    def __init__(self, features: int, scale: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(features, features, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(features, features, 3, padding=1)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, features, H, W) to the same shape."""
        return x + self.scale * self.conv2(self.relu(self.conv1(x)))  # type: ignore[no-any-return]


class Edsr(nn.Module):
    """An EDSR with `blocks` + 1 residual connections.

    Args:
        blocks: residual blocks; 16 in the paper's baseline, 32 in the final network.
        features: channels; 64 in the baseline, 256 in the final network.
        upscale: factor of the resolution.
        scale: of each block's branch; 1 in the baseline, 0.1 in the final network.

    Example:
        >>> import torch
        >>> Edsr(blocks=2, features=8).eval()(torch.zeros(1, 3, 12, 10)).shape
        torch.Size([1, 3, 24, 20])
    """

    def __init__(
        self, blocks: int = 16, features: int = 64, upscale: int = 2, scale: float = 0.1
    ) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, features, 3, padding=1)
        self.blocks = nn.Sequential(*(EdsrBlock(features, scale) for _ in range(blocks)))
        self.body_end = nn.Conv2d(features, features, 3, padding=1)
        self.expand = nn.Conv2d(features, features * upscale**2, 3, padding=1)
        self.shuffle = nn.PixelShuffle(upscale)
        self.tail = nn.Conv2d(features, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images (N, 3, H, W) to (N, 3, upscale * H, upscale * W)."""
        x = self.head(x)
        x = x + self.body_end(self.blocks(x))
        return self.tail(self.shuffle(self.expand(x)))  # type: ignore[no-any-return]
