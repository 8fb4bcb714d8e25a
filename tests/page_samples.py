"""Pages that several tests look at."""

from __future__ import annotations

import functools
from typing import Any

import torch
from builders import Residual, basic_branch, chain, conv, conv_bn, image, ready
from torch import nn

from rmfx.cli.page import page
from rmfx.conversion import convert


def network() -> Any:
    refused = Residual(chain(conv(), nn.GroupNorm(2, 4), conv()))
    branches = Residual(basic_branch()), nn.ReLU(), Residual(conv_bn()), refused
    return ready(chain(conv_bn(), nn.ReLU(), *branches), torch.float32)


def made(title: str = "a network") -> str:
    x = image(1, 4, 12, 12, dtype=torch.float32)
    return page(convert(network(), x), (x,), title)


@functools.cache
def deep() -> str:
    """The page of a network that is drawn in several stages."""
    x = image(1, 4, 8, 8, dtype=torch.float32)
    blocks = (Residual(basic_branch()) for _ in range(24))
    end = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    model = ready(chain(chain(*blocks), *end), torch.float32)
    return page(convert(model, x), (x,), "deep")
