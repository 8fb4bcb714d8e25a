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

from __future__ import annotations

from dataclasses import replace
from random import Random

from hypothesis import strategies as st

from ._equivalence import Equivalence, assert_equivalent, noise_floor
from ._network_features import FEATURES
from ._network_memory import Gain, SharedNorm, Write
from ._network_modules import Network, random_statistics
from ._network_nodes import Blur, ChannelsLast, Deconv, Shuffle, Split, Transpose
from ._network_places import Flip, Focal, Mean, Repeat, Reshaped, Roll, Take, Tokens
from ._network_sampler import Sampler
from ._networks import (
    Act,
    Arithmetic,
    Channels,
    Conv,
    Drop,
    Flatten,
    Join,
    Linear,
    NetworkSpec,
    Node,
    Norm,
    Opaque,
    Pad,
    PadChannels,
    Pool,
    Recall,
    Save,
    Slice,
)
from .report import JoinError

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


def random_block(random: Random) -> NetworkSpec:
    """Draw one residual block, sometimes behind a stem, with the choices of `random`.

    >>> random_block(Random(0)) == random_block(Random(0))
    True
    """
    return Sampler(random).block()


def random_network(random: Random) -> NetworkSpec:
    """Draw a network of one to four blocks, mostly with stem and sometimes with a head.

    Some are of another type than float64, which the tolerance of a comparison has to know.
    """
    return Sampler(random).network()


@st.composite
def residual_blocks(draw: st.DrawFn) -> NetworkSpec:
    """A strategy for one residual block of any kind, sometimes with other sites inside it.

    The block is a `NetworkSpec`: `.build(seed)` gives the module (eval mode, float64, random
    batch norm statistics), `.inputs(seed)` a tuple of inputs, `.features()` what occurs in it.
    Every drawn block runs; none is filtered out.
    """
    return random_block(draw(st.randoms(use_true_random=False)))


@st.composite
def residual_networks(draw: st.DrawFn) -> NetworkSpec:
    """A strategy for whole small networks: stem, blocks, what stands between them, head.

    Besides residual sites of every kind they hold what only looks like one (adds that broadcast,
    products, layers called twice, values used elsewhere), so a pass is tested for what it must
    leave alone too. Gates, splits, concatenations, shuffles, pools, blurs and further sites stand
    inside branches, to any depth. See `residual_blocks` for what a `NetworkSpec` offers.
    """
    return replace(random_network(draw(st.randoms(use_true_random=False))), dtype="float64")
