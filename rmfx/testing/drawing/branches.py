"""Draws of main branches, of a known family or of any layers in any order."""

from __future__ import annotations

from .constructs import construct, unusual
from .draws import Draws
from .families import FAMILIES, basic, oddment
from .gates import layer_scale
from .layers import act, affine, layer, norm, perhaps_norm, some_style, some_width
from .steps import scale
from .values import Path
from .windows import padded_as_same, pool, strided_blur


def branch(sampler: Draws, path: Path) -> None:
    """A main branch of one of the known families, or of any layers in any order."""
    if sampler.one_in(4) and not sampler.is_large:
        unusual(sampler, path)
    if sampler.one_in(2):
        sampler.pick(_OF_LAYERS)(sampler, path)
    elif not sampler.is_large and sampler.one_in(3):
        sampler.pick(_OF_PARTS)(sampler, path)
    else:
        family = sampler.pick((basic, *FAMILIES))
        family(sampler, path, some_width(sampler, path.value), some_style(sampler))


# Of layers
def _free(sampler: Draws, path: Path) -> None:
    """One to four affine layers with any number of norms and activations around each."""
    for _ in range(sampler.pick((1, 2, 2, 3, 4))):
        if sampler.one_in(5):
            norm(sampler, path)
        outputs = some_width(sampler, path.value)
        groups = ("one", "grouped", "depthwise")
        affine(sampler, path, outputs, some_style(sampler), sampler.pick(groups))
        for _ in range(sampler.pick((0, 1, 1, 2))):
            sampler.pick((act, norm, act))(sampler, path)
        oddment(sampler, path)


def _linear(sampler: Draws, path: Path) -> None:
    """No activation at all."""
    for _ in range(sampler.pick((1, 1, 2, 3))):
        affine(sampler, path, some_width(sampler, path.value), some_style(sampler))
        perhaps_norm(sampler, path)
        if sampler.one_in(4):
            scale(sampler, path)


def _site_first(sampler: Draws, path: Path) -> None:
    """Another site that starts at the same fork; a few layers behind it."""
    if path.depth > 0 and not sampler.is_large:
        sampler.residual(path)
    if path.depth <= 0 or sampler.one_in(2):
        layer(sampler, path)


_OF_LAYERS = (_free, _free, _linear, _site_first)


# Of larger parts
def _constructs(sampler: Draws, path: Path) -> None:
    """One to three constructs with layers around them."""
    layer(sampler, path, some_width(sampler, path.value), some_style(sampler))
    for _ in range(sampler.pick((1, 1, 2, 3))):
        construct(sampler, path)
        if sampler.one_in(2):
            layer(sampler, path, style="preserve")
    if sampler.one_in(3):
        layer_scale(sampler, path)


def _shrinking(sampler: Draws, path: Path) -> None:
    """The size is halved by a pool, a blur pool or padding as TensorFlow has it."""
    if not path.value.is_map:
        layer(sampler, path)
        return
    if sampler.one_in(2):
        layer(sampler, path)
    sampler.pick((pool, strided_blur, padded_as_same))(sampler, path)
    layer(sampler, path, some_width(sampler, path.value), "preserve")


def _stacked(sampler: Draws, path: Path) -> None:
    """Several residual blocks: a skip over all of them."""
    for _ in range(sampler.pick((2, 2, 3))):
        if path.depth <= 0 or sampler.is_large:
            layer(sampler, path)
            continue
        sampler.residual(path)
        if not sampler.one_in(3):
            act(sampler, path)


_OF_PARTS = (_constructs, _shrinking, _stacked, _constructs)
