"""What stands in the way of a carry, in words, by the name of the operation.

Some operations mix channels or positions by numbers that depend on the data; nothing gets past
them. Others only rearrange dimensions: where one of those stops the search, what lies behind it is
often the true reason.
"""

from __future__ import annotations

import re

from torch import fx

from .net import Net

NEAR = 100  # nodes that are looked at behind one that only rearranges
DATA_DEPENDENT: tuple[tuple[str, str], ...] = (
    (r"layernorm|rmsnorm", "divides by statistics of each sample, across its channels"),
    (r"groupnorm", "divides by statistics of each sample, across groups of its channels"),
    (r"instancenorm", "divides by statistics of each sample"),
    (r"localresponsenorm|crossmaplrn", "divides by the values of neighbouring channels"),
    (r"scaleddotproductattention|multihead", "is attention: its weights depend on the data"),
    (r"softmax", "weighs channels or positions by numbers that depend on the data"),
    (r"matmul|bmm|einsum", "multiplies two matrices that both depend on the data"),
    (r"^normalize|norm$", "divides by a norm of the data"),
)
OTHER: tuple[tuple[str, str], ...] = (
    (r"interpolate|upsample|resize", "resizes by interpolation, the carry too"),
    (r"maxpool|fractionalmax", "takes the largest of several values, of the carry too"),
    (r"adaptiveavgpool|^mean|^sum|^amax|^amin", "pools positions, those of the carry too"),
    (r"convtranspose", "is a transposed convolution with a stride: it puts zeros between values"),
    (r"pixelshuffle|pixelunshuffle", "moves channels into space or back"),
    (r"permute|transpose|reshape|view|flatten|squeeze|roll|flip|movedim|rearrange",
     "rearranges values, so that channels are no longer where they were"),
    (r"dropout", "is dropout in training mode"),
    (r"^(new)?(zeros|ones|full|empty)(like)?$",
     "makes a tensor that is not known to have the sizes of what it meets; write a number for it"),
    (r"^cat|concat|stack",
     "joins tensors along another dimension than the channels, or in an unknown way"),
)  # fmt: skip


def operation_name(net: Net, node: fx.Node) -> str:
    """What a node calls, as people write it."""
    module = net.module(node)
    if module is not None:
        return type(module).__name__
    if node.op == "placeholder":
        return "the network's input"
    name = str(getattr(node.target, "__name__", node.target))
    return name.partition(".")[0] if node.op == "call_function" else name


def reason_for(net: Net, node: fx.Node) -> str:
    """Why a carry cannot pass a node that is no layer."""
    name = operation_name(net, node)
    for pattern, words in (*DATA_DEPENDENT, *OTHER):
        if re.search(pattern, _plain(name)):
            return f"{name} {words}"
    return f"{name} is neither linear nor a pointwise activation"


def cause_behind(net: Net, node: fx.Node, end: fx.Node) -> tuple[fx.Node, str] | None:
    """The nearest data-dependent operation between a node and an earlier one, with its reason."""
    if _data_dependent(net, node):
        return None
    waiting, seen = [node], {node}
    for _ in range(NEAR):
        if not waiting:
            return None
        here = max(waiting)
        waiting.remove(here)
        if here is not node and _data_dependent(net, here):
            return here, reason_for(net, here)
        fresh = [n for n in here.all_input_nodes if n not in seen and end < n]
        seen.update(fresh)
        waiting += fresh
    return None


def _data_dependent(net: Net, node: fx.Node) -> bool:
    if node.op not in ("call_module", "call_function", "call_method"):
        return False
    if node.op == "call_module" and net.module(node) is None:
        return False
    name = _plain(operation_name(net, node))
    norm_of_batch = "batchnorm" in name
    return not norm_of_batch and any(re.search(pattern, name) for pattern, _ in DATA_DEPENDENT)


def _plain(name: str) -> str:
    return re.sub(r"[_\d]|d$", "", name.lower())
