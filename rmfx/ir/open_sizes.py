"""Sizes at which a guess about calls is put to the test, and sizes that follow from the input's.

One run at one size proves little: 64 tokens of an 8 by 8 image look like 64 channels, a small view
cannot tell a group from a row. Where arguments do not prove a fact, at least two probes must agree,
of sizes that are pairwise coprime and larger than every number that the calls are given.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from rmfx.algebra.activation import is_activation
from rmfx.algebra.affine import MULTIPLYING

from .kinds import BATCH_NORMS, CHANNELWISE, ELEMENTWISE
from .many_sizes import ManySizes, Shapes
from .memo import on_demand
from .notes import GIVEN, GUARDED, shape_of, type_of
from .shapes import AsFakes, OnMeta, Weights

LARGEST = 1 << 16  # number in an argument that a probe exceeds; those beyond stand for "to the end"
NEAR = (1, -1, 2, -2, 3, -3)  # steps to other sizes, of networks that take some near one another
SMALL = range(1, 8)  # sizes at which maps of one position are spread out
Shape = tuple[int, ...]
Sizes = set[tuple[str, int]]  # of which node's value, and of which dimension
Places = set[tuple[int, int]]  # inputs of how many dimensions, and which of them
Kind = tuple[torch.dtype, torch.device]
Resize = Callable[[int, int], int]  # a size and its dimension -> another size


def coprime_sizes(above: int) -> Iterator[int]:
    """Prime numbers above a number, in order."""
    number = above
    while True:
        number += 1
        if number > 1 and all(number % d for d in range(2, math.isqrt(number) + 1)):
            yield number


def largest_number(nodes: Iterable[fx.Node]) -> int:
    """The largest number among the arguments of some nodes, by amount."""
    leaves = pytree.tree_leaves([_plain((n.args, n.kwargs)) for n in nodes])
    return max((abs(n) for n in leaves if type(n) is int), default=0)


def _plain(value: Any) -> Any:
    """Arguments without slices and the containers of torch.fx, into which pytree does not look."""
    if isinstance(value, slice):
        return [value.start, value.stop, value.step]
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return [_plain(one) for one in value.values()] if isinstance(value, Mapping) else value


class OpenSizes:
    """Which sizes of a graph's values differ where those of its inputs do.

    Layers fix the number of channels that they read and give. Of all others the graph is asked,
    without values and only when somebody wants to know: it runs at other sizes of the inputs, some
    smaller, some larger than every number in it. A size is that of every call if the graph runs at
    two of them at least and all give what was noted. Sizes at which it does not run do not count:
    the network fails there as it did before. Where it runs at no large one, the others prove
    nothing: what they do not change is taken to depend on the sizes of the inputs.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        self._graph = ManySizes(gm)
        self._nodes = {node.name: node for node in gm.graph.nodes}
        self._of_layers: dict[fx.Node, frozenset[int]] = {}
        self._inputs = list(gm.graph.find_nodes(op="placeholder"))
        # Of inputs whose sizes are checked, those that were noted are those of every call.
        self._are_given = any(GUARDED in node.meta for node in self._inputs)
        self._unproven: Places = set()  # of inputs, with which other sizes may change

    def __call__(self, name: str, dim: int) -> bool:
        """Whether a size of a node's value, of which the shape was noted, may be another one."""
        return self._may_change(name, dim) and (name, dim) in self._changes[0]

    def sizes_of_inputs(self, name: str, dim: int) -> dict[str, dict[int, int]]:
        """The sizes of inputs, by name and dimension, on which a size depends that is not open."""
        places = self._changes[1].get((name, dim)) if self._may_change(name, dim) else None
        found: dict[str, dict[int, int]] = {}
        for node in self._inputs if places else ():
            shape = shape_of(node, ())
            sizes = {d: shape[d] for rank, d in sorted(places or ()) if rank == len(shape)}
            own = {d: size for d, size in sizes.items() if self._may_change(node.name, d)}
            found |= {node.name: own} if own else {}
        return found

    def _may_change(self, name: str, dim: int) -> bool:
        node = self._nodes.get(name)
        if node is None or shape_of(node) is None or self._are_given:
            return False
        return dim not in on_demand(node, self._of_layers, self._fixed)

    # ---- what layers fix --------------------------------------------------------------------

    def _fixed(self, node: fx.Node) -> frozenset[int]:
        """The dimensions of a value whose sizes layers fix: the layer itself, or a reader."""
        shape = shape_of(node)
        if shape is None:
            return frozenset()
        found = {self._channels_of(user, len(shape)) for user in node.users}
        found |= {self._channels_of(node, len(shape))}
        inputs = [n for n in node.all_input_nodes if shape_of(n) is not None]
        if inputs and self._works_in_place(node):
            found |= {dim for dim in range(len(shape)) if self._is_kept(inputs, shape, dim)}
        elif inputs and node.target is torch.cat:  # a sum of sizes that are fixed
            found |= frozenset.intersection(*(self._of_layers[n] for n in inputs))
        return frozenset(dim for dim in found if dim is not None)

    def _is_kept(self, inputs: list[fx.Node], shape: Shape, dim: int) -> bool:
        """Whether values combined place by place fix a size: one other than 1 cannot be spread."""
        whole = [n for n in inputs if len(shape_of(n)) == len(shape)]
        fixing = [n for n in whole if dim in self._of_layers[n]]
        return len(fixing) == len(inputs) or any(shape_of(n)[dim] != 1 for n in fixing)

    def _works_in_place(self, node: fx.Node) -> bool:
        module = self._graph.module(node)
        if module is None:
            return node.op == "call_function" and node.target in ELEMENTWISE
        return is_activation(module) or type(module) in CHANNELWISE

    def _channels_of(self, node: fx.Node, rank: int) -> int | None:
        """The dimension that holds the channels which a node's layer reads and gives."""
        module: Any = self._graph.module(node)
        if type(module) is nn.Linear:
            return rank - 1
        if type(module) in MULTIPLYING:  # the others take inputs without a batch dimension, too
            return 1 if module.weight.dim() == rank else None
        return 1 if type(module) in BATCH_NORMS else None

    # ---- what other sizes tell --------------------------------------------------------------

    @functools.cached_property
    def _noted(self) -> Shapes:
        """The shapes that were noted for the example."""
        return {k: tuple(shape_of(n)) for k, n in self._nodes.items() if shape_of(n) is not None}

    @functools.cached_property
    def _changes(self) -> tuple[Sizes, dict[tuple[str, int], Places]]:
        """Sizes that are open, and the sizes of inputs on which others depend.

        Those depend on the channels of inputs, or are 1 at some sizes, where they are spread out,
        or nothing proves that they depend on nothing.
        """
        ranks: set[int] = set()
        for node in self._inputs:
            _input(node, lambda shape, _: ranks.add(len(shape)))
        places = {(rank, dim) for rank in ranks for dim in range(rank)}
        channels = {place for place in places if place[1] == 1}
        are_open = any(self._may_change(node.name, 1) for node in self._inputs)
        others, own = self._runs(places - channels), self._runs(channels if are_open else set())
        if not others and self._shapes(places, [lambda size, dim: size]) == [None]:
            return {
                (name, dim) for name, shape in self._noted.items() for dim in range(len(shape))
            }, {}
        found, depend = set(), dict[tuple[str, int], Places]()
        for tried, shapes in (*others, *own):
            for key, size in _differences(self._noted, shapes):
                if tried <= channels or size == 1:
                    depend.setdefault(key, set()).update(tried)
                else:
                    found.add(key)
        for name, shape in self._noted.items() if self._unproven else ():
            for dim in range(len(shape)):
                depend.setdefault((name, dim), set()).update(self._unproven)
        return found, depend

    def _runs(self, places: Places) -> list[tuple[Places, Shapes]]:
        """The dimensions of inputs that have other sizes, and the shapes of all values there.

        Where it takes no large ones, some of these dimensions and the others are tried apart, and
        each at its neighbours: two maps of which one shrinks more than the other agree at a few
        sizes near one another, of which some give a value the same size.
        """
        if not places:
            return []
        apart = {place for place in places if place[1] == min(dim for _, dim in places)}
        if apart == places:
            apart = {min(places)}
        found: list[tuple[Places, Shapes]] = []
        takes_large = False
        ways = self._ways(square=len(places) > 1)
        for some in (ways[:2], ways[2:]):  # the first two tell, if the graph runs at both
            if takes_large and found[1:]:
                break
            for (is_large, _), shapes in zip(
                some, self._shapes(places, [way for _, way in some]), strict=True
            ):
                if shapes is not None:
                    found.append((places, shapes))
                    takes_large = takes_large or is_large
        if takes_large:
            return found
        if apart != places:
            return found + self._runs(apart) + self._runs(places - apart)
        # Of steps as small as these, only all of them tell: a stride passes over several.
        tried = self._shapes(places, [*map(_near, NEAR), *map(_small, SMALL)])
        found += [(places, shapes) for shapes in tried if shapes is not None]
        self._unproven |= places
        return found

    def _ways(self, *, square: bool) -> list[tuple[bool, Resize]]:
        """Other sizes, and whether all are large: each side another; squares; multiples."""
        sizes = [n for node in self._inputs for n in shape_of(node, ())]
        numbers = min(largest_number(self._nodes.values()), LARGEST)
        beyond = max(8 * max(sizes, default=1), numbers, 512)
        large, sides = coprime_sizes(beyond), coprime_sizes(beyond)
        squares = [
            (True, _Table(lambda size, dim: size, lambda size: sides)),
            (False, _Table(lambda size, dim: size, lambda size: coprime_sizes(size // 2))),
        ]
        return [
            (True, _Table(lambda size, dim: (size, dim), lambda size: large)),
            (False, _Table(lambda size, dim: (size, dim), lambda size: coprime_sizes(size // 2))),
            *(squares if square else []),
            *((False, _times(factor)) for factor in (2, 3)),
            (True, _times(beyond + 1)),
        ]

    def _shapes(self, places: Places, ways: Sequence[Resize]) -> list[Shapes | None]:
        """The shapes of all values at other sizes of the inputs, None where the graph fails."""
        return self._run(places, ways, self._weights)

    @functools.cached_property
    def _weights(self) -> Weights:
        """Where weights are while the graph runs: on the meta device, which is quicker than fakes.

        But not if it does not run there, as where it makes tensors of its own: then as fakes.
        """
        on_meta = OnMeta()
        found = self._run(set(), [lambda size, dim: size], on_meta)[0]
        if found is not None and not any(_differences(self._noted, found)):
            return on_meta
        # What has no law for shapes would run for real, on as much memory as large inputs take.
        return AsFakes(FakeTensorMode(allow_non_fake_inputs=True, allow_fallback_kernels=False))

    def _run(self, places: Places, ways: Sequence[Resize], weights: Weights) -> list[Shapes | None]:
        def made(resize: Resize, shape: torch.Size, kind: Kind) -> Tensor:
            sizes = (
                resize(size, dim) if (len(shape), dim) in places else size
                for dim, size in enumerate(shape)
            )
            return torch.empty(tuple(sizes), dtype=kind[0], device=weights.device(kind[1]))

        def inputs(resize: Resize) -> list[Any]:
            return [_input(node, partial(made, resize)) for node in self._inputs]

        return self._graph.run([partial(inputs, way) for way in ways], weights)


def _input(node: fx.Node, make: Callable[[torch.Size, Kind], Any]) -> Any:
    """An input of the network with something else in the place of each tensor."""
    if shape_of(node) is not None:
        return make(torch.Size(shape_of(node)), type_of(node))
    given = node.meta.get(GIVEN, node.args[0] if node.args else None)
    return pytree.tree_map_only(Tensor, lambda x: make(x.shape, (x.dtype, x.device)), given)


def _differences(noted: Shapes, shapes: Shapes) -> Iterator[tuple[tuple[str, int], int]]:
    """The sizes, by node and dimension, that are others than those that were noted."""
    for name in shapes.keys() & noted.keys():
        for dim, (size, other) in enumerate(zip(noted[name], shapes[name], strict=False)):
            if size != other:
                yield (name, dim), other


def _times(factor: int) -> Resize:
    return lambda size, dim: factor * size


def _near(step: int) -> Resize:
    return lambda size, dim: max(1, size + step)


def _small(other: int) -> Resize:
    return lambda size, dim: other


class _Table:
    """Sizes in the place of others, equal ones for what has one key."""

    def __init__(
        self,
        key: Callable[[int, int], object],
        sizes: Callable[[int], Iterator[int]],
    ) -> None:
        self._key, self._sizes = key, sizes
        self._left: dict[int, Iterator[int]] = {}
        self._known: dict[object, int] = {}

    def __call__(self, size: int, dim: int) -> int:
        key = self._key(size, dim)
        if key not in self._known:
            self._known[key] = next(self._left.setdefault(size, self._sizes(size)))
        return self._known[key]
