"""RepVGG blocks, and RepVGG networks of any depth that reserve channels (RMRep).

RepVGG (Ding et al., arXiv 2101.03697) trains relu(BN(conv3x3(x)) + BN(conv1x1(x)) + BN(x)) and
deploys one 3x3 convolution. RMNet (arXiv 2111.00687, section 3.4) lets the first r·C channels of
every second block pass as they are and makes RepVGG branches of the others, so that deep networks
can be trained: it calls these RMRep. Which block of a pair reserves, and how deep stages are, the
paper leaves open; here it is the second of each pair, and stages have the shares of RepVGG-B.

Nothing here knows how it is deployed: `rmfx.remove_residuals` or `rmfx.merge_branches` does that.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ._blocks import conv_bn

_STAGES = (4, 6, 16, 1)  # blocks of RepVGG-B after the stem
_WIDTHS = (64, 128, 256, 512)
_STRIDES = (2, 2, 2, 2, 2)  # of the stem and the first block of each stage


class RepVGGBlock(nn.Module):
    """Parallel 3x3 and 1x1 convolutions and, where sizes allow, the input; each with batch norm."""

    def __init__(self, channels_in: int, channels_out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv3 = conv_bn(channels_in, channels_out, 3, stride)
        self.conv1 = conv_bn(channels_in, channels_out, 1, stride)
        keeps = stride == 1 and channels_in == channels_out
        self.identity = nn.BatchNorm2d(channels_in) if keeps else None
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, channels_in, H, W) to (N, channels_out, ceil(H/stride), ceil(W/stride))."""
        y = self.conv3(x) + self.conv1(x)
        return self.relu(y if self.identity is None else y + self.identity(x))  # type: ignore[no-any-return]


class ReservingBlock(nn.Module):
    """A RepVGG block for the last channels; the first ones pass.

    What passes comes out of a ReLU, so the one at the end leaves it as it is.

    Args:
        channels: of input and output.
        reserved: how many of them pass.
    """

    def __init__(self, channels: int, reserved: int) -> None:
        super().__init__()
        self.reserved, self.made = reserved, channels - reserved
        self.conv3 = conv_bn(channels, self.made, 3, 1)
        self.conv1 = conv_bn(channels, self.made, 1, 1)
        self.identity = nn.BatchNorm2d(self.made)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, channels, H, W) to the same shape."""
        kept, rest = x[:, : self.reserved], x[:, self.reserved :]
        made = self.conv3(x) + self.conv1(x) + self.identity(rest)
        first = pad(kept, (0, 0, 0, 0, 0, self.made))
        return self.relu(first + pad(made, (0, 0, 0, 0, self.reserved, 0)))  # type: ignore[no-any-return]


class RMRep(nn.Module):
    """A RepVGG network that reserves channels; build it with `rmrep`."""

    def __init__(
        self,
        stages: Sequence[int],
        ratio: float,
        num_classes: int,
        widths: Sequence[int] = _WIDTHS,
        strides: Sequence[int] = _STRIDES,
        image_channels: int = 3,
    ) -> None:
        super().__init__()
        width, (stem_stride, *stage_strides) = widths[0], strides
        blocks: list[nn.Module] = [RepVGGBlock(image_channels, width, stem_stride)]
        for channels, count, stride in zip(widths, stages, stage_strides, strict=True):
            reserved = min(round(ratio * channels), channels - 1)
            for i in range(count):
                if i % 2 and reserved:
                    blocks.append(ReservingBlock(channels, reserved))
                else:
                    blocks.append(RepVGGBlock(width, channels, 1 if i else stride))
                width = channels
        self.blocks = nn.Sequential(*blocks)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images (N, image_channels, H, W) of any size to logits (N, num_classes)."""
        return self.fc(torch.flatten(self.avgpool(self.blocks(x)), 1))  # type: ignore[no-any-return]


def rmrep(
    depth: int = 21,
    ratio: float = 0.25,
    num_classes: int = 1000,
    *,
    widths: Sequence[int] = _WIDTHS,
    strides: Sequence[int] = _STRIDES,
    image_channels: int = 3,
) -> RMRep:
    """RepVGG of `depth` blocks of which every second one reserves channels.

    Args:
        depth: blocks, the stem among them; at least 5. The paper has 21, 37, 69 and 133.
        ratio: share of the channels that every second block reserves, from 0 (a RepVGG) to below 1;
            the paper has 0.25, 0.25, 0.5 and 0.75.
        num_classes: width of the classifier.
        widths: channels of the four stages.
        strides: of the stem and of the first block of each stage.
        image_channels: of the input.

    Raises:
        ValueError: a number is out of range, or there are not four widths and five strides.

    Example:
        >>> net = rmrep(21, 0.25)
        >>> len(net.blocks)
        21
    """
    if depth < 5:
        raise ValueError(f"depth must be at least 5, a stem and four stages, not {depth}")
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio must be at least 0 and below 1, not {ratio}")
    if len(widths) != len(_WIDTHS) or len(strides) != len(_STRIDES):
        raise ValueError("there must be four widths and five strides, the stem's first")
    return RMRep(_stages(depth - 1), ratio, num_classes, widths, strides, image_channels)


def _stages(blocks: int) -> tuple[int, ...]:
    """Blocks of each stage, in the shares of RepVGG-B; the last stage keeps its one."""
    first, second, _, last = _STAGES
    inner = sum(_STAGES) - last
    one = max(1, round((blocks - last) * first / inner))
    two = max(1, round((blocks - last) * second / inner))
    return one, two, blocks - last - one - two, last
