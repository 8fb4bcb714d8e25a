"""What a call reads, writes, shares memory with and draws at random.

    - An operator says it in its schema: every argument that it writes to, alone or in a list, at
      any place or by keyword, and whether its value lies in the memory of an argument.
    - A packet of operators, a function of torch and a method of a tensor do what those of the
      operator's overloads do that can take the call.
    - torch's own functions in Python and its layers write to what they read where they are asked to
      work in place, to running statistics in training mode, to embeddings that they normalise.
    - Anything else may do anything: it is a barrier that writes to all that it reads.

Memory is compared by storage: two views of one buffer are one memory, whatever their names.
"""

from __future__ import annotations

import builtins
import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from rmfx.algebra.activation import TABLE
from rmfx.algebra.affine import MULTIPLYING
from rmfx.ir.kinds import AVERAGE_POOLS, BATCH_NORMS, is_a, is_ordinary, kind_of
from rmfx.ir.nodes import attribute

Nodes = tuple[fx.Node, ...]
aten = torch.ops.aten


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
FRESH_LAYERS = (
    *(*MULTIPLYING, *BATCH_NORMS, *TABLE, *AVERAGE_POOLS, nn.Embedding),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.LayerNorm, nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.Softmax),
)
IN_PLACE_OPERATORS = tuple(
    f"i{name}"
    for name in (
        *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"),
        *("and", "or", "xor", "lshift", "rshift", "matmul", "concat"),
    )
)
OPERATORS_THAT_WRITE = (*IN_PLACE_OPERATORS, "setitem", "delitem")
METHODS_THAT_WRITE = tuple(f"__{name}__" for name in OPERATORS_THAT_WRITE)
ARITHMETIC = tuple(name.removeprefix("i") for name in IN_PLACE_OPERATORS[:-1])
ARITHMETIC = (*ARITHMETIC, "and_", "or_", "neg", "abs", "invert", "eq", "ne", "lt", "le")
ARITHMETIC = (*ARITHMETIC, "gt", "ge", "index", "not_", "truth", "is_", "is_not")
OPERATORS_THAT_READ = ("pos", "getitem", "contains", "concat", "countOf", "indexOf", "length_hint")
BUILTINS_THAT_ACT = (builtins.setattr, builtins.delattr, builtins.exec, builtins.eval)
METHODS_OF_CONTAINERS = ("keys", "values", "items", "get", "index", "count", "copy", "_asdict")


# Modules of torch and others whose functions in Python write to nothing, unless asked to.
TRUSTED = ("torch", "torch.functional", "torch.nn.functional", "torch._tensor")
TRUSTED_BELOW = ("torch._C", "torch.fx.experimental.", "torchvision.ops.", "rmfx.")
MODES = ("training", "train", "use_input_stats")
FUNCTIONALISED = ("auto_functionalized", "auto_functionalized_v2")


@dataclass(frozen=True)
class Effects:
    """What a call does.

    Attributes:
        writes: values whose memory it writes to.
        aliases: values in whose memory its own value may lie.
        owned: tensors of the called module that it writes to.
        draws: whether its value is drawn at random, or left as it was found in memory.
        unknown: why nothing is known of it, if so; it then may write to all that it reads.
    """

    writes: Nodes = ()
    aliases: Nodes = ()
    owned: tuple[Tensor, ...] = ()
    draws: bool = False
    unknown: str | None = None


def effects_of(gm: fx.GraphModule, node: fx.Node) -> Effects:
    """What a node of a graph does."""
    if node.op == "call_module":
        return _of_module(gm, node)
    if node.op == "call_method":
        return _of_method(node, str(node.target))
    return _of_function(gm, node) if node.op == "call_function" else Effects()


def _barrier(node: fx.Node, why: str, owned: Iterable[Tensor] = ()) -> Effects:
    """Of a call that may do anything."""
    inputs = tuple(node.all_input_nodes)
    return Effects(inputs, inputs, tuple(owned), draws=True, unknown=why)


def _reading(node: fx.Node) -> Effects:
    """Of a call that writes to nothing, and may give what it reads."""
    return Effects(aliases=tuple(node.all_input_nodes))


# ---- operators ----------------------------------------------------------------------------------
def _of_overloads(node: fx.Node, overloads: Iterable[OpOverload]) -> Effects:
    """What those of an operator's overloads do that can take a call; all, if none seems to."""
    every = [(op, _given(node, op._schema)) for op in overloads]
    fitting = [(op, given) for op, given in every if _takes(op._schema, node, given)]
    found = [_of_overload(node, op, given) for op, given in fitting or every]
    return Effects(
        _unique(n for one in found for n in one.writes),
        _unique(n for one in found for n in one.aliases),
        draws=any(one.draws for one in found),
    )


def _given(node: fx.Node, schema: Any) -> dict[str, Any]:
    """Arguments by the names of a schema; torch's functions say `input` for `self`."""
    names = [a.name for a in schema.arguments]
    by_place = [a.name for a in schema.arguments if not a.kwarg_only]
    given = dict(zip(by_place, node.args, strict=False))
    for name, value in node.kwargs.items():
        other = {"input": "self", "self": "input"}.get(name, name)
        given[other if name not in names and other in names else name] = value
    return given


def _takes(schema: Any, node: fx.Node, given: Mapping[str, Any]) -> bool:
    """Whether an overload has a place for every argument of a call, and no place left empty."""
    places = [a for a in schema.arguments if not a.kwarg_only]
    known = {a.name for a in schema.arguments}
    complete = all(a.name in given or a.has_default_value() for a in schema.arguments)
    return complete and len(node.args) <= len(places) and set(given) <= known


def _of_overload(node: fx.Node, op: OpOverload, given: Mapping[str, Any]) -> Effects:
    schema = op._schema
    shared = [a for a in schema.arguments if a.alias_info is not None]
    written = [a for a in shared if a.alias_info is not None and a.alias_info.is_write]
    writes = [n for a in written for n in _written(node, a, given)]
    returned = any(r.alias_info is not None for r in schema.returns)
    aliases = [n for a in shared if returned for n in _nodes(given.get(a.name))]
    name = op._opname
    if (name in PASSING_THROUGH or _is_foreign_composite(op)) and not returned:
        aliases = node.all_input_nodes
    if name in SHARING:
        aliases = node.all_input_nodes
    defaults = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    hidden = _hidden_writes({**defaults, **given})
    return Effects(_unique((*writes, *hidden)), _unique(aliases), draws=draws(op, given))


def _written(node: fx.Node, argument: Any, given: Mapping[str, Any]) -> Iterator[fx.Node]:
    """What a call gives for an argument that is written to; all it reads if that is unclear."""
    if argument.name in given:
        yield from _nodes(given[argument.name])
    elif not argument.kwarg_only and not argument.has_default_value():
        yield from node.all_input_nodes


def _is_foreign_composite(op: OpOverload) -> bool:
    """Whether an operator is made of others by a library that nobody holds to its schema."""
    composite = torch._C.DispatchKey.CompositeImplicitAutograd
    return op.namespace not in ("aten", "prims", "torchvision") and op.has_kernel_for_dispatch_key(
        composite
    )


def _hidden_writes(given: Mapping[str, Any]) -> Nodes:
    """Statistics in training mode and embeddings of a largest norm, which no schema tells."""
    found: list[fx.Node] = []
    modes = [given[name] for name in MODES if name in given]
    if modes and modes[0] not in (False, None):
        found += _nodes((given.get("running_mean"), given.get("running_var")))
    if given.get("max_norm") is not None:
        found += _nodes(given.get("weight"))
    return tuple(found)


def draws(op: OpOverload, given: Mapping[str, Any]) -> bool:
    """Whether an operator's value is drawn at random, or left as it was found in memory.

    Args:
        given: its arguments by their names in its schema.
    """
    arguments = {a.name: a for a in op._schema.arguments}
    if "empty" in op._opname:
        return True
    if torch.Tag.nondeterministic_seeded not in op.tags and "generator" not in arguments:
        return False
    switches: dict[str, tuple[Any, ...]] = {**dict.fromkeys(MODES, (False,)), "dropout_p": (0,)}
    for name in switches.keys() & arguments.keys():
        a = arguments[name]
        value = given.get(name, a.default_value if a.has_default_value() else None)
        if not isinstance(value, fx.Node) and value in switches[name]:
            return False
    return True


class Watch(TorchDispatchMode):
    """Stops a computation of constants before it draws at random or writes to one of them."""

    def __init__(self, kept: Iterable[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        tensors = (t for t in pytree.tree_leaves(list(kept)) if isinstance(t, Tensor))
        self._kept = set(map(storage_of, tensors))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        schema = func._schema
        given = dict(zip((a.name for a in schema.arguments), args, strict=False)) | (kwargs or {})
        if "empty" not in func._opname and draws(func, given):
            raise RuntimeError(f"{func} draws at random")
        for argument in schema.arguments if schema.is_mutable else ():
            if argument.alias_info is not None and argument.alias_info.is_write:
                tensors = pytree.tree_leaves(given.get(argument.name))
                if any(isinstance(t, Tensor) and storage_of(t) in self._kept for t in tensors):
                    raise RuntimeError(f"{func} writes to a constant")
        return func(*args, **(kwargs or {}))


# ---- functions and methods ----------------------------------------------------------------------
def _of_function(gm: fx.GraphModule, node: fx.Node) -> Effects:
    target: Any = node.target
    name, home = getattr(target, "__name__", str(target)), getattr(target, "__module__", None)
    if isinstance(target, OpOverload):
        return _of_overloads(node, [target])
    if isinstance(target, OpOverloadPacket):
        return _of_overloads(node, [getattr(target, o) for o in target.overloads()])
    if isinstance(target, HigherOrderOperator):
        return _of_graphs(gm, node, name)
    if home == "_operator":
        return _of_operator(node, name)
    if home == "builtins" and target not in BUILTINS_THAT_ACT:
        return _reading(node)
    if home == "math":
        return Effects()
    if getattr(target, "__objclass__", None) is torch._C.TensorBase:
        return _of_method(node, name)
    trusted = home in TRUSTED or str(home).startswith(TRUSTED_BELOW)
    if trusted and inspect.isbuiltin(target):
        return _of_builtin(node, name)
    if trusted and callable(target):
        return _of_python(node, target, name)
    return _barrier(node, _nobody_knows(name))


def _nobody_knows(name: str) -> str:
    return f"what {name} does to the values it reads is not known"


def _packet(name: str) -> list[OpOverload]:
    """The overloads of torch's operator of a name, without those that write to an `out`."""
    packet = getattr(aten, name, None) if name.isidentifier() else None
    if not isinstance(packet, OpOverloadPacket):
        return []
    every = [getattr(packet, overload) for overload in packet.overloads()]
    return [op for op in every if not any(a.is_out for a in op._schema.arguments)]


def _of_builtin(node: fx.Node, name: str) -> Effects:
    """Of a function of torch that is not written in Python."""
    return _with_out(node, _of_named(node, name, _packet(name)))


def _of_named(node: fx.Node, name: str, overloads: list[OpOverload]) -> Effects:
    inputs = tuple(node.all_input_nodes)
    if overloads:
        return _of_overloads(node, overloads)
    return Effects(writes=inputs if _writes_by_name(name) else (), aliases=inputs)


def _writes_by_name(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")


def _with_out(node: fx.Node, found: Effects) -> Effects:
    """The effects of a call that may be told by `out=` where to write."""
    out = tuple(_nodes(node.kwargs.get("out")))
    return Effects(
        _unique((*found.writes, *out)), _unique((*found.aliases, *out)), (), draws=found.draws
    )


def _of_python(node: fx.Node, target: Any, name: str) -> Effects:
    """Of a function of torch in Python: as the operator of its name, if it is not to write."""
    inputs = tuple(node.all_input_nodes)
    given = _bound(target, node)
    in_place = given.get("inplace", False)
    written: Nodes = ()
    if isinstance(in_place, fx.Node) or in_place or _writes_by_name(name):
        written = tuple(_nodes(next(iter(given.values()), None))) or inputs
    overloads = _packet(name)
    if overloads:
        found = [_of_overload(node, op, _given(node, op._schema)) for op in overloads]
        aliases = _unique((*written, *(n for one in found for n in one.aliases)))
    else:
        aliases = inputs
    return _with_out(node, Effects(_unique((*written, *_hidden_writes(given))), aliases))


def _bound(target: Any, node: fx.Node) -> dict[str, Any]:
    """The arguments of a call by name, with the defaults of those that it leaves out."""
    signature = _signature(target)
    try:
        bound = signature.bind(*node.args, **node.kwargs) if signature else None
    except TypeError:
        bound = None
    if bound is None:
        return dict(node.kwargs)
    bound.apply_defaults()
    given = bound.arguments
    return {**given, **given.pop("kwargs", {})} if "kwargs" in given else given


@lru_cache(maxsize=1024)
def _signature(target: Any) -> inspect.Signature | None:
    try:
        return inspect.signature(target)
    except (TypeError, ValueError):
        return None


def _of_operator(node: fx.Node, name: str) -> Effects:
    """Of a function of Python's `operator`."""
    if name in OPERATORS_THAT_WRITE:
        return Effects(tuple(_nodes(node.args[:1])), tuple(_nodes(node.args[:1])))
    if name in ARITHMETIC and not any(n.meta.get("container") for n in node.all_input_nodes):
        return Effects()
    known = name in ARITHMETIC or name in OPERATORS_THAT_READ
    return _reading(node) if known else _barrier(node, _nobody_knows(name))


def _of_method(node: fx.Node, name: str) -> Effects:
    """Of a method, which is a tensor's if tensors have one of the name."""
    own = tuple(_nodes(node.args[0] if node.args else node.kwargs.get("self")))
    if name in METHODS_THAT_WRITE:
        return Effects(own, own)
    if not hasattr(Tensor, name):
        known = name in METHODS_OF_CONTAINERS
        return _reading(node) if known else _barrier(node, _nobody_knows(name))
    overloads = _packet(name)
    if not overloads and _writes_by_name(name):
        return Effects(own, own)
    return _with_out(node, _of_named(node, name, overloads))


# ---- modules and graphs -------------------------------------------------------------------------
def _of_module(gm: fx.GraphModule, node: fx.Node) -> Effects:
    module = gm.get_submodule(str(node.target))
    if isinstance(module, fx.GraphModule) and not _forward_hooks(module) and _only_reads(module):
        return _reading(node)
    why = _why_unknown(str(node.target), module)
    if why is not None:
        return _barrier(node, why, _tensors_of(module))
    inputs = tuple(node.all_input_nodes)
    in_place = any(getattr(part, "inplace", False) for part in module.modules())
    fresh = is_a(module, FRESH_LAYERS)
    normed = [m for m in module.modules() if getattr(m, "max_norm", None) is not None]
    return Effects(
        inputs if in_place else (),
        () if fresh and not in_place else inputs,
        tuple(p for part in normed for p in part.parameters(recurse=False)),
    )


def _why_unknown(path: str, module: nn.Module) -> str | None:
    """Why nobody knows what a leaf module does to what it reads, None if it is known."""
    for name, part in module.named_modules(prefix=path):
        if parametrize.is_parametrized(part) or ".parametrizations." in name:
            continue  # which computes weights, and sees nothing else
        if "forward" in vars(part):
            return f"module {name} has a forward method of its own"
        if _forward_hooks(part):
            return f"module {name} has hooks; remove them first"
        if kind_of(part) is None:
            return _nobody_knows(f"{type(part).__name__} (module {name})")
    return None


def _forward_hooks(module: nn.Module) -> list[Any]:
    """The hooks around a module's forward but for torch's own, which compute weights."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return [hook for hook in hooks if not type(hook).__module__.startswith("torch.nn.utils.")]


def _tensors_of(module: nn.Module) -> Iterator[Tensor]:
    """Everything that a module and its parts hold."""
    for part in module.modules():
        for held in (part._parameters, part._buffers, vars(part)):
            yield from (value for value in held.values() if isinstance(value, Tensor))


def _of_graphs(gm: fx.GraphModule, node: fx.Node, name: str) -> Effects:
    """Of an operator that runs graphs: those that only read make it one that only reads."""
    if name in FUNCTIONALISED:
        return Effects()
    held = [attribute(gm, n) for n in node.all_input_nodes if n.op == "get_attr"]
    graphs = [value for value in held if isinstance(value, fx.GraphModule)]
    if graphs and all(map(_only_reads, graphs)):
        return _reading(node)
    return _barrier(node, _nobody_knows(name))


def _only_reads(gm: fx.GraphModule) -> bool:
    found = [effects_of(gm, node) for node in gm.graph.nodes]
    return not any(one.writes or one.owned or one.unknown or one.draws for one in found)


# ---- memory -------------------------------------------------------------------------------------
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
        return tuple(_tensors_of(gm.get_submodule(str(node.target))))
    value = attribute(gm, node) if node.op == "get_attr" else None
    if node.op == "placeholder":
        value = _example(node)
    return (value,) if isinstance(value, Tensor) else ()


def _example(node: fx.Node) -> object:
    """What Dynamo was given for an input, which it makes of the model's tensors, too."""
    try:
        return getattr(node.meta.get("grapharg"), "example", None)
    except AssertionError:  # it is no more
        return None


def _nodes(value: Any) -> list[fx.Node]:
    """The nodes in an argument, however deep in lists."""
    found: list[fx.Node] = []
    fx.map_arg(value, lambda n: found.append(n) or n)  # type: ignore[func-returns-value]
    return found


def _unique(nodes: Iterable[fx.Node]) -> Nodes:
    return tuple(dict.fromkeys(nodes))
