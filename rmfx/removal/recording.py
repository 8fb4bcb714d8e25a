"""Operators written down as they run, with a watch on the numbers that leave the tensors.

A recorder follows every operator from some tensors, the weights, to whatever is computed of them.
What Python decides with a number taken out of a tensor is not written down, so it must not depend
on the weights. Of everything that depends on them the recorder therefore knows a `Kind`, and raises
where a value leaves whose kind is none of those that may. What is unknown counts as particular.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from rmfx.errors import RmfxError, WeightValueError
from rmfx.frontend.watches import written_by

aten = torch.ops.aten


class Kind(IntEnum):
    """How a value depends on the weights."""

    FIXED = 0  # not at all
    SURE = 1  # it comes out alike for almost all weights, as "not all of them are zero" does
    GENERAL = 2  # smoothly: almost no weights give any number that one might look for
    PARTICULAR = 3  # in another way, as a sign does


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Operators by name, without the underscore of those that write.
MAKING = _names(
    "new_empty new_empty_strided new_zeros new_ones new_full "
    "empty_like zeros_like ones_like full_like"
)
MOVING = _names(
    "cat stack clone copy _to_copy lift_fresh index index_select gather masked_select flip roll "
    "repeat repeat_interleave constant_pad_nd tril triu where fill masked_fill index_put "
    "_unsafe_view unfold diag_embed select_scatter slice_scatter diagonal_scatter"
)
SMOOTH = _names(
    "add sub rsub mul div neg reciprocal square sqrt rsqrt exp sum mean cumsum addcmul mm bmm mv "
    "dot addmm baddbmm convolution"
)
TESTS = _names(
    "eq ne any all equal nonzero count_nonzero isnan isinf isposinf isneginf "
    "logical_and logical_or logical_not bitwise_and bitwise_or bitwise_not"
)
CHOOSING = frozenset(("index", "masked_select"))  # their masks alone tell the size


# Operators whose result is their input, as far as values and gradients go.
TRANSPARENT = (aten.detach.default, aten.alias.default, aten.lift_fresh.default)


# What gives numbers without an operator.
LEAVING = (Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__dlpack__)


class Recorder(TorchDispatchMode):
    """Writes down the operators that run as a graph over some named tensors.

    Args:
        sources: the weights; those of whole numbers and booleans are particular.
        may_leave: the last kind of value that Python may see.

    Raises:
        WeightValueError: another one leaves, while the recorder is active.
    """

    def __init__(self, sources: Mapping[str, Tensor], *, may_leave: Kind) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.graph = fx.Graph()
        self.constants: dict[str, Tensor] = {}
        self.doubles: set[fx.Node] = set()  # of sources and constants, those in float64
        self._may_leave = may_leave
        self._watch = _Watch(self)
        self._nodes: dict[int, fx.Node] = {}
        self._memory: dict[tuple[object, ...], fx.Node] = {}
        self._kinds: dict[int, Kind] = {}  # by memory, the last that was written
        self._storage: dict[fx.Node, set[int]] = {}  # of what a node reads and gives
        self._given: dict[fx.Node, set[int]] = {}  # of what it gives or writes
        self._written: set[int] = set()
        self._alive: list[Tensor] = []
        self.sources: dict[str, fx.Node] = {}
        for name, tensor in sources.items():
            if id(tensor) not in self._nodes:  # tied weights are one
                self._note(tensor, self.graph.get_attr(name))
                kind = Kind.GENERAL if tensor.is_floating_point() else Kind.PARTICULAR
                self._kinds[_storage(tensor)] = max(self.kind(tensor), kind)
            self.sources[name] = self._nodes[id(tensor)]

    def __enter__(self) -> Recorder:
        super().__enter__()  # type: ignore[no-untyped-call]
        self._watch.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        self._watch.__exit__(*error)  # type: ignore[no-untyped-call]
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = _tensors_in((args, kwargs))
        kind = _kind_behind(func, args, max(map(self.kind, tensors), default=Kind.FIXED))
        if _decides(func):
            self.let_out(func, *_deciding(func, tensors))
        result = func(*args, **kwargs)
        if func in TRANSPARENT:
            self._note(result, self.node(tensors[0]))
            return result
        results = _tensors_in(result)
        changed = results or written_by(func, args, kwargs)
        if changed:
            call = self._call(func, args, kwargs, changed)
            for tensor in changed:
                self._kinds[_storage(tensor)] = max(self.kind(tensor), kind)
            if isinstance(result, Tensor):
                self._note(result, call)
            else:
                for i, tensor in enumerate(results):
                    self._note(tensor, self.graph.call_function(_item, (call, i)))
        return result

    def _call(self, func: Any, args: Any, kwargs: Any, results: list[Tensor]) -> fx.Node:
        tensors, first = _tensors_in((args, kwargs)), results[0]
        arguments, options = pytree.tree_map_only(Tensor, self.node, (args, kwargs))
        makes = not tensors and first.is_floating_point()
        if makes and any(argument.name == "dtype" for argument in func._schema.arguments):
            options = {**options, "dtype": first.dtype}  # not the default of another day
        call = self.graph.call_function(func, arguments, options)
        self._given[call] = {_storage(t) for t in results}
        self._storage[call] = self._given[call] | {_storage(t) for t in tensors}
        if _writes(call):
            self._written |= self._given[call]
        return call

    def kind(self, tensor: Tensor) -> Kind:
        """How a tensor's values depend on the sources; that of its whole memory."""
        return self._kinds.get(_storage(tensor), Kind.FIXED)

    def varies(self, node: fx.Node) -> bool:
        """Whether what a node gives, or the memory behind it, depends on the sources."""
        return any(self._kinds.get(memory, Kind.FIXED) for memory in self._given[node])

    def let_out(self, func: Any, *tensors: Tensor) -> None:
        """Raise WeightValueError unless Python may decide with what a function tells of tensors."""
        kind = max(map(self.kind, tensors), default=Kind.FIXED)
        if _is_test(func) and kind == Kind.GENERAL:
            kind = Kind.SURE
        if kind > self._may_leave:
            raise WeightValueError(
                "a decision would rest on a number that the model's tensors hold today, and with "
                "differentiable=True they may change; convert without it"
            )

    def copied(self, tensor: Tensor) -> Tensor:
        """A copy whose origin is known; torch's own copies memory, which no operator shows."""
        return tensor.detach().clone().requires_grad_(tensor.requires_grad)

    def _note(self, tensor: Tensor, node: fx.Node) -> None:
        self._nodes[id(tensor)] = node
        if node.op == "get_attr" and tensor.dtype is torch.float64:
            self.doubles.add(node)
        self._memory[place(tensor)] = node
        for memory in (self._storage, self._given):
            memory.setdefault(node, set()).add(_storage(tensor))
        self._alive.append(tensor)  # an id is a tensor's own for as long as it lives

    def node(self, tensor: Tensor) -> fx.Node:
        """The node that holds a tensor; one made elsewhere is a constant.

        Raises:
            RmfxError: it holds values of a weight, but nobody saw how they came there.
        """
        found = self._nodes.get(id(tensor))
        if found is None and not tensor.is_meta:  # another name of the same values, unrecorded
            found = self._memory.get(place(tensor))
        if found is None and self.kind(tensor):
            raise RmfxError(
                f"it is not known how a tensor of shape {tuple(tensor.shape)} follows from the "
                "weights; convert without differentiable=True"
            )
        if found is None:
            name = f"_linked_constant_{len(self.constants)}"
            self.constants[name] = tensor.detach().clone()
            found = self.graph.get_attr(name)
            self._note(tensor, found)
        return found

    def origin(self, node: fx.Node) -> fx.Node:
        """The node that another one is a mere copy of, to which nobody has written since."""
        while node.target is aten.clone.default and not self._given[node] & self._written:
            node = node.all_input_nodes[0]
        return node

    def needed(self, outputs: set[fx.Node]) -> list[fx.Node]:
        """The nodes on which some nodes depend, in order, with the writes to their memory."""
        needed = set(outputs)
        memory = {place for node in outputs for place in self._storage[node]}
        for node in reversed(self.graph.nodes):
            writes = node.op == "call_function" and _writes(node) and self._given[node] & memory
            if node in needed or writes:
                needed.add(node)
                needed.update(node.all_input_nodes)
                memory |= self._storage[node]
        return [node for node in self.graph.nodes if node in needed]


@contextmanager
def unrecorded() -> Iterator[None]:
    """Within it no recorder follows what runs: for numbers that depend on no weight.

    What is computed within it must not be used behind it.
    """
    with _disable_current_modes():
        yield


class _Watch(TorchFunctionMode):
    """Sees the functions that reach for values or copy memory without an operator."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in LEAVING:
            self._recorder.let_out(func, args[0])
        if func is Tensor.__deepcopy__:
            tensor, memo = args
            if id(tensor) not in memo:
                memo[id(tensor)] = self._recorder.copied(tensor)
            return memo[id(tensor)]
        return func(*args, **(kwargs or {}))


# ---- kinds --------------------------------------------------------------------------------------
def _name(func: Any) -> str:
    """The operator's name; one on a list of tensors does the same to each."""
    packet = getattr(func, "overloadpacket", func)
    return str(packet.__name__).removeprefix("_foreach_").rstrip("_")


def _is_test(func: Any) -> bool:
    return _name(func) in TESTS


def _kind_behind(func: Any, args: tuple[Any, ...], kind: Kind) -> Kind:
    """How an operator's result depends on the weights, if its inputs do in a given way."""
    name = _name(func)
    if name in MAKING:
        return Kind.FIXED
    if kind <= Kind.SURE or name in MOVING or getattr(func, "is_view", False):
        return kind
    if name in TESTS and (kind == Kind.GENERAL or _is_endless(args[1:])):
        return Kind.SURE
    return kind if kind == Kind.GENERAL and name in SMOOTH else Kind.PARTICULAR


def _is_endless(others: tuple[Any, ...]) -> bool:
    """Whether something is compared with infinity, which no weight is."""
    return len(others) == 1 and isinstance(others[0], float) and math.isinf(others[0])


def _decides(func: Any) -> bool:
    """Whether an operator gives Python numbers, or a shape, that depend on values."""
    tags = getattr(func, "tags", ())
    return torch.Tag.data_dependent_output in tags or torch.Tag.dynamic_output_shape in tags


def _deciding(func: Any, tensors: list[Tensor]) -> list[Tensor]:
    if _name(func) in CHOOSING:
        return [t for t in tensors if t.dtype in (torch.bool, torch.uint8)]
    return tensors


# ---- tensors ------------------------------------------------------------------------------------
def _tensors_in(values: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(values) if isinstance(t, Tensor)]


def _item(values: Any, index: int) -> Any:
    return values[index]


def _writes(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return bool(schema and schema.is_mutable)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def place(tensor: Tensor) -> tuple[object, ...]:
    """Equal for two names of the same values."""
    layout = (tuple(tensor.shape), tensor.stride(), tensor.storage_offset(), tensor.dtype)
    return (_storage(tensor), *layout)
