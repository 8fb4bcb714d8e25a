"""What a leaf module computes is told by its class, and a subclass is not its base class.

A subclass counts as the layer that it derives from where nothing of what runs is its own: it may
say how it is made and how it is shown, and no more.
"""

from __future__ import annotations

import operator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload, OpOverloadPacket
from torch.nn.utils import parametrize

from rmfx.modules.activations import OWN_ACTIVATIONS

LIBRARIES = ("aten", "prims")  # of operators, whose names mean what torch means by them
HOMES = ("_operator", "builtins", "torch")  # the same, of functions
MAX_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
# What combines tensors place by place, and spreads out an operand of size 1.
SPREADING = (
    *(torch.add, torch.sub, torch.mul, torch.div),
    *(torch.maximum, torch.minimum, torch.where),
)
KEEP_SIZE = (*SPREADING, torch.cat)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
ADAPTIVE_AVERAGES = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
POOLS_OF_ALL = (
    *ADAPTIVE_AVERAGES,
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
)
AVERAGE_POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
PADS = (
    *(nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d),
    *(nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d),
)
SPLITS = ("split", "split_with_sizes", "chunk")
SPLIT_ARGUMENTS = {
    **dict.fromkeys(("tensor", "self"), "input"),
    **dict.fromkeys(("split_size_or_sections", "split_size", "split_sizes", "chunks"), "amount"),
}
BORDERS = (
    *(nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d),
    *(nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d),
    *(nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d),
)


# Modules that keep both the number of dimensions and the channels of their input.
CHANNELWISE = (
    *BATCH_NORMS,
    *AVERAGE_POOLS,
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.Identity),
    *OWN_ACTIVATIONS,
)
ADDS = (operator.add, operator.iadd, torch.add)
SUBS = (operator.sub, operator.isub, torch.sub)
SCALES = (
    *(operator.mul, operator.imul, torch.mul, operator.truediv, operator.itruediv, torch.div),
    *(operator.neg, torch.neg),
)
aten = torch.ops.aten
_COMPARISONS = ("gt", "ge", "lt", "le", "eq", "ne")
COMPARISONS = frozenset(  # with a number they keep dimensions and sizes
    [*_COMPARISONS, *(getattr(owner, n) for owner in (torch, operator) for n in _COMPARISONS)]
)
IN_PLACE_BY_METHOD: dict[Any, str] = {
    operator.iadd: "add_",
    operator.isub: "sub_",
    operator.imul: "mul_",
    operator.itruediv: "div_",
}
CASTS = ("to", "type", "float", "double", "half", "bfloat16", "int", "long", "bool", "type_as")


# Libraries whose layers do what their documentation says, to nothing but their input.
KNOWN = ("torch.nn.modules.", "torch.nn.parallel.data_parallel", "torchvision.ops.", "rmfx.")


# What a class may have of its own and still compute what its base class computes.
HARMLESS = frozenset(
    ("__init__", "__module__", "__qualname__", "__doc__", "__annotations__", "__constants__")
    + ("__repr__", "extra_repr", "__parameters__", "__orig_bases__", "__slots__", "__dict__")
    + ("__firstlineno__", "__static_attributes__", "__annotate__", "__annotate_func__")
    + ("__annotations_cache__", "__weakref__", "__abstractmethods__", "_abc_impl")
)


# What a kind of tensor may have of its own, too: how it is made and how it is kept.
OF_KEEPING = frozenset(("__new__", "__deepcopy__", "__reduce__", "__reduce_ex__", "__setstate__"))


def kind_of(module: nn.Module) -> type[nn.Module] | None:
    """The known class whose forward a module runs, None if it runs code of its own."""
    kind: type[Any] = type(module)
    if kind.__module__ == parametrize.__name__:  # a class that torch makes for one module
        kind = kind.__mro__[1]
    found = _known_base(kind)  # type: ignore[arg-type]
    own = vars(module).keys() - HARMLESS
    return None if any(callable(getattr(found, name, None)) for name in own) else found


def is_a(module: object, kinds: type[Any] | tuple[type[Any], ...]) -> bool:
    """Whether a module is a layer of a kind, as `isinstance`, but for code of its own."""
    kind = kind_of(module) if isinstance(module, nn.Module) else None
    return kind is not None and issubclass(kind, kinds)


@lru_cache(maxsize=1024)
def _known_base(kind: type[Any]) -> type[nn.Module] | None:
    for base in kind.__mro__:
        if base.__module__.startswith(KNOWN):
            return base
        if set(vars(base)) - HARMLESS:
            return None
    return None


def is_ordinary(tensor: Tensor) -> bool:
    """Whether a tensor computes as `torch.Tensor` does, whatever its class adds to that."""
    return _is_ordinary(type(tensor))


@lru_cache(maxsize=1024)
def _is_ordinary(kind: type[Tensor]) -> bool:
    own = (base for base in kind.__mro__ if issubclass(base, Tensor))
    return all(
        base in (Tensor, nn.Parameter)
        or all(name in HARMLESS | OF_KEEPING or not hasattr(Tensor, name) for name in vars(base))
        for base in own
    )


def overloads(*names: str) -> list[Any]:
    """aten overloads by name, those that this version of PyTorch has."""
    found = []
    for name in names:
        packet, _, overload = name.partition(".")
        if hasattr(aten, packet):
            found.append(getattr(getattr(aten, packet), overload or "default"))
    return found


ARITHMETIC: dict[Any, Any] = {
    **dict.fromkeys(
        [operator.add, operator.iadd, "add", "add_", *overloads("add.Tensor", "add_.Tensor")],
        torch.add,
    ),
    **dict.fromkeys(
        [operator.sub, operator.isub, "sub", "sub_", "subtract", "subtract_"]
        + overloads("sub.Tensor", "sub_.Tensor", "subtract.Tensor"),
        torch.sub,
    ),
    **dict.fromkeys(
        [operator.mul, operator.imul, "mul", "mul_", "multiply", "multiply_", torch.multiply]
        + overloads("mul.Tensor", "mul_.Tensor", "multiply.Tensor"),
        torch.mul,
    ),
    **dict.fromkeys(
        [operator.truediv, operator.itruediv, "div", "div_", "true_divide", torch.true_divide]
        + overloads("div.Tensor", "div_.Tensor", "true_divide.Tensor", "divide.Tensor"),
        torch.div,
    ),
    **dict.fromkeys([operator.neg, "neg", "neg_", *overloads("neg", "neg_")], torch.neg),
    torch.add: torch.add,
    torch.sub: torch.sub,
    torch.subtract: torch.sub,
    torch.mul: torch.mul,
    torch.div: torch.div,
    torch.neg: torch.neg,
}
SELECTIONS: dict[Any, Any] = {  # of one of several tensors, value by value
    **dict.fromkeys([torch.maximum, "maximum", *overloads("maximum")], torch.maximum),
    **dict.fromkeys([torch.minimum, "minimum", *overloads("minimum")], torch.minimum),
    **dict.fromkeys(
        [torch.where, *overloads("where.self", "where.ScalarOther", "where.ScalarSelf")],
        torch.where,
    ),
}
CHOICES_OF_TWO: dict[Any, Any] = {  # with two tensors
    **dict.fromkeys([torch.max, "max", *overloads("max.other")], torch.maximum),
    **dict.fromkeys([torch.min, "min", *overloads("min.other")], torch.minimum),
}
ADDCMULS = (torch.addcmul, "addcmul", *overloads("addcmul"))
CONCATENATIONS = (torch.cat, torch.concat, torch.concatenate, *overloads("cat", "concat"))
STACKS = (torch.stack, *overloads("stack"))
SUMS: dict[Any, str] = {
    **dict.fromkeys([torch.sum, "sum", *overloads("sum.dim_IntList")], "sum"),
    **dict.fromkeys([torch.mean, "mean", *overloads("mean.dim")], "mean"),
}
CAST_OPERATORS = overloads(
    "to.dtype", "to.dtype_layout", "to.device", "to.other", "_to_copy", "type_as"
)


def torch_name(node: fx.Node) -> str:
    """The name of torch's own function, operator or method that a node calls, "" of any other."""
    target: Any = node.target
    if node.op == "call_method":
        return str(target)
    if node.op != "call_function":
        return ""
    if isinstance(target, OpOverload):
        return str(target.__name__) if target.namespace in LIBRARIES else ""
    if isinstance(target, OpOverloadPacket):
        library = target._qualified_op_name.partition("::")[0]
        return str(target.__name__) if library in LIBRARIES else ""
    home = str(getattr(target, "__module__", None)).partition(".")[0]
    is_method = getattr(target, "__objclass__", None) is torch._C.TensorBase
    return str(getattr(target, "__name__", "")) if home in HOMES or is_method else ""
