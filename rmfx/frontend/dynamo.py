"""Graphs of TorchDynamo: which inputs are the model's own tensors, and whether they still are.

Dynamo lifts parameters and buffers to placeholders, mixed with the user's inputs and told apart by
where they come from: a user may pass an `nn.Parameter` too. It hands the current tensors over at
every call, so weights that were baked into other weights can be compared with them. It does not
compile again when a parameter is replaced or written to; whoever bakes must look (`freshness.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor, fx, nn

from rmfx.compatibility import asked
from rmfx.ir.converted import attach, copy_graph
from rmfx.ir.nodes import replace_by_number
from rmfx.ir.notes import GRAPHARG

from .freshness import Mode, Snapshot, remember
from .functionalise import written_inputs

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


def find_lifted(gm: fx.GraphModule, *, uncounted: bool = False) -> tuple[Lifted, ...]:
    """The placeholders of Dynamo's graph that hold tensors of the model.

    Tensors whose changes could not be seen stay inputs: subclasses, sparse and quantised ones. So
    do those that the graph writes to.

    Args:
        gm: Dynamo's graph.
        uncounted: whether to take tensors made in inference mode, too, whose writes torch does not
            count.
    """
    nodes = [node for node in gm.graph.nodes if node.op == "placeholder"]
    if not any(GRAPHARG in node.meta for node in nodes):
        return ()
    found = []
    taken: set[str] = set()
    written = written_inputs(gm)
    for position, node in enumerate(nodes):
        argument = node.meta.get(GRAPHARG)
        source = getattr(argument, "source", None)
        if source is None or node in written or not _is_of_module(source):
            continue
        value = argument.example
        is_number = bool(argument.pass_arg_as_tensor)
        value = torch.as_tensor(value) if is_number else value
        if can_be_seen(value) and (uncounted or not value.is_inference()):
            name = _unique(_path(source), taken)
            found.append(Lifted(position, name, value, is_number))
    return tuple(found)


def can_be_seen(value: Any) -> bool:
    """Whether a value is a tensor of ordinary memory, which a snapshot can read."""
    is_plain = type(value) in (Tensor, nn.Parameter)
    return is_plain and value.layout == torch.strided and not value.is_quantized


def _is_of_module(source: Any) -> bool:
    guard = asked(source.guard_source)
    return bool(guard.is_specialized_nn_module() or guard.is_unspecialized_nn_module())


def _path(source: Any) -> str:
    """`L['self']._modules['layer1']._parameters['weight']` is layer1.weight."""
    inside = re.sub(r"^[LG]\['[^']*'\]", "", asked(source.name))
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
        node.meta = {k: v for k, v in node.meta.items() if k != GRAPHARG}
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
_MESSAGE = (
    "rmfx: the model's weights have changed since its residual connections were removed; compile "
    "the model again (torch._dynamo.reset()), or compile it with backend='rmfx', which notices"
)


def snapshot(
    lifted: Sequence[Lifted], held: Sequence[Tensor] = (), mode: Mode = "sampled"
) -> Snapshot:
    """What lifted tensors, whose shapes Dynamo guards, and others of the graph are like now."""
    tensors = [*(one.value for one in lifted), *held]
    numbers = [i for i, one in enumerate(lifted) if one.is_number]
    return Snapshot(tensors, numbers=numbers, unguarded=range(len(lifted), len(tensors)), mode=mode)


def check_in_graph(graph: fx.Graph, lifted: Sequence[Lifted]) -> None:
    """Let a graph whose weights are baked raise if those it is given are others.

    The check is two operators, so it outlives whatever compiles the graph further.
    """
    key = remember(snapshot(lifted))
    nodes = [node for node in graph.nodes if node.op == "placeholder"]
    given = [nodes[one.position] for one in lifted]
    with graph.inserting_after(nodes[-1]):
        fresh = graph.call_function(torch.ops.rmfx.weights_are_fresh.default, (given, key))
    with graph.inserting_after(fresh):
        graph.call_function(torch.ops.aten._assert_async.msg, (fresh, _MESSAGE))
