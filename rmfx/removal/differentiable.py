"""Weights as functions of the original parameters, so that gradients reach them.

A pass computes new weights from old ones with ordinary tensor operators. `linked` runs it once and
writes down those operators; the result computes its weights in the graph, from the parameters as
they are at every call. Nothing is baked, so nothing can be stale.

The pass takes decisions as it goes, and none of them may rest on the values of today's weights (a
bias that happens to be zero, a range that only they prove). So it runs on a copy with random
weights, in which nothing is special, and the recorder lets no number out of them but answers that
almost all weights would give.

What the model's own code makes of its parameters (a quantised or a detached weight) is not the
pass's business: the pass sees a weight with random values of its own, and the result makes it with
the very operations of the model, whose gradients these are.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor, fx, nn

from rmfx.frontend.dynamo import Lifted
from rmfx.frontend.tracing import with_constants
from rmfx.ir.nodes import attribute
from rmfx.modules.copies import copied_model

from .linker import Linker, tensors_of
from .recording import Kind, Recorder, place


def linked(
    source: fx.GraphModule,
    convert: Callable[[fx.GraphModule], fx.GraphModule],
    lifted: Sequence[Lifted] = (),
) -> fx.GraphModule:
    """What a pass makes of a graph, with weights that follow the parameters of the graph.

    Args:
        source: a graph in the dialect.
        convert: the pass; its decisions may rest on random weights, not on their values.
        lifted: parameters that the graph is handed at every call, and that it shall read there.

    Returns:
        A graph that shares the parameters and buffers of `source` and computes the weights from
        them at every call.

    Raises:
        RmfxError: a layer was made whose weights cannot be handed over.
    """
    with Recorder(tensors_of(source), may_leave=Kind.FIXED) as reader:
        folded, made_by = with_constants(source)
    made_by = {name: by for name, by in made_by.items() if reader.kind(folded.get_buffer(name))}
    weights = {*tensors_of(source), *made_by}
    generic = _with_random_weights(folded, weights)
    tensors = {name: t for name, t in tensors_of(generic).items() if name in weights}
    recorder = Recorder(tensors, may_leave=Kind.SURE)
    with recorder, torch.no_grad():
        converted = convert(generic)
    made = Linker(source, converted, recorder, made_by, {place(x.value) for x in lifted}).link()
    if lifted:
        _read_inputs(made, lifted)
    return made


def _read_inputs(gm: fx.GraphModule, lifted: Sequence[Lifted]) -> None:
    """Let a graph read lifted tensors where it is handed them; there is nothing to check then."""
    inputs = gm.graph.find_nodes(op="placeholder")
    given = {place(one.value): inputs[one.position] for one in lifted}
    for node in list(gm.graph.nodes):
        tensor = attribute(gm, node) if node.op == "get_attr" else None
        if isinstance(tensor, Tensor) and place(tensor) in given:
            node.replace_all_uses_with(given[place(tensor)])
            gm.graph.erase_node(node)
    for check in gm.graph.find_nodes(
        op="call_function", target=torch.ops.rmfx.weights_are_fresh.default
    ):
        for user in list(check.users):
            gm.graph.erase_node(user)
        gm.graph.erase_node(check)
    gm.delete_all_unused_submodules()
    gm.recompile()


def _with_random_weights(source: fx.GraphModule, names: Collection[str]) -> fx.GraphModule:
    """A copy of a graph with random numbers in the tensors of some names.

    Parameters have any sign; buffers, of which some are variances, keep the one they have.
    """
    generic = copied_model(source)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in tensors_of(generic).items():
            if name not in names or not tensor.is_floating_point():
                continue
            size = torch.rand(tensor.shape, generator=generator, dtype=torch.float64) + 0.5
            sign = torch.randint(2, tensor.shape, generator=generator) * 2 - 1
            if not isinstance(tensor, nn.Parameter):
                sign = torch.where(tensor.cpu() < 0, -1, 1)
            if torch._debug_has_internal_overlap(tensor):  # one number in many places
                tensor.data = tensor.clone(memory_format=torch.contiguous_format)
            tensor.copy_(size * sign)
    return generic
