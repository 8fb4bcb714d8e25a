"""Draws of linear layers along other axes than the channels' own. They leave the shape as it is."""

from __future__ import annotations

from rmfx.testing.networks.further import Transpose
from rmfx.testing.networks.joins import ChannelsLast
from rmfx.testing.networks.layers import Act, Linear

from .draws import Draws
from .layers import act, affine
from .things import Thing, on_maps, on_tokens
from .values import Path


def channels_last(sampler: Draws, path: Path) -> None:
    """Linear layers on the channels as the last axis, as in ConvNeXt."""
    value = path.value
    inner = 2 * value.channels
    middle = Act(sampler.pick(("relu", "gelu", "silu", "hardswish")), "module")
    chain = (Linear(value.channels, inner), middle, Linear(inner, value.channels))
    sampler.put(path, ChannelsLast(chain, value.dims))


def mix_tokens(sampler: Draws, path: Path) -> None:
    """Linear layers along the tokens, as in MLP-Mixer."""
    length, features = path.value.shape
    form = sampler.pick(("transpose", "permute"))
    sampler.put(path, Transpose(form), (features, length), alias=True)
    affine(sampler, path, sampler.pick((4, 2)))
    act(sampler, path)
    affine(sampler, path, length)
    sampler.put(path, Transpose(form), (length, features), alias=True)


MIXING = (Thing(channels_last, on_maps), Thing(mix_tokens, on_tokens, times=2))
