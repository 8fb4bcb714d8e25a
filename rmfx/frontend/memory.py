"""Memory is compared by storage: two views of one buffer are one memory, whatever their names."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, fx, nn

from rmfx.ir.kinds import is_ordinary
from rmfx.ir.nodes import attribute
from rmfx.ir.notes import GRAPHARG, WRITTEN


def tensors_of(module: nn.Module) -> Iterator[Tensor]:
    """Everything that a module and its parts hold."""
    for part in module.modules():
        for held in (part._parameters, part._buffers, vars(part)):
            yield from (value for value in held.values() if isinstance(value, Tensor))


def memories(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Which tensors share memory: a number for the id of each, equal where storages overlap."""
    spans, found = [], dict[int, int]()
    for tensor in {id(t): t for t in tensors}.values():
        span = _span(tensor)
        if span is None:
            found[id(tensor)] = storage_of(tensor)
        else:
            spans.append((*span, id(tensor)))
    group, end, last = 0, 0, ""
    for device, start, stop, own in sorted(spans):
        if device != last or start >= end:
            group, end, last = start, stop, device
        end = max(end, stop)
        found[own] = hash((device, group))
    return found


def _span(tensor: Tensor) -> tuple[str, int, int] | None:
    """Where the storage of a tensor begins and ends, None of one without an address."""
    if not is_ordinary(tensor) or tensor.layout is not torch.strided or tensor.is_meta:
        return None
    storage = tensor.untyped_storage()
    start, size = storage.data_ptr(), storage.nbytes()
    return (str(tensor.device), start, start + size) if start and size else None


def shares_memory(module: nn.Module) -> bool:
    """Whether two tensors of a module are in the same memory."""
    tensors = [*module.parameters(), *module.buffers()]
    return len(set(map(storage_of, tensors))) < len(tensors)


def storage_of(tensor: Tensor) -> int:
    """A number for the storage of a tensor, its own if it has none."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse, or wrapped around other tensors
        return id(tensor)


def tensors_behind(gm: fx.GraphModule, node: fx.Node) -> tuple[Tensor, ...]:
    """The tensors of the model that a node stands for, or that the module it calls holds."""
    if node.op == "call_module":
        return tuple(tensors_of(gm.get_submodule(str(node.target))))
    value = attribute(gm, node) if node.op == "get_attr" else None
    if node.op == "placeholder":
        value = _example(node)
    return (value,) if isinstance(value, Tensor) else ()


@contextlib.contextmanager
def writes_undone(gm: fx.GraphModule) -> Iterator[None]:
    """Put back what the calls of a graph, which runs in the block, write to the model's tensors."""
    nodes = (n for n in gm.graph.nodes if n.meta.get(WRITTEN) and n.op != "placeholder")
    written = {id(t): t for n in nodes for t in tensors_behind(gm, n)}
    before = [(tensor, tensor.detach().clone()) for tensor in written.values()]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, held in before:
                tensor.copy_(held)


def _example(node: fx.Node) -> object:
    """What Dynamo was given for an input, which it makes of the model's tensors, too."""
    try:
        return getattr(node.meta.get(GRAPHARG), "example", None)
    except AssertionError:  # it is no more
        return None
