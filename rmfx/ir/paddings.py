"""Reading paddings and slices: as linear layers, or as borders of other values than zeros."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from rmfx.algebra.affine import AffineConv, Ints, Pads
from rmfx.errors import Refusal

from .elements import Border, Deferred
from .net import Net
from .nodes import slice_by_slice
from .notes import shape_of

LARGEST_NUMBER = 1e18  # of what is padded with: beyond it stands for infinity, as beside a maximum


def read_pad_module(node: fx.Node, module: Any) -> Deferred | Border | Refusal:
    """A module that pads with zeros or another number."""
    flat, value = tuple(module.padding), float(module.value)
    return _spatial_pad(flat) if value == 0 else border(node, flat, ("constant", value))


def read_pad(net: Net, node: fx.Node) -> Deferred | Border | Refusal:
    """`F.pad(x, pad, mode="constant", value=0)`: around space, or a number around channels."""
    names = ("input", "pad", "mode", "value")
    given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | node.kwargs
    flat = given.get("pad")
    if not isinstance(flat, (list, tuple)) or not all(isinstance(p, int) for p in flat):
        return Refusal("the padding is not constant")
    mode, value = given.get("mode", "constant"), given.get("value")
    if mode == "constant" and value in (None, 0, 0.0):
        return _spatial_pad(tuple(flat))
    if not isinstance(value, (int, float, type(None))):
        return Refusal("the padding is not constant")
    *space, (before, after) = zip(flat[::2], flat[1::2], strict=True) if flat else [(0, 0)]
    number = float(value or 0)
    is_number = mode == "constant" and abs(number) < LARGEST_NUMBER
    if is_number and net.rank(node) == len(space) + 2 and not any(map(any, space)):
        return _channel_pad(len(space), before, after, number)
    return border(node, tuple(flat), (mode, number))


def _channel_pad(space: int, before: int, after: int, value: float) -> Deferred:
    def build(channels: int, dims: int) -> AffineConv | Refusal:
        if dims != space:  # features, which are the last dimension
            return Refusal("padding reaches beyond the channels")
        return _pad_channels(channels, dims, before, after, value)

    return Deferred(build)


def border(node: fx.Node, flat: Ints, filling: tuple[str, float]) -> Border | Refusal:
    """A padding by pairs of numbers, the last dimension first, with other values than zeros."""
    pairs = tuple(zip(flat[::2], flat[1::2], strict=True))[::-1]
    if any(min(pair) < 0 for pair in pairs):
        return Refusal("padding that crops and pads with other values than zeros")
    return Border(node, pairs, filling)


def _spatial_pad(flat: Ints) -> Deferred:
    pairs = tuple(zip(flat[::2], flat[1::2], strict=True))  # last dimension first

    def build(channels: int, dims: int) -> AffineConv | Refusal:
        # Without spatial dimensions the last one holds the features.
        space, features = pairs[:dims], pairs[dims:]
        if any(any(pair) for pair in features[1:]):
            return Refusal("padding reaches beyond the channels")
        space = (*space, *[(0, 0)] * (dims - len(space)))[::-1]
        before, after = features[0] if features else (0, 0)
        if not before and not after:
            return AffineConv.identity(channels, dims, padding=space)
        return _pad_channels(channels, dims, before, after, padding=space)

    return Deferred(build)


def _pad_channels(
    channels: int,
    dims: int,
    before: int,
    after: int,
    value: float = 0.0,
    padding: Pads | None = None,
) -> AffineConv | Refusal:
    if channels + before + after < 1 or before < -channels or after < -channels:
        return Refusal("the padding removes every channel")
    number = torch.tensor(value, dtype=torch.float64)
    narrow = number.to(torch.bfloat16)  # a type that no other one has to follow
    weight = torch.eye(channels).to(narrow if narrow == number else number)
    weight = F.pad(weight, (0, 0, before, after))
    bias = F.pad(weight.new_zeros(channels), (before, after), value=value)
    return AffineConv.pointwise(weight, bias, dims=dims, padding=padding)


def read_slice(node: fx.Node) -> Deferred | Refusal:
    """x[:, :, a:b:s, …] with whole batch and channels: a strided crop."""
    index = node.args[1]
    if not isinstance(index, tuple) or not all(isinstance(i, slice) or i is ... for i in index):
        is_known = shape_of(node.all_input_nodes[0]) is not None
        way_out = "" if is_known else ", as far as is known; pass example_inputs"
        return Refusal(f"an index that is not made of slices{way_out}")
    parts = [i for i in index if isinstance(i, slice)]
    bounds = [b for s in parts for b in (s.start, s.stop, s.step)]
    if not all(b is None or isinstance(b, int) for b in bounds):
        return Refusal("a slice with bounds computed at run time")
    if index.count(...) > 1:
        return Refusal("an index with two ellipses")

    def build(channels: int, dims: int) -> AffineConv | Refusal:
        if len(parts) > dims + 2 or dims == 0:
            return Refusal("a slice of the batch or of the features")
        full = slice_by_slice(index, dims + 2)
        if full[0].indices(2**62) != (0, 2**62, 1):
            return Refusal("a slice of the batch")
        return _strided_crop(channels, full[1], full[2:])

    return Deferred(build)


def _strided_crop(channels: int, chosen: slice, slices: list[slice]) -> AffineConv | Refusal:
    stride, padding = [], []
    for s in slices:
        start, stop, step = s.start or 0, s.stop, s.step or 1
        if start < 0 or step < 1 or (stop is not None and stop >= 0 and stop < 2**62):
            return Refusal("a slice whose place depends on the input size")
        end = 0 if stop is None or stop > 0 else stop
        stride.append(step)
        padding.append((-start, end))
    crop = AffineConv.identity(channels, len(slices), stride=tuple(stride), padding=tuple(padding))
    rows = range(channels)[chosen]
    if rows == range(channels):
        return crop
    if not rows:
        return Refusal("a slice without channels")
    weight = torch.eye(channels, dtype=torch.bfloat16)[list(rows)]
    return AffineConv.pointwise(weight, dims=len(slices), stride=crop.stride, padding=crop.padding)
