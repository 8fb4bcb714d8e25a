"""Hypothesis strategies that draw random residual networks, and the same from a seed."""

from __future__ import annotations

from dataclasses import replace
from random import Random

from hypothesis import strategies as st

from rmfx.testing.drawing.sampler import Sampler
from rmfx.testing.networks.spec import NetworkSpec


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
