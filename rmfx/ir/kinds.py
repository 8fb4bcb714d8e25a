"""Kinds of layers and the operations of the dialect, and what is known of each: a row of a table.

What a leaf module computes is told by its class, and a subclass is not its base class: it counts as
the layer that it derives from where nothing of what runs is its own. It may say how it is made and
how it is shown, and no more.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from rmfx.algebra.activation import TABLE
from rmfx.algebra.affine import MULTIPLYING
from rmfx.modules.activations import OWN_ACTIVATIONS

Kinds = tuple[type[nn.Module], ...]
INF = math.inf
aten = torch.ops.aten


# ---- layers -------------------------------------------------------------------------------------
def _by_dims(*names: str) -> Kinds:
    """The classes of torch.nn with a number of spatial dimensions in their names, in order."""
    return tuple(getattr(nn, f"{name}{dims}d") for name in names for dims in (1, 2, 3))


MAX_POOLS = _by_dims("MaxPool")
AVERAGE_POOLS = _by_dims("AvgPool")
ADAPTIVE_AVERAGES = _by_dims("AdaptiveAvgPool")
ADAPTIVE_MAXIMA = _by_dims("AdaptiveMaxPool")
POOLS_OF_ALL = (*ADAPTIVE_AVERAGES, *ADAPTIVE_MAXIMA)
POOL_DIMS = {
    kind: dims
    for kinds in (MAX_POOLS, AVERAGE_POOLS, ADAPTIVE_AVERAGES, ADAPTIVE_MAXIMA)
    for dims, kind in enumerate(kinds, 1)
}
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
INSTANCE_NORMS = _by_dims("InstanceNorm")
PADS = _by_dims("ZeroPad", "ConstantPad")
BORDERS = _by_dims("ReflectionPad", "ReplicationPad", "CircularPad")
VIEWING = (nn.Flatten, nn.Unflatten, nn.Identity)  # which move nothing in memory
NO_OPS = (  # at inference
    *(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
    *(nn.AlphaDropout, nn.FeatureAlphaDropout),
)


MODE_DEPENDENT = (  # with whatever derives from them
    *(nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm),
    *(nn.modules.dropout._DropoutNd, nn.RReLU),
)


@dataclass(frozen=True)
class Layers:
    """Kinds of layers, and what all of them do.

    Attributes:
        kinds: their classes.
        channelwise: they keep both the number of dimensions and the channels of their input.
        spatial: each channel goes its own way, in dimension 1 of those that their name says.
        hull: what they give lies between the values that they read.
        fresh: what they give lies in memory of its own.
        any_rank: they do the same whatever the number of dimensions.
    """

    kinds: Kinds
    channelwise: bool = False
    spatial: bool = False
    hull: bool = False
    fresh: bool = False
    any_rank: bool = False


LAYERS = (
    Layers(MAX_POOLS, channelwise=True, spatial=True, hull=True, fresh=True, any_rank=True),
    Layers(AVERAGE_POOLS, channelwise=True, spatial=True, fresh=True, any_rank=True),
    Layers(ADAPTIVE_AVERAGES, channelwise=True, spatial=True, hull=True, fresh=True, any_rank=True),
    Layers(ADAPTIVE_MAXIMA, spatial=True, hull=True, any_rank=True),
    Layers(PADS, spatial=True, any_rank=True),
    Layers(BORDERS, spatial=True),
    Layers(NO_OPS, channelwise=True, hull=True, any_rank=True),
    Layers(BATCH_NORMS, channelwise=True, fresh=True),
    Layers((nn.BatchNorm2d, nn.BatchNorm3d), any_rank=True),  # which take batches only
    Layers((*INSTANCE_NORMS, nn.GroupNorm, nn.Softmax, nn.LayerNorm), fresh=True),
    Layers((nn.Embedding,), fresh=True),
    Layers(MULTIPLYING, fresh=True, any_rank=True),
    Layers(tuple(TABLE), fresh=True),
    Layers(OWN_ACTIVATIONS, channelwise=True),
)


def _kinds(has: Callable[[Layers], bool]) -> Kinds:
    return tuple(kind for row in LAYERS if has(row) for kind in row.kinds)


CHANNELWISE = _kinds(lambda row: row.channelwise)
SPATIAL = _kinds(lambda row: row.spatial)
HULLS = _kinds(lambda row: row.hull)
FRESH = _kinds(lambda row: row.fresh)
ANY_RANK = _kinds(lambda row: row.any_rank)
LAYER_KINDS = _kinds(lambda row: row.kinds != tuple(TABLE))  # activations are another table's
KEEPING_BATCH = _kinds(lambda row: nn.Embedding not in row.kinds)  # in the first dimension


# ---- operations ---------------------------------------------------------------------------------
def overloads(*names: str) -> list[Any]:
    """aten overloads by name, those that this version of PyTorch has."""
    found = []
    for name in names:
        packet, _, overload = name.partition(".")
        if hasattr(aten, packet):
            found.append(getattr(getattr(aten, packet), overload or "default"))
    return found


@dataclass(frozen=True)
class Operation:
    """An operation of the dialect, and what is known of it.

    Attributes:
        function: of torch, by which the graphs of the dialect call it.
        names: of functions, methods and operators that do the same, in place (`add_`) or not.
        overloads: of those operators.
        symbols: of Python: an operator, and the one that works in place. Arithmetic has them.
        neutral: place of an operand -> what the others must hold for that one to come out
            unchanged; of what combines tensors place by place, and spreads out those of size 1.
        has_methods: whether methods of the names do the same, too.
    """

    function: Any
    names: str
    overloads: str = "default"
    symbols: tuple[Any, ...] = ()
    neutral: Mapping[int, tuple[float | None, ...]] = field(default_factory=dict)
    has_methods: bool = True

    def forms(self) -> Iterator[Any]:
        """Everything that a graph may call for it."""
        yield from self.symbols
        for name in self.names.split():
            for form in (name, f"{name}_"):
                if hasattr(torch, form):
                    yield getattr(torch, form)
                if self.has_methods and hasattr(Tensor, form):
                    yield form
                yield from overloads(*(f"{form}.{one}" for one in self.overloads.split()))


OPERATIONS = (
    Operation(
        *(torch.add, "add", "Tensor"),
        symbols=(operator.add, operator.iadd),
        neutral={0: (None, 0.0), 1: (0.0, None)},
    ),
    Operation(
        *(torch.sub, "sub subtract", "Tensor"),
        symbols=(operator.sub, operator.isub),
        neutral={0: (None, 0.0)},
    ),
    Operation(
        *(torch.mul, "mul multiply", "Tensor"),
        symbols=(operator.mul, operator.imul),
        neutral={0: (None, 1.0), 1: (1.0, None)},
    ),
    Operation(
        *(torch.div, "div divide true_divide", "Tensor"),
        symbols=(operator.truediv, operator.itruediv),
        neutral={0: (None, 1.0)},
    ),
    Operation(torch.neg, "neg negative", symbols=(operator.neg,)),
    Operation(torch.maximum, "maximum", neutral={0: (None, -INF), 1: (-INF, None)}),
    Operation(torch.minimum, "minimum", neutral={0: (None, INF), 1: (INF, None)}),
    Operation(
        *(torch.where, "where", "self ScalarOther ScalarSelf"),
        neutral={1: (True, None, 0.0), 2: (False, 0.0, None)},
        has_methods=False,  # which take the condition second: see CHOICES
    ),
    Operation(torch.cat, "cat concat concatenate"),
)


def _forms(has: Callable[[Operation], bool]) -> dict[Any, Any]:
    """What a graph may call -> what it calls in the dialect."""
    return {form: row.function for row in OPERATIONS if has(row) for form in row.forms()}


ARITHMETIC = _forms(lambda row: bool(row.symbols))
SELECTIONS = _forms(lambda row: bool(row.neutral) and not row.symbols)  # of values, one by one
CONCATENATIONS = _forms(lambda row: row.function is torch.cat)
NEUTRAL = {row.function: row.neutral for row in OPERATIONS if row.neutral}
SPREADING = tuple(NEUTRAL)
KEEP_SIZE = (*SPREADING, torch.cat)
ELEMENTWISE = {**ARITHMETIC, **SELECTIONS}


def _calls(*functions: Any) -> tuple[Any, ...]:
    """What stands for operations in graphs that symbols of Python or the dialect wrote."""
    rows = [row for row in OPERATIONS if row.function in functions]
    return tuple(call for row in rows for call in (*row.symbols, row.function))


ADDITIVE = (torch.add, torch.sub)
ADDS = _calls(torch.add)
SUBS = _calls(torch.sub)
SCALES = _calls(torch.mul, torch.div, torch.neg)
IN_PLACE_BY_METHOD: dict[Any, str] = {
    row.symbols[1]: f"{row.function.__name__}_" for row in OPERATIONS if row.symbols[1:]
}


# What is an operation of the dialect with some arguments, or several of them, or none.
CHOICES_OF_TWO: dict[Any, Any] = {  # with two tensors
    **dict.fromkeys([torch.max, "max", *overloads("max.other")], torch.maximum),
    **dict.fromkeys([torch.min, "min", *overloads("min.other")], torch.minimum),
}
CHOICES = (torch.where, "where", *overloads("where.self", "where.ScalarOther", "where.ScalarSelf"))
MASKED_FILLS = (torch.masked_fill, "masked_fill", "masked_fill_") + tuple(
    overloads(*(f"masked_fill{mark}.{one}" for mark in ("", "_") for one in ("Scalar", "Tensor")))
)
FILLS = (torch.zero_, "zero_", "fill_", *overloads("zero_", "fill_.Scalar"))  # in place
ADDCMULS = (torch.addcmul, "addcmul", *overloads("addcmul"))
STACKS = (torch.stack, *overloads("stack"))
SUMS: dict[Any, str] = {
    **dict.fromkeys([torch.sum, "sum", *overloads("sum.dim_IntList")], "sum"),
    **dict.fromkeys([torch.mean, "mean", *overloads("mean.dim")], "mean"),
}
NO_OP_METHODS = ("clone", "detach")
NO_OP_CALLS = (torch.clone, torch.detach, *overloads("clone", "detach", "alias"))
# What reads size and type of a tensor, but no value.
FILLED = overloads("new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like")
VIEWS: dict[Any, Any] = {"view": "reshape", aten.view.default: aten.reshape.default}
NARROWS = ("narrow", torch.narrow, *overloads("narrow"))
CASTS = ("to", "type", "float", "double", "half", "bfloat16", "int", "long", "bool", "type_as")
CAST_OPERATORS = overloads(
    "to.dtype", "to.dtype_layout", "to.device", "to.other", "_to_copy", "type_as"
)
_COMPARISONS = ("gt", "ge", "lt", "le", "eq", "ne")
COMPARISONS = frozenset(  # with a number they keep dimensions and sizes
    [*_COMPARISONS, *(getattr(owner, n) for owner in (torch, operator) for n in _COMPARISONS)]
)


# ---- what is of a kind --------------------------------------------------------------------------
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
    if found is None or not _methods(found).isdisjoint(vars(module)):  # type: ignore[arg-type]
        return None
    return found


def is_a(module: object, kinds: type[Any] | tuple[type[Any], ...]) -> bool:
    """Whether a module is a layer of a kind, as `isinstance`, but for code of its own."""
    kind = kind_of(module) if isinstance(module, nn.Module) else None
    return kind is not None and issubclass(kind, kinds)


@lru_cache(maxsize=1024)
def _methods(kind: type[nn.Module]) -> frozenset[str]:
    """What runs by name in a class, and would be another in a module that has one of its own."""
    return frozenset(n for n in dir(kind) if callable(getattr(kind, n, None))) - HARMLESS


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
