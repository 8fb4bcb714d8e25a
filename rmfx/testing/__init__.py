"""An oracle that can fail, and random residual networks to feed it.

`assert_equivalent` compares two networks at their outputs and at every join that a pass has
touched. `residual_blocks` and `residual_networks` are hypothesis strategies that draw a
`NetworkSpec`: a network as data, whose `repr` is an expression that gives the same network back.

A property test of a pass of your own:

    from hypothesis import given
    from rmfx.testing import NetworkSpec, assert_equivalent, residual_networks

    @given(residual_networks())
    def test_my_pass_keeps_the_function(spec: NetworkSpec) -> None:
        before, inputs = spec.build(seed=0), spec.inputs(seed=0)
        assert_equivalent(before, my_pass(before, inputs), inputs)
"""

from rmfx.oracle.equivalence import Equivalence, assert_equivalent, noise_floor
from rmfx.verified import JoinError

from .networks.features import FEATURES
from .networks.further import Blur, Deconv, Shuffle, Transpose
from .networks.joins import ChannelsLast, Join, Recall, Save, Split
from .networks.layers import Act, Conv, Linear, Norm
from .networks.memory import Gain, SharedNorm, Write
from .networks.node import Node
from .networks.operations import (
    Arithmetic,
    Channels,
    Drop,
    Flatten,
    Opaque,
    Pad,
    PadChannels,
    Pool,
    Slice,
)
from .networks.places import Flip, Focal, Mean, Repeat, Reshaped, Roll, Take, Tokens
from .networks.spec import Network, NetworkSpec, random_statistics
from .strategies import random_block, random_network, residual_blocks, residual_networks

__all__ = [
    "FEATURES",
    "Act",
    "Arithmetic",
    "Blur",
    "Channels",
    "ChannelsLast",
    "Conv",
    "Deconv",
    "Drop",
    "Equivalence",
    "Flatten",
    "Flip",
    "Focal",
    "Gain",
    "Join",
    "JoinError",
    "Linear",
    "Mean",
    "Network",
    "NetworkSpec",
    "Node",
    "Norm",
    "Opaque",
    "Pad",
    "PadChannels",
    "Pool",
    "Recall",
    "Repeat",
    "Reshaped",
    "Roll",
    "Save",
    "SharedNorm",
    "Shuffle",
    "Slice",
    "Split",
    "Take",
    "Tokens",
    "Transpose",
    "Write",
    "assert_equivalent",
    "noise_floor",
    "random_block",
    "random_network",
    "random_statistics",
    "residual_blocks",
    "residual_networks",
]
