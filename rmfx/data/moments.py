"""Mean and variance of channels, batch after batch."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


def _nothing() -> Tensor:
    return torch.zeros(0, dtype=torch.float64)


@dataclass(eq=False)
class Moments:
    """Mean and biased variance per channel, float64, by Chan's rule for two sets together.

    Attributes:
        count: values seen of each channel.
        mean: (channels,).
        squares: (channels,), sums of the squared distances to the mean.
    """

    count: int = 0
    mean: Tensor = field(default_factory=_nothing)
    squares: Tensor = field(default_factory=_nothing)

    def add(self, rows: Tensor) -> None:
        """Count values in; rows: (channels, values)."""
        rows = rows.detach().to(torch.float64)
        mean, n = rows.mean(1), rows.shape[1]
        squares = (rows - mean.unsqueeze(1)).square().sum(1)
        if self.count:
            total = self.count + n
            change = mean - self.mean
            mean = self.mean + change * (n / total)
            squares = self.squares + squares + change.square() * (self.count * n / total)
        self.count, self.mean, self.squares = self.count + n, mean, squares

    @property
    def variance(self) -> Tensor:
        """(channels,)."""
        return self.squares / max(self.count, 1)
