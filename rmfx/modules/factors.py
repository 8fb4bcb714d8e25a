"""Layers that multiply or add place by place, and layers that carry their input along."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus


class Elementwise(nn.Module):
    """A module that makes each channel of that channel of each value that it reads, as a sum."""


class Carried(Elementwise):
    """a·x: what a removed convolution leaves.

    Args:
        raw_carry: a before softplus.
    """

    def __init__(self, raw_carry: Tensor) -> None:
        super().__init__()
        self.raw_carry = nn.Parameter(raw_carry)

    @property
    def carry(self) -> Tensor:
        """a, which no step of training takes to 0 or below."""
        return softplus(self.raw_carry)

    def forward(self, x: Tensor) -> Tensor:
        """Maps any shape to itself."""
        return self.carry * x


class ResConv(Carried):
    """s·y + a·P(x): what a convolution made of x, and x.

    Args:
        stride: of the convolution, a number for each spatial dimension.
        scale: s at the start.
        carry: a at the start, above 0.
        dtype: of both.
    """

    way_out = "; rmfx.fuse_resconv makes one layer of it and its convolution"

    def __init__(
        self,
        stride: Sequence[int],
        scale: float,
        carry: float,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(torch.tensor(carry + math.log(-math.expm1(-carry)), dtype=dtype))
        self.stride = tuple(stride)
        self.scale = nn.Parameter(torch.tensor(float(scale), dtype=dtype))

    def forward(self, y: Tensor, x: Tensor) -> Tensor:  # type: ignore[override]
        """The sum; y and x have equal channels, and x `stride` times the size of y."""
        if max(self.stride) > 1:
            x = x[(slice(None), slice(None), *(slice(None, None, n) for n in self.stride))]
        return self.scale * y + self.carry * x
