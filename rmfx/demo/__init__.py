"""A small trained network and digits it never saw, to try rmfx on.

The network is `rmfx.models.DigitsNet`; benchmarks/train_digits.py in the repository trained it.
The digits are from MNIST (Y. LeCun, C. Cortes, C. Burges), which is licensed under CC BY-SA 3.0.
"""

from __future__ import annotations

from importlib import resources

import torch
from safetensors.torch import load
from torch import Tensor

from ..models.digits import DigitsNet

__all__ = ["load_digits", "load_model"]


def load_model() -> DigitsNet:
    """The trained network, in eval mode.

    Example:
        >>> images, labels = load_digits()
        >>> answers = load_model()(images[:100]).argmax(1)
        >>> int((answers == labels[:100]).sum()) > 95
        True
    """
    model = DigitsNet()
    model.load_state_dict(_read("digits.safetensors"))
    return model.eval().requires_grad_(False)


def load_digits() -> tuple[Tensor, Tensor]:
    """500 digits, 50 of each kind, that the training never saw.

    Returns:
        Images (500, 1, 28, 28) in float32 from 0 to 1, and labels (500,) in int64.
    """
    digits = _read("test_digits.safetensors")
    return digits["images"].float() / 255, digits["labels"].to(torch.int64)


def _read(name: str) -> dict[str, Tensor]:
    return load(resources.files(__name__).joinpath(name).read_bytes())
