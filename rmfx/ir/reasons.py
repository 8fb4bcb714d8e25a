"""What stands in the way of a carry, in words, by the name of the operation.

Some operations mix channels or positions by numbers that depend on the data; nothing gets past
them. Others only rearrange dimensions: where one of those stops the search, what lies behind it is
often the true reason.
"""

from __future__ import annotations

import re

from torch import fx
from torch.utils import _pytree as pytree

from .net import Net
from .nodes import data_read, is_tensor_node
from .notes import FOLLOWED, why_frozen

NEAR = 100  # nodes that are looked at behind one that only rearranges
DATA_DEPENDENT: tuple[tuple[str, str], ...] = (
    (r"layernorm|rmsnorm", "divides by statistics of each sample, across its channels"),
    (r"groupnorm", "divides by statistics of each sample, across groups of its channels"),
    (r"instancenorm", "divides by statistics of each sample"),
    (r"localresponsenorm|crossmaplrn", "divides by the values of neighbouring channels"),
    (r"scaleddotproductattention|multihead", "is attention: its weights depend on the data"),
    (r"softmax", "weighs channels or positions by numbers that depend on the data"),
    (r"^normalize|norm$", "divides by a norm of the data"),
)
PRODUCTS = r"matmul|bmm|einsum|tensordot|bilinear|multidot|chainmatmul|^(add)?m[mv]$|^inner$|^dot$"
OF_DATA = "multiplies two matrices that both depend on the data"
OF_CONSTANT = (
    "multiplies by a constant that is no weight of a layer: it has other numbers for each sample "
    "or place, or sums over dimensions that stand apart; where it is one, call nn.Linear or a "
    "convolution"
)
OF_UNKNOWN = "multiplies by a constant, along which dimension is not known; pass example_inputs"
OF_CHANGING = (
    "goes by numbers of a tensor of the model, which with differentiable=True may change; convert "
    "without it"
)
OTHER: tuple[tuple[str, str], ...] = (
    (r"interpolate|upsample|resize", "resizes by interpolation, the carry too"),
    (r"maxpool|fractionalmax", "takes the largest of several values, of the carry too"),
    (r"adaptiveavgpool|^mean|^sum|^amax|^amin", "pools positions, those of the carry too"),
    (r"convtranspose", "is a transposed convolution with a stride: it puts zeros between values"),
    (r"pixelshuffle|pixelunshuffle", "moves channels into space or back"),
    (r"permute|transpose|reshape|view|flatten|squeeze|roll|flip|movedim|rearrange",
     "rearranges values, so that here channels are not where they are at the fork; rearrange before"
     " the fork and behind the sum instead"),
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
    held = [n for n in node.all_input_nodes if n.op == "get_attr" and why_frozen(n)]
    if held:
        return f"{name} reads {held[0].target}, and {why_frozen(held[0])}"
    if _is_product(name):
        return f"{name} {_of_product(net, node)}"
    for pattern, words in (*DATA_DEPENDENT, *OTHER):
        if re.search(pattern, _plain(name)):
            return f"{name} {words}"
    written = [n for n in node.all_input_nodes if why_frozen(n)]
    if written:
        return f"{name} reads {written[0].name}, and {why_frozen(written[0])}"
    if net.source.meta.get(FOLLOWED) and any(n.op == "get_attr" for n in node.all_input_nodes):
        return f"{name} {OF_CHANGING}"
    return f"{name} is neither linear nor a pointwise activation"


def _is_product(name: str) -> bool:
    return re.search(PRODUCTS, _plain(name)) is not None


def _of_product(net: Net, node: fx.Node) -> str:
    """Why a product is no layer: of several values, or of one and constants."""
    if _multiplies_data(node):
        return OF_DATA
    return OF_CONSTANT if all(net.rank(x) is not None for x in data_read(node)) else OF_UNKNOWN


def _multiplies_data(node: fx.Node) -> bool:
    """Whether two operands of a product depend on the data, which may be one value twice."""
    operands = [x for x in pytree.tree_leaves((node.args, node.kwargs)) if is_tensor_node(x)]
    return sum(bool(x.op == "placeholder" or data_read(x)) for x in operands) > 1


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
    if _is_product(operation_name(net, node)):
        return _multiplies_data(node)
    name = _plain(operation_name(net, node))
    norm_of_batch = "batchnorm" in name
    return not norm_of_batch and any(re.search(pattern, name) for pattern, _ in DATA_DEPENDENT)


def _plain(name: str) -> str:
    return re.sub(r"[_\d]|d$", "", name.lower())
