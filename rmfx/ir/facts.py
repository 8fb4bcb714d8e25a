"""Number of dimensions and channels of a value, where shapes are not known.

With example inputs the front-end leaves a shape at every node. Without them the layers themselves
tell: a `Conv2d` gives 4 dimensions (inputs are taken as batched) and its output channels, and
channelwise operations hand both on. What a graph reads of sizes that layers fix are numbers, too.
The answers are kept per node, so a graph is walked once.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from rmfx.errors import Refusal

from .callees import Calls
from .fillings import COPIES, filling
from .kinds import ADDS, BATCH_NORMS, COMPARISONS, SCALES, SPREADING, SUBS, is_a, kind_of
from .layer_facts import Callee, channels_in, channels_out, dims_of, is_on_last, keeps_values
from .memo import on_demand, succeed
from .nodes import data_read
from .notes import gives_number, kind_read, shape_of, sizes_of_every_call, type_of
from .numbers import computed, size_read
from .open_sizes import OpenSizes

KEEPING = (*ADDS, *SUBS, *SCALES)  # operations that keep the type of real numbers


@dataclass(frozen=True)
class Facts:
    """What the layers tell of a value: number of dimensions and channels, None if unknown.

    `last` says that the channels are the last dimension, as behind a Linear layer. Of a number it
    is the number itself.
    """

    rank: int | None = None
    channels: int | None = None
    last: bool = False
    number: float | None = None

    @property
    def dims(self) -> int | None:
        """Dimensions behind the channels, which are the second one; None if that is not known."""
        if self.rank is None or self.channels is None or (self.last and self.rank != 2):
            return None
        return self.rank - 2

    def has_channels_in(self, dim: object) -> bool:
        """Whether a dimension, counted from either end, is known to hold the channels."""
        return self.dims is not None and dim in (1, -1 - self.dims)

    def in_shape(self, shape: tuple[int | None, ...]) -> Facts:
        """The facts of a value of which a shape was noted, too: what disagrees is not known."""
        agree = self.rank in (None, len(shape)) and self.channels is not None
        found = replace(self, rank=len(shape))
        axis = len(shape) - 1 if self.last else 1
        agree = agree and axis < len(shape) and shape[axis] in (None, self.channels)
        return found if agree else Facts(len(shape))


def facts_of(
    gm: fx.GraphModule, *, by_readers: bool = False, sizes: OpenSizes | None = None
) -> Inference:
    """What is known of the values of a graph as it is now, at all sizes of its inputs.

    Args:
        by_readers: what a layer demands of an input of the network is known of that, too.
        sizes: what sizes its values have, if that was asked before.
    """
    asked = functools.cache(lambda: OpenSizes(gm) if sizes is None else sizes)

    def is_open(node: fx.Node, dim: int) -> bool:
        return asked()(node.name, dim) or bool(asked().sizes_of_inputs(node.name, dim))

    return Inference(Calls(gm), is_open, by_readers=by_readers)


class Inference:
    """Answers about the nodes of one graph.

    Args:
        callees: what its nodes call.
        is_open: whether a size that was noted of a node's value, by its dimension, is another one
            at other sizes of the inputs.
        by_readers: whether the layers that read an input of the network tell about that.
    """

    def __init__(
        self,
        callees: Calls,
        is_open: Callable[[fx.Node, int], bool],
        *,
        by_readers: bool = True,
    ) -> None:
        self._callees = callees
        self._is_open = is_open
        self._by_readers = by_readers
        self._known: dict[fx.Node, Facts] = {}

    def __call__(self, node: fx.Node) -> Facts:
        """What the layers tell of a node's value."""
        return on_demand(node, self._known, self._deduce, self._asked)

    def succeed(self, node: fx.Node, other: fx.Node) -> None:
        """Take note that a node holds another one's value from now on."""
        succeed(self._known, node, other)

    def resize(self, node: fx.Node, channels: int) -> None:
        """Take note that a node's value has another number of channels from now on."""
        known = self._known.get(node)
        if known is not None and known.channels is not None:
            self._known[node] = replace(known, channels=channels)
            # Numbers may have been read of it.
            self._known = {n: facts for n, facts in self._known.items() if facts.number is None}

    def rank(self, node: fx.Node) -> int | None:
        """Number of dimensions of a node's value, None if unknown."""
        shape = shape_of(node)
        return len(shape) if shape is not None else self(node).rank

    def channels(self, node: fx.Node, dims: int) -> int | None:
        """Channels of a value that layers of `dims` spatial dimensions read, None if unknown.

        What changes with the size of the network's inputs is no number of channels.
        """
        shape = shape_of(node)
        if shape is not None and len(shape) > 1:
            axis = 1 if dims else len(shape) - 1
            found: int | None = shape[axis]
            return None if found is None or self._is_open(node, axis) else found
        facts = self(node)
        same_axis = facts.last == (dims == 0) or facts.rank == 2
        return facts.channels if same_axis else None

    def size(self, node: fx.Node, dim: int) -> int | None:
        """A size that was noted of a value and that it has at all sizes of the inputs, if any."""
        every, shape = sizes_of_every_call(node), shape_of(node)
        if every is not None:
            return every[dim] if dim < len(every) and isinstance(every[dim], int) else None
        if shape is None or dim >= len(shape) or self._is_open(node, dim):
            return None
        found: int | None = shape[dim]
        return found

    def with_numbers(self, value: Any) -> Any:
        """Arguments with the numbers that layers fix in the places of their nodes."""

        def number(node: fx.Node) -> Any:
            found = self(node).number
            return node if found is None else found

        return fx.map_arg(value, number)

    def without_channels(self, node: fx.Node) -> Refusal:
        """Why the channels of a value are not known."""
        if shape_of(node) is None:
            cause = "the number of channels is unknown; pass example_inputs"
        else:
            cause = (
                f"no layer fixes its channels: in the shape {shape_of(node)} their number "
                "changes with the size of the inputs; pass torch.export.export(model, "
                "example_inputs), which fixes it"
            )
        return Refusal(cause, (node.name,))

    # ---- one node -----------------------------------------------------------------------------

    def _asked(self, node: fx.Node) -> list[fx.Node]:
        """Of which values the facts of a node's own follow; some layers tell all themselves."""
        layer = self.layer(node)
        return [] if dims_of(layer) and channels_out(layer) else node.all_input_nodes

    def _deduce(self, node: fx.Node) -> Facts:
        if gives_number(node):
            return Facts(number=self._number(node))
        found, shape = self._tensor(node), shape_of(node)
        return found if shape is None else found.in_shape(shape)

    def _tensor(self, node: fx.Node) -> Facts:
        if node.op == "placeholder":
            return self._read_by(node) if self._by_readers else Facts()
        inputs = [self._known[n] for n in data_read(node)] if self._asked(node) else []
        before = inputs[0] if len(inputs) == 1 else Facts()
        if node.op == "call_module":
            return self._behind(self.layer(node), before)
        filled = filling(node)
        if filled is not None:
            return self._of_sizes(filled.sizes) if filled.like is None else self(filled.like)
        if len(inputs) > 1:
            spread = node.target in SPREADING
            return self._among_constants(node, _sum(inputs)) if spread else Facts()
        if node.target in KEEPING or node.target in COMPARISONS:
            return self._among_constants(node, before)
        if node.target is operator.getitem:
            return self._sliced(node, before)
        if node.target is F.pad:
            return self._padded(node, before)
        return before if node.target in COPIES else Facts()

    def _read_by(self, node: fx.Node) -> Facts:
        """What the layers that read an input of the network demand of it."""
        layers = [self.layer(user) for user in self._readers(node)]
        dims = next((d for d in map(dims_of, layers) if d), None)
        reader = next((layer for layer in layers if channels_in(layer)), None)
        return Facts(dims + 2 if dims else None, channels_in(reader), is_on_last(reader))

    def _readers(self, node: fx.Node) -> Iterator[fx.Node]:
        """Who reads a value, also behind sums and products with constants."""
        left = [node]
        while left:
            value = left.pop()
            for user in value.users:
                others = [n for n in user.all_input_nodes if n is not value and n.op != "get_attr"]
                if user.target in KEEPING and not others:
                    left.append(user)
                else:
                    yield user

    def _behind(self, layer: Callee, before: Facts) -> Facts:
        """Facts of what a layer gives."""
        if is_a(layer, nn.Flatten) and (layer.start_dim, layer.end_dim) == (1, -1):  # type: ignore[union-attr]
            return Facts(rank=2)
        dims, out = dims_of(layer), channels_out(layer)
        found = before if keeps_values(layer) else Facts()
        rank = dims + 2 if dims else before.rank if is_on_last(layer) else found.rank
        if out is None:
            return replace(found, rank=rank)
        # A batch norm of other channels than the last dimension has normalises the second one.
        return Facts(rank, out, is_on_last(layer) or (found.last and found.channels == out))

    def _of_sizes(self, sizes: tuple[Any, ...]) -> Facts:
        """Facts of a tensor that is made with some sizes."""
        channels = self.with_numbers(sizes[1]) if len(sizes) > 2 else None
        return Facts(len(sizes), channels if isinstance(channels, int) else None)

    def _sliced(self, node: fx.Node, before: Facts) -> Facts:
        """Facts behind slices, which keep every dimension."""
        index = self.with_numbers(node.args[1])
        if not isinstance(index, tuple) or not all(isinstance(i, slice) or i is ... for i in index):
            return Facts()
        if before.dims is None or before.channels is None or ... in index:
            return Facts(before.rank)
        chosen = index[1] if len(index) > 1 else slice(None)
        bounds = (chosen.start, chosen.stop, chosen.step)
        if not all(b is None or isinstance(b, int) for b in bounds):
            return Facts(before.rank)
        return replace(before, channels=len(range(before.channels)[chosen]))

    def _padded(self, node: fx.Node, before: Facts) -> Facts:
        amounts = self.with_numbers(node.args[1] if len(node.args) > 1 else node.kwargs.get("pad"))
        if before.dims is None or before.channels is None or not isinstance(amounts, (list, tuple)):
            return Facts(before.rank)
        more = amounts[2 * before.dims : 2 * before.dims + 2]
        if not all(isinstance(n, int) for n in more):
            return Facts(before.rank)
        return replace(before, channels=before.channels + sum(more))

    def _among_constants(self, node: fx.Node, before: Facts) -> Facts:
        """Facts of a value that is combined with constants of the model, which may be larger."""
        constants = [self._callees.attribute(n) for n in node.all_input_nodes if n.op == "get_attr"]
        sizes = [_channel_size(c, before) for c in constants]
        if None in sizes:
            return Facts()
        return before if set(sizes) <= {1, before.channels} else Facts(before.rank)

    def _number(self, node: fx.Node) -> float | None:
        """What a number is if layers fix it."""
        value, index = size_read(node)
        if value is not None:
            facts = self(value)  # which may be newer than what is known of the shape that was read
            return facts.channels if facts.has_channels_in(index) else None
        given = [self._known[a].number if isinstance(a, fx.Node) else a for a in node.args]
        return computed(node, given)

    # ---- types --------------------------------------------------------------------------------

    def dtype(self, node: fx.Node) -> tuple[torch.dtype, torch.device] | None:
        """Type and device of a node's value, None if unknown."""
        here: fx.Node | None = node
        while here is not None:
            if type_of(here) is not None:
                found: tuple[torch.dtype, torch.device] = type_of(here)
                return found
            made = self._callees.replacement(here)
            if made is not None and not isinstance(made, nn.Module):
                return made.dtype, made.device
            module = self._callees.module(here)
            weight = next(module.parameters(), None) if module is not None else None
            if weight is not None:
                own = weight.dtype, weight.device
                is_norm = isinstance(module, BATCH_NORMS)  # which may be wider than its values
                return (is_norm and self.dtype(data_read(here)[0])) or own
            here = self._source(here)
        return None

    def is_real(self, node: fx.Node) -> bool:
        """Whether a value is known to hold floating point numbers."""
        here: fx.Node | None = node
        while here is not None:
            if type_of(here) is not None:
                found: bool = kind_read(here)[0].is_floating_point
                return found
            layer = self.layer(here)
            if any(channels_in(one) for one in (layer, *map(self.layer, here.users))):
                return True
            known = isinstance(layer, nn.Module) and kind_of(layer) is not None
            if known and any(p.is_floating_point() for p in layer.parameters()):  # type: ignore[union-attr]
                return True
            here = self._source(here, KEEPING)
        return False

    def _source(self, node: fx.Node, keeping: tuple[object, ...] = ()) -> fx.Node | None:
        """The first tensor that a layer reads which keeps its type, or one of some operations."""
        inputs = [n for n in node.all_input_nodes if n.op != "get_attr"]
        keeps = keeps_values(self.layer(node)) and len(inputs) == 1
        return next(iter(inputs), None) if keeps or node.target in keeping else None

    def layer(self, node: fx.Node) -> Callee:
        """What a node calls: a module, or a layer that a rule has put there; None if nothing."""
        made = self._callees.callee(node)
        return made if made is None or isinstance(made, nn.Module) else made.layer


def _channel_size(constant: object, x: Facts) -> int | None:
    """Channels of a constant that broadcasts against x; None if it may add dimensions."""
    if not isinstance(constant, Tensor) or x.rank is None or constant.dim() > x.rank:
        return None
    axis = 1 if x.last else x.rank - 1  # counted from the end
    return int(constant.shape[-axis]) if constant.dim() >= axis else 1


def _sum(inputs: list[Facts]) -> Facts:
    """Facts of a sum, which may broadcast: certain only where the operands agree."""
    ranks = {f.rank for f in inputs}
    channels = {(f.channels, f.last) for f in inputs}
    rank = ranks.pop() if len(ranks) == 1 else None
    found, last = channels.pop() if len(channels) == 1 else (None, False)
    # Dimensions are aligned at the last one.
    return Facts(rank, found, last) if rank is not None or last else Facts()
