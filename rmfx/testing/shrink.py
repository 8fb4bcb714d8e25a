"""Makes a failing `NetworkSpec` smaller, step by step, for as long as it fails.

The steps work on the tree of the spec: nodes go, a join gives way to one of its operands, fields go
back to their defaults, channels, sizes and batches become small. A step may give a network that
does not run; such a one is passed over. Hypothesis, which shrinks the choices behind a network and
not the network, leaves ten times as much in a hundred times the time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields, replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from rmfx.testing.networks.further import Blur, Deconv
from rmfx.testing.networks.joins import Join
from rmfx.testing.networks.layers import Act, Conv, Linear, Norm
from rmfx.testing.networks.memory import Gain, SharedNorm
from rmfx.testing.networks.node import Node, Nodes
from rmfx.testing.networks.places import Focal
from rmfx.testing.networks.spec import NetworkSpec

_CHANNELS: dict[type[Node], tuple[str, ...]] = {  # the fields that count channels
    Conv: ("inputs", "outputs"),
    Deconv: ("inputs", "outputs"),
    Linear: ("inputs", "outputs"),
    Norm: ("channels",),
    Blur: ("channels",),
    Gain: ("channels",),
    SharedNorm: ("channels",),
    Focal: ("channels",),
}


def shrink(
    spec: NetworkSpec, fails: Callable[[NetworkSpec], bool], *, seconds: float = 120.0
) -> NetworkSpec:
    """Give the smallest network found that `fails` still holds for.

    Args:
        spec: a network that fails.
        fails: says whether a smaller one does; it is asked only about networks that run.
        seconds: after so many the smallest one found by then is given.

    >>> from rmfx.testing import Act, Conv, NetworkSpec
    >>> spec = NetworkSpec(((2, 3, 9, 9),), (Conv(3, 4, (3, 3)), Act("silu"), Conv(4, 4, (1, 1))))
    >>> shrink(spec, lambda spec: any(isinstance(node, Act) for node in spec.body))
    NetworkSpec(((1, 1, 1, 1),), (Act('relu'),))
    """
    end = time.monotonic() + seconds
    tried = {spec}
    smaller: NetworkSpec | None = spec
    while smaller is not None:
        spec = smaller
        smaller = _first_smaller(spec, fails, tried, end)
    return spec


def _first_smaller(
    spec: NetworkSpec,
    fails: Callable[[NetworkSpec], bool],
    tried: set[NetworkSpec],
    end: float,
) -> NetworkSpec | None:
    for candidate in _reductions(spec):
        if time.monotonic() > end:
            return None
        if candidate in tried:
            continue
        tried.add(candidate)
        if runs(candidate) and fails(candidate):
            return candidate
    return None


def runs(spec: NetworkSpec) -> bool:
    """Whether the network gives finite values and leaves its inputs alone."""
    try:
        with torch.no_grad():
            inputs = spec.inputs()
            output = spec.build()(*inputs)
    except (RuntimeError, ValueError, LookupError, TypeError, AssertionError, ZeroDivisionError):
        return False
    untouched = all(torch.equal(a, b) for a, b in zip(inputs, spec.inputs(), strict=True))
    return untouched and all(bool(x.isfinite().all()) for x in pytree.tree_leaves(output))


# ---- steps --------------------------------------------------------------------------------------
def _reductions(spec: NetworkSpec) -> Iterator[NetworkSpec]:
    """Every network that is one step smaller, those that take most away first."""
    for body in _fewer(spec.body):
        yield replace(spec, body=body)
    yield from _narrower(spec)
    yield from _plainer_ends(spec)
    for body in _simpler_chain(spec.body):
        yield replace(spec, body=body)


def _plainer_ends(spec: NetworkSpec) -> Iterator[NetworkSpec]:
    """Fewer outputs and inputs, a batch of 1, smaller sizes."""
    yield replace(spec, output="tensor", returned=())
    yield replace(spec, dtype="float64")
    if len(spec.shapes) > 1:  # the last input may be unused by now
        yield replace(spec, shapes=spec.shapes[:-1])
    yield replace(spec, shapes=tuple((1, *shape[1:]) for shape in spec.shapes))
    for axis in range(1, len(spec.shapes[0])):
        for size in range(1, spec.shapes[0][axis]):
            yield replace(
                spec,
                shapes=tuple(
                    (*shape[:axis], size, *shape[axis + 1 :]) if axis < len(shape) else shape
                    for shape in spec.shapes
                ),
            )


def _narrower(spec: NetworkSpec) -> Iterator[NetworkSpec]:
    """All channels of one number, or one number of channels less."""
    numbers = _numbers(spec.body) | {shape[1] for shape in spec.shapes}
    for chosen in range(1, min(5, max(numbers))):
        yield _renumbered(spec, lambda number, chosen=chosen: chosen)  # type: ignore[misc]
    for old in sorted(numbers, reverse=True):
        for new in range(1, old):
            yield _renumbered(
                spec,
                lambda number, old=old, new=new: new if number == old else number,  # type: ignore[misc]
            )


def _numbers(nodes: Nodes) -> set[int]:
    """The numbers of channels in a chain."""
    found: set[int] = set()
    for node in nodes:
        found |= {getattr(node, name) for name in _CHANNELS.get(type(node), ())}
        for chain in node.chains:
            found |= _numbers(chain)
    return found


def _renumbered(spec: NetworkSpec, change: Callable[[int], int]) -> NetworkSpec:
    """Other numbers of channels everywhere; for tokens those are the last axis."""
    axis = -1 if len(spec.shapes[0]) == 3 and not _has_maps(spec.body) else 1
    shapes = []
    for shape in spec.shapes:
        sizes = list(shape)
        sizes[axis] = change(sizes[axis])
        shapes.append(tuple(sizes))
    body = tuple(_renumbered_node(node, change) for node in spec.body)
    return replace(spec, shapes=tuple(shapes), body=body)


def _has_maps(nodes: Nodes) -> bool:
    return any(
        isinstance(node, (Conv, Deconv, Blur)) or any(map(_has_maps, node.chains)) for node in nodes
    )


def _renumbered_node(node: Node, change: Callable[[int], int]) -> Node:
    inside = tuple(
        tuple(_renumbered_node(inner, change) for inner in chain) for chain in node.chains
    )
    node = node.with_chains(inside)
    names = _CHANNELS.get(type(node), ())
    changed: dict[str, Any] = {name: change(getattr(node, name)) for name in names}
    if isinstance(node, (Conv, Deconv)) and node.groups > 1:
        depthwise = node.groups == node.inputs
        changed["groups"] = changed["inputs"] if depthwise else node.groups
    if isinstance(node, Act) and node.kind == "prelu" and node.args:
        changed["args"] = (change(int(node.args[0])), *node.args[1:])
    shape = getattr(node, "shape", ())
    if shape:
        changed["shape"] = (change(shape[0]), *shape[1:])
    return replace(node, **changed) if changed else node


def _fewer(nodes: Nodes) -> Iterator[Nodes]:
    """Chains without some nodes in a row, half of them first."""
    length = len(nodes)
    while length:
        for start in range(0, len(nodes) - length + 1, max(1, length // 2)):
            yield nodes[:start] + nodes[start + length :]
        length //= 2
    for i, node in enumerate(nodes):
        for less in _less(node):
            yield nodes[:i] + less + nodes[i + 1 :]


def _less(node: Node) -> Iterator[Nodes]:
    """What may stand in place of a node: one of its chains, or itself with less inside."""
    inside = node.chains
    yield from inside
    if isinstance(node, Join) and len(inside) > 2:
        for i in range(len(inside)):
            rest, forms = inside[:i] + inside[i + 1 :], node.forms[:i] + node.forms[i + 1 :]
            yield (replace(node, operands=rest, forms=forms[: len(rest) - 1]),)
    for i, chain in enumerate(inside):
        for fewer in _fewer(chain):
            yield (node.with_chains((*inside[:i], fewer, *inside[i + 1 :])),)


def _simpler_chain(nodes: Nodes) -> Iterator[Nodes]:
    for i, node in enumerate(nodes):
        for simpler in _simpler(node):
            yield (*nodes[:i], simpler, *nodes[i + 1 :])


def _simpler(node: Node) -> Iterator[Node]:
    """The node with one field at its default, or simpler in a way of its own."""
    for item in fields(node):
        if item.default is not MISSING and getattr(node, item.name) != item.default:
            yield replace(node, **{item.name: item.default})
    if isinstance(node, Join) and set(node.forms) != {"a + b"}:
        yield replace(node, forms=("a + b",) * len(node.forms))
    if isinstance(node, Conv):
        yield from _simpler_conv(node)
    if isinstance(node, Act) and node.kind != "relu":
        yield Act("relu")
    inside = node.chains
    for i, chain in enumerate(inside):
        for simpler in _simpler_chain(chain):
            yield node.with_chains((*inside[:i], simpler, *inside[i + 1 :]))


def _simpler_conv(node: Conv) -> Iterator[Conv]:
    point = (1,) * len(node.kernel)
    yield replace(node, kernel=point, padding=0)
    yield replace(node, kernel=point, padding=0, stride=1, dilation=1)
