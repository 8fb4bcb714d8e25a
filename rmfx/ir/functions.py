"""Functions, methods and operators by their names: whose they are, and what schemas do not tell.

What is an operation of the dialect stands in `kinds.py`.
"""

from __future__ import annotations

import builtins
import operator
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload, OpOverloadPacket

# ---- whose they are -----------------------------------------------------------------------------
LIBRARIES = ("aten", "prims")  # of operators, whose names mean what torch means by them
HOMES = ("torch", "torch.functional", "torch.nn.functional", "torch._tensor")  # the same
HOMES_BELOW = ("torch._C", "torch.fx.experimental.")
TRUSTED_BELOW = ("torchvision.ops.", "rmfx.")  # to write to nothing, unless asked to


def is_torchs(target: Any) -> bool:
    """Whether a function or an operator is torch's own, and means what torch means by its name."""
    if isinstance(target, OpOverload):
        return target.namespace in LIBRARIES
    if isinstance(target, OpOverloadPacket):
        return target._qualified_op_name.partition("::")[0] in LIBRARIES
    home = str(getattr(target, "__module__", None))
    return is_method(target) or home in HOMES or home.startswith(HOMES_BELOW)


def is_method(target: Any) -> bool:
    """Whether a function is a tensor's method."""
    return getattr(target, "__objclass__", None) is torch._C.TensorBase


def is_trusted(target: Any) -> bool:
    """Whether a function does what is known of it by its name and its arguments."""
    home = str(getattr(target, "__module__", None))
    return is_torchs(target) or home.startswith(TRUSTED_BELOW)


def torch_name(node: fx.Node) -> str:
    """The name of torch's own function, operator or method that a node calls, "" of any other."""
    if node.op == "call_method":
        return str(node.target)
    is_own = node.op == "call_function" and is_torchs(node.target)
    return str(getattr(node.target, "__name__", "")) if is_own else ""


def is_in_place(name: str) -> bool:
    """Whether a name says that something is written to: `add_`, not `__add__`."""
    return name.endswith("_") and not name.endswith("__")


def asks_for_number(node: fx.Node) -> bool:
    """Whether a node asks a value for a number, a size or the like."""
    if node.op == "call_method":
        return node.target in GIVING_NUMBERS
    if node.target is getattr:
        return node.args[1] in ATTRIBUTES_OF_NUMBERS
    return torch_name(node).startswith("sym_")


def reads_sizes_alone(node: fx.Node, value: fx.Node) -> bool:
    """Whether a node asks a value for its sizes and for nothing else."""
    if node.target is getattr:
        return node.args[1] in ("shape", "ndim")
    name = torch_name(node).partition(".")[0]
    if name in ("sym_size", "sym_numel"):
        return True
    if name in LIKE_ANOTHER:
        return value in node.args[1:] and value is not node.args[0] and not node.kwargs
    return node.op == "call_method" and node.target in ("size", "dim", "numel", "ndimension")


def is_of_numbers(target: Any) -> bool:
    """Whether a function is one of Python's that, of numbers, gives a number."""
    return getattr(target, "__module__", None) in MODULES_OF_NUMBERS


# ---- of torch -----------------------------------------------------------------------------------
SPLITS = ("split", "split_with_sizes", "chunk", "tensor_split")
KEEPING_RANK = (  # which give as many dimensions as they read
    *(*SPLITS, "unsafe_split", "unsafe_chunk", "cat", "concat", "pad", "interpolate"),
    *("clone", "contiguous", "detach", "to", "type_as", "transpose", "permute", "swapaxes"),
    *("movedim", "flip", "roll", "softmax", "normalize", "maximum", "minimum", "clamp"),
    *("channel_shuffle", "pixel_shuffle", "pixel_unshuffle"),
)
SPLIT_ARGUMENTS = {
    **dict.fromkeys(("tensor", "self"), "input"),
    **dict.fromkeys(("split_size_or_sections", "split_size", "split_sizes", "chunks"), "amount"),
    **dict.fromkeys(("sections", "indices"), "amount"),
}
GIVING_CONTAINERS = (
    *(*SPLITS, *(f"unsafe_{name}" for name in SPLITS)),
    *("unbind", "hsplit", "vsplit", "dsplit", "topk", "sort"),
)
LIKE_ANOTHER = ("expand_as", "view_as", "reshape_as")  # of a second tensor
GIVING_NUMBERS = ("size", "dim", "numel", "ndimension", "stride", "item", "is_floating_point")
ATTRIBUTES_OF_NUMBERS = ("shape", "ndim", "dtype", "device", "is_cuda")
SWITCHES_OF_GRADIENTS = ("_set_grad_enabled", "set_grad_enabled", "wrap_with_set_grad_enabled")
FUNCTIONALISED = (
    "auto_functionalized",
    "auto_functionalized_v2",
)  # by exporting: writes to nothing


# Operators that may give an input or a view of it, which their schemas do not tell.
PASSING_THROUGH = frozenset(
    ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "einsum", "type_as")
    + ("unsafe_chunk", "unsafe_split", "unsafe_split_with_sizes", "_unsafe_view", "lift", "data")
    + ("meshgrid", "cartesian_prod", "broadcast_tensors", "atleast_1d", "atleast_2d", "atleast_3d")
    + ("sum_to_size", "align_tensors", "conj_physical", "to_dense", "_to_cpu", "histogramdd")
    + ("flatten_dense_tensors", "unflatten_dense_tensors", "_reshape_from_tensor", "_add_batch_dim")
    + ("_cast_Byte", "_cast_Char", "_cast_Double", "_cast_Float", "_cast_Half", "_cast_Int")
    + ("_cast_Long", "_cast_Short", "_remove_batch_dim", "contiguous", "to")
)
SHARING = ("set_", "set_data", "swap_")  # what is written to lies in the memory of another input


# ---- of Python ----------------------------------------------------------------------------------
_BINARY = (
    *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"),
    *("and", "or", "xor", "lshift", "rshift"),
)
IN_PLACE_SYMBOLS = tuple(f"i{name}" for name in _BINARY)  # all that tensors have
WRITING = (*IN_PLACE_SYMBOLS, "imatmul", "iconcat", "setitem", "delitem")
WRITING_METHODS = tuple(f"__{name}__" for name in WRITING)
COMPUTING = (  # gives new tensors of tensors
    *(*_BINARY, "and_", "or_", "matmul", "neg", "abs", "invert", "eq", "ne", "lt", "le", "gt"),
    *("ge", "index", "not_", "truth", "is_", "is_not"),
)
READING = ("pos", "getitem", "contains", "concat", "countOf", "indexOf", "length_hint")
ACTING = (builtins.setattr, builtins.delattr, builtins.exec, builtins.eval)
METHODS_OF_CONTAINERS = ("keys", "values", "items", "get", "index", "count", "copy", "_asdict")
JOINS_OF_CONTAINERS = (operator.add, operator.iadd, operator.mul, operator.imul)
MODULES_OF_NUMBERS = ("_operator", "operator", "math", "builtins")
