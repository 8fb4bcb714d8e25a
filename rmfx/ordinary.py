"""Calls of one tensor as ordinary layers of `torch.nn`, for libraries that know layers by class."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.utils import _pytree as pytree

from rmfx.frontend.calls import Arguments, arguments_of
from rmfx.ir.facts import facts_of
from rmfx.ir.kinds import ADAPTIVE_AVERAGES, ADAPTIVE_MAXIMA, BORDERS, PADS, overloads
from rmfx.ir.nodes import MEANS
from rmfx.ir.notes import why_frozen

Layers = tuple[nn.Module, ...]


@dataclass(frozen=True)
class _Row:
    """Calls that amount to layers.

    Attributes:
        targets: what is called.
        names: of the arguments behind the input, in order.
        build: gives the layers for the arguments and the input's number of dimensions (None if it
            is not known); none where there are no such layers.
    """

    targets: Sequence[Any]
    names: str
    build: Callable[[Arguments, int | None], Layers]


def layers_of(gm: fx.GraphModule, node: fx.Node) -> Layers:
    """The layers in a row that compute what a call computes; none if `torch.nn` has none.

    >>> gm = fx.symbolic_trace(lambda x: F.pad(x, (1, 2)).softmax(1))
    >>> [layers_of(gm, node) for node in gm.graph.nodes][2:3]
    [(Softmax(dim=1),)]
    """
    row = _ROWS.get(node.target) if node.op in ("call_function", "call_method") else None
    if row is None or why_frozen(node):
        return ()
    given = arguments_of(node, "input", *row.names.split())
    x = given.pop("input", None)
    if not isinstance(x, fx.Node) or not given.keys() <= {*row.names.split()}:
        return ()
    return row.build(given, facts_of(gm).rank(x))


# ---- dimensions that go -------------------------------------------------------------------------
def _pool(kinds: tuple[Any, ...]) -> Callable[[Arguments, int | None], Layers]:
    """A mean, or a maximum, over dimensions of space as a pool to size 1 there."""

    def build(given: Arguments, rank: int | None) -> Layers:
        dims = given.get("dim")
        dims = [dims] if isinstance(dims, int) else dims
        if rank not in (3, 4, 5) or not dims or given.get("dtype") is not None:
            return ()
        if not all(isinstance(dim, int) for dim in dims):
            return ()
        pooled = {dim % rank for dim in dims}
        if min(pooled) < 2 or len(pooled) != max(pooled) - min(pooled) + 1:
            return ()
        sizes = tuple(1 if dim in pooled else None for dim in range(2, rank))
        pool = kinds[rank - 3](1 if set(sizes) == {1} else sizes)
        return (pool,) if given.get("keepdim") else (pool, _without(dims, rank))

    return build


def _without(dims: list[int], rank: int) -> nn.Flatten:
    """The layer that drops dimensions of size 1 in a row, counted from the end as they are."""
    if min(dims) < 0:
        dims = [dim % rank - rank for dim in dims]
    last = max(dims) % rank == rank - 1
    return nn.Flatten(min(dims) - 1, -1 if last else max(dims))


# ---- others -------------------------------------------------------------------------------------
def _softmax(kind: Any) -> Callable[[Arguments, int | None], Layers]:
    def build(given: Arguments, rank: int | None) -> Layers:
        keeps_type = given.get("dtype") is None and not given.get("half_to_float")
        return (kind(given["dim"]),) if keeps_type and isinstance(given.get("dim"), int) else ()

    return build


def _padding(given: Arguments, rank: int | None) -> Layers:
    """A padding of space alone."""
    flat, value = given.get("pad"), given.get("value") or 0
    if rank not in (3, 4, 5) or not isinstance(flat, (list, tuple)):
        return ()
    sides = (*flat, *[0] * (2 * (rank - 2) - len(flat)))
    if len(sides) > 2 * (rank - 2) or not all(isinstance(n, (int, float)) for n in (*sides, value)):
        return ()
    mode = given.get("mode", "constant")
    if mode == "constant":
        kinds: Any = PADS[:3] if value == 0 else PADS[3:]
        return (kinds[rank - 3](sides, *[value] * (value != 0)),)
    if mode not in _BORDERS or len(flat) != len(sides):
        return ()
    border: Any = _BORDERS[mode][rank - 3]
    return (border(sides),)


def _made_of(kind: Any) -> Callable[[Arguments, int | None], Layers]:
    """A layer that takes the arguments of the call."""

    def build(given: Arguments, rank: int | None) -> Layers:
        known = not any(isinstance(value, fx.Node) for value in pytree.tree_leaves(given))
        return (kind(**given),) if known else ()

    return build


def _resize(given: Arguments, rank: int | None) -> Layers:
    return () if given.pop("antialias", False) else _made_of(nn.Upsample)(given, rank)


_BORDERS = {"reflect": BORDERS[:3], "replicate": BORDERS[3:6], "circular": BORDERS[6:]}
_SOFTMAX = (torch.softmax, "softmax", *overloads("softmax.int"))
_LOG_SOFTMAX = (torch.log_softmax, "log_softmax", *overloads("log_softmax.int"))
_ROWS = {
    target: row
    for row in (
        _Row(MEANS, "dim keepdim dtype", _pool(ADAPTIVE_AVERAGES)),
        _Row(("amax", torch.amax, *overloads("amax")), "dim keepdim", _pool(ADAPTIVE_MAXIMA)),
        _Row(_SOFTMAX, "dim dtype", _softmax(nn.Softmax)),
        _Row(_LOG_SOFTMAX, "dim dtype", _softmax(nn.LogSoftmax)),
        _Row((F.softmax,), "dim _stacklevel dtype", _softmax(nn.Softmax)),
        _Row((F.log_softmax,), "dim _stacklevel dtype", _softmax(nn.LogSoftmax)),
        _Row(overloads("_softmax"), "dim half_to_float", _softmax(nn.Softmax)),
        _Row(overloads("_log_softmax"), "dim half_to_float", _softmax(nn.LogSoftmax)),
        _Row((F.pad,), "pad mode value", _padding),
        _Row(
            (F.pixel_shuffle, *overloads("pixel_shuffle")),
            "upscale_factor",
            _made_of(nn.PixelShuffle),
        ),
        _Row(
            (F.pixel_unshuffle, *overloads("pixel_unshuffle")),
            "downscale_factor",
            _made_of(nn.PixelUnshuffle),
        ),
        _Row(
            (F.channel_shuffle, *overloads("channel_shuffle")),
            "groups",
            _made_of(nn.ChannelShuffle),
        ),
        _Row((F.glu, *overloads("glu")), "dim", _made_of(nn.GLU)),
        _Row(
            (F.interpolate,),
            "size scale_factor mode align_corners recompute_scale_factor antialias",
            _resize,
        ),
    )
    for target in row.targets
}
