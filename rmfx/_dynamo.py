"""Graphs of TorchDynamo: which inputs are the model's own tensors, and whether they still are.

Dynamo lifts parameters and buffers to placeholders, mixed with the user's inputs and told apart by
where they come from: a user may pass an `nn.Parameter` too. It hands the current tensors over at
every call, so weights that were baked into other weights can be compared with them. It does not
compile again when a parameter is replaced or written to; whoever bakes must look.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor, fx, nn

from ._dialect import replace_by_number
from ._functionalise import written_inputs
from ._graph import attach, copy_graph

OF_MODULES = ("__dict__", "_modules", "_parameters", "_buffers")  # in names of their tensors


@dataclass(frozen=True)
class Lifted:
    """A tensor of the model that Dynamo made an input of the graph.

    Attributes:
        position: among the placeholders.
        name: its path in the model, as in `state_dict`.
        value: the tensor at compile time.
        is_number: whether Dynamo wraps a number of a module into a new tensor for every call.
    """

    position: int
    name: str
    value: Tensor
    is_number: bool = False


def find_lifted(gm: fx.GraphModule) -> tuple[Lifted, ...]:
    """The placeholders of Dynamo's graph that hold tensors of the model.

    Tensors without a version counter (made in inference mode) stay inputs, since a change of theirs
    could not be seen; so do those that the graph itself writes to.
    """
    nodes = [node for node in gm.graph.nodes if node.op == "placeholder"]
    if not any("grapharg" in node.meta for node in nodes):
        return ()
    found = []
    taken: set[str] = set()
    written = written_inputs(gm)
    for position, node in enumerate(nodes):
        argument = node.meta.get("grapharg")
        source = getattr(argument, "source", None)
        if source is None or node in written or not _is_of_module(source):
            continue
        value = argument.example
        is_number = bool(argument.pass_arg_as_tensor)
        value = torch.as_tensor(value) if is_number else value
        if type(value) in (Tensor, nn.Parameter) and not value.is_inference():
            name = _unique(_path(source), taken)
            found.append(Lifted(position, name, value, is_number))
    return tuple(found)


def _is_of_module(source: Any) -> bool:
    guard = source.guard_source
    guard = guard() if callable(guard) else guard
    return bool(guard.is_specialized_nn_module() or guard.is_unspecialized_nn_module())


def _path(source: Any) -> str:
    """`L['self']._modules['layer1']._parameters['weight']` is layer1.weight."""
    name = source.name
    text = name() if callable(name) else name
    inside = re.sub(r"^[LG]\['[^']*'\]", "", text)
    parts = re.findall(r"\['([^']+)'\]|\.(\w+)|\[(\d+)\]", inside)
    words = [a or b or c for a, b, c in parts]
    kept = [w for w in words if w not in OF_MODULES]
    return ".".join(re.sub(r"\W", "_", w) for w in kept) or "weight"


def _unique(name: str, taken: set[str]) -> str:
    candidates = (f"{name}_{i}" if i else name for i in count())
    free = next(c for c in candidates if c not in taken)
    taken.add(free)
    return free


def with_weights(
    gm: fx.GraphModule, lifted: Sequence[Lifted], *, keep_inputs: bool
) -> fx.GraphModule:
    """A copy of Dynamo's graph that owns the lifted tensors.

    Args:
        gm: Dynamo's graph; not changed.
        lifted: the placeholders to replace, with the tensors to hold.
        keep_inputs: whether the placeholders stay, unread, so that the graph is called as before.
    """
    graph = copy_graph(gm)
    root = nn.Module()
    for name, tensor in _tensors_of(gm):
        attach(root, name, tensor)
    for name, module in gm.named_children():
        root.add_module(name, module)
    nodes = graph.find_nodes(op="placeholder")
    for one in lifted:
        node = nodes[one.position]
        if one.is_number:
            _fold(node, one.value.item())
        attach(root, one.name, one.value)
        with graph.inserting_after(nodes[-1]):
            weight = graph.get_attr(one.name)
        node.meta = {k: v for k, v in node.meta.items() if k != "grapharg"}
        weight.meta = dict(node.meta)
        node.replace_all_uses_with(weight)
        if not keep_inputs:
            graph.erase_node(node)
    return fx.GraphModule(root, graph, type(gm).__name__)


def _fold(node: fx.Node, number: float | bool) -> None:
    """Put a number in the place of `node.item()`."""
    for reader in [user for user in node.users if user.target == "item"]:
        replace_by_number(reader, number)


def _tensors_of(gm: fx.GraphModule) -> Iterable[tuple[str, Tensor]]:
    yield from gm.named_parameters(recurse=False)
    yield from gm.named_buffers(recurse=False)


# ---- freshness ----------------------------------------------------------------------------------


class Snapshot:
    """What a tensor was like when it was baked: the object, its version and its memory.

    Args:
        tensor: not made in inference mode, where tensors have no version.
        is_number: whether it is made anew for every call, so that its value tells.
    """

    def __init__(self, tensor: Tensor, *, is_number: bool = False) -> None:
        self._tensor = weakref.ref(tensor)
        self._state = _state(tensor)
        self._number = tensor.item() if is_number else None

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor is the one that was baked, with the values it had."""
        same = self._number is not None or self._tensor() is tensor
        return same and self.is_unwritten(tensor)

    def is_unwritten(self, tensor: Tensor) -> bool:
        """The same for another name of the tensor, which shares its memory and its version."""
        if self._number is not None:
            return bool(tensor.item() == self._number)
        return _state(tensor) == self._state


def snapshot(lifted: Lifted) -> Snapshot:
    """What a lifted tensor is like now."""
    return Snapshot(lifted.value, is_number=lifted.is_number)


def _state(tensor: Tensor) -> tuple[int, int, torch.dtype]:
    return (tensor._version, tensor.data_ptr(), tensor.dtype)


_BAKED: dict[int, tuple[Snapshot, ...]] = {}
_KEYS = count()
_MESSAGE = (
    "rmfx: the model's weights have changed since its residual connections were removed; compile "
    "the model again (torch._dynamo.reset()), or compile it with backend='rmfx', which notices"
)


@torch.library.custom_op("rmfx::weights_are_fresh", mutates_args=())
def weights_are_fresh(weights: Sequence[Tensor], key: int) -> Tensor:
    """Whether the weights are those that were baked under a key; a boolean without dimensions."""
    known = _BAKED.get(key, ())
    fresh = len(known) == len(weights) and all(
        snapshot.is_unwritten(w) for snapshot, w in zip(known, weights, strict=True)
    )
    return torch.tensor(fresh)


@weights_are_fresh.register_fake
def _(weights: Sequence[Tensor], key: int) -> Tensor:
    return torch.empty((), dtype=torch.bool)


def check_in_graph(graph: fx.Graph, lifted: Sequence[Lifted]) -> None:
    """Let a graph whose weights are baked raise if those it is given are others.

    The check is two operators, so it outlives whatever compiles the graph further.
    """
    key = next(_KEYS)
    _BAKED[key] = tuple(map(snapshot, lifted))
    nodes = [node for node in graph.nodes if node.op == "placeholder"]
    given = [nodes[one.position] for one in lifted]
    with graph.inserting_after(nodes[-1]):
        fresh = graph.call_function(torch.ops.rmfx.weights_are_fresh.default, (given, key))
    with graph.inserting_after(fresh):
        graph.call_function(torch.ops.aten._assert_async.msg, (fresh, _MESSAGE))
