"""What enlarges both operands of a join alike stands behind it.

    p(a) + p(b) = p(a + b)                       p shuffles pixels, or copies the nearest one
    u(x) = p(repeat_interleave(x, r·r, 1))       u copies r by r times, p shuffles by r

What stands between them and the join may be moved before them: copying the nearest pixel commutes
with activations, batch norm, constants per channel and 1x1 convolutions, shuffling pixels with what
does the same to all channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, fx, nn

from rmfx.algebra.activation import is_activation, is_per_channel
from rmfx.algebra.affine import CONVS
from rmfx.frontend.calls import arguments_of
from rmfx.ir.functions import torch_name
from rmfx.ir.interpolations import interpolation, whole_factors
from rmfx.ir.kinds import ADDITIVE, BATCH_NORMS, NO_OPS, SCALES, is_a
from rmfx.ir.nodes import attribute, data_read, has_hooks, must_stay, two_operands
from rmfx.ir.notes import SHAPE, forget, set_shape, shape_of, why_frozen, without_notes

from .earlier_joins import join_earlier

PER_CHANNEL = (*ADDITIVE, *SCALES)


@dataclass(frozen=True)
class _Kind:
    """How a node enlarges: by which factor in each dimension, one for all if they are equal."""

    shuffles: bool
    factors: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class _Branch:
    """A node that enlarges, and nodes next to it that act at each position alone, in order."""

    node: fx.Node
    kind: _Kind
    chain: tuple[fx.Node, ...]


def enlarge_once(gm: fx.GraphModule) -> None:
    """Let what enlarges both operands of a join stand once, behind it."""
    if sum(_kind(gm, node) is not None for node in gm.graph.nodes) < 2:
        return
    for join in [node for node in gm.graph.nodes if node.target in ADDITIVE]:
        _enlarge_behind(gm, join)
    gm.graph.eliminate_dead_code(is_impure_node=must_stay)


def _kind(gm: fx.GraphModule, node: fx.Node) -> _Kind | None:
    """How a node enlarges, None if it does not or if it stays."""
    if why_frozen(node) is not None:
        return None
    module: Any = gm.get_submodule(str(node.target)) if node.op == "call_module" else None
    if module is not None and has_hooks(module):
        return None
    if is_a(module, nn.PixelShuffle):
        return _Kind(True, (module.upscale_factor,))
    if torch_name(node).partition(".")[0] == "pixel_shuffle":
        factor = arguments_of(node, "input", "upscale_factor").get("upscale_factor")
        return _Kind(True, (factor,)) if isinstance(factor, int) else None
    factors = whole_factors(interpolation(node, module))
    return None if factors is None else _Kind(False, factors)


def _enlarge_behind(gm: fx.GraphModule, join: fx.Node) -> bool:
    """Let a join of two values that end in the same enlarging stand before that."""
    operands = two_operands(join)
    if why_frozen(join) is not None or not all(isinstance(x, fx.Node) for x in operands):
        return False
    ends = [_end(gm, x) for x in operands if isinstance(x, fx.Node)]
    found = [end for end in ends if end is not None]
    if len(found) < 2 or found[0].node is found[1].node or not _agree(found):
        return False
    last = next((end for end in found if end.kind.shuffles), found[0])
    smaller = [_before_enlarging(join, end, like=last.kind) for end in found]
    places = dict(zip(operands, smaller, strict=True))
    join_earlier(join, places, last.node, shape_of(smaller[found.index(last)]), "smaller")
    return True


def _before_enlarging(join: fx.Node, end: _Branch, *, like: _Kind) -> fx.Node:
    """What a branch is without its enlarging, as what enlarges like another one is to read it."""
    value = data_read(end.node)[0]
    if end.chain:
        end.chain[0].replace_input_with(end.node, value)
        _resize(end.chain, value, channels=end.kind.shuffles)
        value = end.chain[-1]
    return value if end.kind == like else _repeated(join, value, end.kind.factors[0] ** 2)


def _end(gm: fx.GraphModule, node: fx.Node) -> _Branch | None:
    """A value as what enlarges, and what acts behind that; nobody else reads any of it."""
    chain: list[fx.Node] = []
    while len(node.users) == 1:
        kind = _kind(gm, node)
        if kind is not None:
            uniform = kind.shuffles
            fits = all(_acts_by_position(gm, n, uniform=uniform) for n in chain)
            return _Branch(node, kind, tuple(chain)) if fits else None
        if not _acts_by_position(gm, node, uniform=False):
            return None
        chain.insert(0, node)
        node = data_read(node)[0]
    return None


def _agree(ends: list[_Branch]) -> bool:
    """Whether both enlarge alike, as copying and shuffling do with channels that are repeated."""
    first, second = (end.kind for end in ends)
    if first == second:
        return True
    factors = {first.factors, second.factors}
    return len(factors) == 1 and _copies_whole_blocks(first.factors)


def _copies_whole_blocks(factors: tuple[int, ...]) -> bool:
    """Whether the nearest pixel is that of a block, in the single precision that finds it.

    A place times a rounded 1/r falls short of the next whole number if that was rounded down.
    """
    step = torch.tensor(1 / factors[0], dtype=torch.float32).item()
    return len(factors) == 1 and Fraction(step) * factors[0] >= 1


def _repeated(before: fx.Node, value: fx.Node, count: int) -> fx.Node:
    """A value whose channels stand several times each, one beside the other."""
    with before.graph.inserting_before(before):
        found = before.graph.call_function(torch.repeat_interleave, (value, count), {"dim": 1})
    found.meta = without_notes(before, SHAPE)
    shape = shape_of(value)
    if shape is not None:
        channels = None if shape[1] is None else count * shape[1]
        set_shape(found, (shape[0], channels, *shape[2:]))
    return found


# ---- what acts at each position alone ---------------------------------------------------------
def _acts_by_position(gm: fx.GraphModule, node: fx.Node, *, uniform: bool) -> bool:
    """Whether a node gives a number at each position of those at that position.

    Args:
        uniform: whether it must do the same to all channels, too.
    """
    if why_frozen(node) is not None or len(data_read(node)) != 1:
        return False
    if node.op == "call_module":
        module: Any = gm.get_submodule(str(node.target))
        if has_hooks(module):
            return False
        if is_activation(module) or is_a(module, NO_OPS):
            return not (uniform and is_per_channel(module))
        return not uniform and (type(module) in BATCH_NORMS or _is_pointwise(module))
    constants = [attribute(gm, n) for n in node.all_input_nodes if n.op == "get_attr"]
    rank = len(shape_of(node, ()))
    return node.target in PER_CHANNEL and all(
        isinstance(c, Tensor) and (c.numel() == 1 or (not uniform and _is_per_channel(c, rank)))
        for c in constants
    )


def _is_pointwise(module: Any) -> bool:
    """Whether a module is a convolution that looks at one position."""
    if type(module) not in CONVS[1:] or max(*module.kernel_size, *module.stride) > 1:
        return False
    return module.padding in ("valid", "same") or not any(module.padding)


def _is_per_channel(constant: Tensor, rank: int) -> bool:
    """Whether a constant has one position in space."""
    return rank > 2 and all(n == 1 for n in constant.shape[2 - rank :])


def _resize(nodes: tuple[fx.Node, ...], like: fx.Node, *, channels: bool = False) -> None:
    """Take note that nodes give values of other sizes, and of other channels if that is said."""
    kept = 1 if channels else 2
    for node in nodes:
        own, other = shape_of(node), shape_of(like)
        known = own is not None and other is not None
        set_shape(node, (*own[:kept], *other[kept:]) if known else None)
        forget(node)
