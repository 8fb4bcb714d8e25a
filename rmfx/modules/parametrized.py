"""Layers whose parameters are computed become ordinary again.

torch's `remove_parametrizations` takes the property from a class that copies of the layer share.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn


def make_ordinary(layer: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    """Give a layer parameters in the place of all that are parametrized."""
    del layer.parametrizations
    layer.__class__ = type(layer).__bases__[0]
    for name, parameter in parameters.items():
        layer.register_parameter(name, parameter)
