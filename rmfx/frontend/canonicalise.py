"""Functional, method and aten calls become the modules and operators of one dialect.

`calls.py` says what means what. A call whose arguments are not constants of the model stays as it
is, and is opaque to every rule.
"""

from __future__ import annotations

import copy
import itertools
import operator
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from rmfx.algebra.activation import is_activation
from rmfx.frontend.idioms.shuffles import find_shuffles
from rmfx.frontend.idioms.zero_channels import pad_for_zeros
from rmfx.ir.facts import Inference, facts_of
from rmfx.ir.kinds import (
    ADDCMULS,
    ARITHMETIC,
    CHOICES_OF_TWO,
    CONCATENATIONS,
    IN_PLACE_BY_METHOD,
    SELECTIONS,
    SPLIT_ARGUMENTS,
    SPLITS,
    STACKS,
    SUMS,
    aten,
    is_a,
    torch_name,
)
from rmfx.ir.names import free_name, free_path, name_nodes
from rmfx.ir.nodes import attribute, has_hooks, must_stay, replace_by_number, replaced_method
from rmfx.ir.notes import without_notes

from .calls import CALLS, NORMS, OF_REAL_NUMBERS, batch_norm, gives_several, linear

MISSING = object()
VIEWS: dict[Any, Any] = {"view": "reshape", aten.view.default: aten.reshape.default}
NARROWS = (torch.narrow, aten.narrow.default)
INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


def has_functional_form(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether `canonicalise` can express an in-place call without writing."""
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        return is_activation(module) or is_a(module, nn.modules.dropout._DropoutNd)
    if node.target in ARITHMETIC:
        return "rounding_mode" not in node.kwargs and "out" not in node.kwargs
    return node.target in CALLS and _module_for(gm, node) is not None


def canonicalise(gm: fx.GraphModule, named: Collection[str] = ()) -> None:
    """Rewrite every call that has a form in the dialect, except frozen ones.

    Args:
        gm: rewritten in place.
        named: names of nodes that are to be kept; the others get one by their place.
    """
    taken = {name for name, _ in gm.named_modules(remove_duplicate=False)}
    for node in list(gm.graph.nodes):
        if node.target is operator.getitem:
            _take_first(gm, node)
    calls = Counter(n.target for n in gm.graph.nodes if n.op == "call_module")
    frozen = {n.target for n in gm.graph.nodes if n.op == "call_module" and n.meta.get("frozen")}
    for node in list(gm.graph.nodes):
        if node.meta.get("frozen"):
            _write_by_method(node)
            continue
        if node.meta.get("number"):
            _fold_number(gm, node)
            continue
        if node.target is aten._assert_tensor_metadata.default and "val" in node.args[0].meta:
            gm.graph.erase_node(node)  # what was exported has the types that it was exported with
            continue
        if node.op == "call_module" and node.meta.get("functional"):
            _detach_in_place(gm, node, taken, keep=node.target in frozen)
        elif node.op == "call_module" and calls[node.target] == 1:
            _pad_apart(gm, node)
            _batch_norm_for(gm, node)
        elif node.op in ("call_function", "call_method"):
            _canonicalise_call(gm, node, taken)
    facts = facts_of(gm)
    for node in gm.graph.find_nodes(op="call_function", target=operator.getitem):
        _slice_of_split(facts, node)  # once the layers are modules, which say what sizes they fix
    pad_for_zeros(gm)
    for last, source, shuffle in find_shuffles(gm):
        _call_module(gm, last, shuffle, source, taken)
    gm.graph.eliminate_dead_code(is_impure_node=must_stay)
    name_nodes(gm.graph, named)


def _take_first(gm: fx.GraphModule, node: fx.Node) -> None:
    """Let an operator whose first result alone is read stand for that result."""
    call, index = node.args
    if not isinstance(call, fx.Node) or index != 0:
        return
    if call.target not in CALLS or not gives_several(call.target):
        return
    if any(user.target is not operator.getitem or user.args[1] != 0 for user in call.users):
        return
    call.meta["first"] = True
    if _module_for(gm, call) is None:
        del call.meta["first"]
        return
    for user in [user for user in call.users if user is not node]:
        user.replace_all_uses_with(node)
        node.graph.erase_node(user)
    node.target, node.args, node.kwargs = call.target, call.args, dict(call.kwargs)
    keep: dict[str, Any] = {k: node.meta[k] for k in ("shape", "dtype", "val") if k in node.meta}
    node.meta = {**call.meta, **keep, "first": True}
    node.meta.pop("container", None)
    node.graph.erase_node(call)


def _slice_of_split(facts: Inference, node: fx.Node) -> None:
    """Let a part of a split be a slice: split(x, 4, dim=1)[1] is x[:, 4:8]."""
    if node.target is not operator.getitem or node.meta.get("frozen"):
        return
    parts, index = node.args
    if not isinstance(parts, fx.Node) or not isinstance(index, int) or parts.meta.get("frozen"):
        return
    name = torch_name(parts).partition(".")[0]
    given: dict[str, Any] = {**dict(zip(("input", "amount", "dim"), parts.args, strict=False))}
    given |= {SPLIT_ARGUMENTS.get(k, k): v for k, v in parts.kwargs.items()}
    x, amount, dim = given.get("input"), given.get("amount"), given.get("dim", 0)
    if name.removeprefix("unsafe_") not in SPLITS or not isinstance(x, fx.Node):
        return
    if not isinstance(dim, int):
        return
    dim = dim + (facts.rank(x) or 0) if dim < 0 else dim
    if dim < 0:  # which one that is, nobody knows
        return
    size = facts.size(x, dim)
    if size is None and "chunk" not in name and isinstance(amount, int) and index >= 0:
        size = (index + 1) * amount  # where all before it end
    ends = _ends_of_parts("chunk" in name, amount, size)
    if ends is None or not -len(ends) <= index < len(ends):
        return
    start, stop = ends[index]
    node.args = (x, (*[slice(None)] * dim, slice(start or None, stop)))


def _ends_of_parts(chunks: bool, amount: Any, size: int | None) -> list[tuple[int, int]] | None:
    """Where the parts of a split begin and end; None where that is not known."""
    if isinstance(amount, (list, tuple)) and all(isinstance(n, int) for n in amount):
        sizes = list(amount)
    elif isinstance(amount, int) and size is not None and amount > 0:
        step = -(-size // amount) if chunks else amount
        sizes = [min(step, size - start) for start in range(0, size, step)]
    else:
        return None
    stops = list(itertools.accumulate(sizes))
    return list(zip([0, *stops], stops, strict=False))


def _write_by_method(node: fx.Node) -> None:
    """Let `x += y` write as `x.add_(y)`, which tracing the result again will not lose."""
    if node.target in IN_PLACE_BY_METHOD and node.op == "call_function":
        node.op, node.target = "call_method", IN_PLACE_BY_METHOD[node.target]


def _fold_number(gm: fx.GraphModule, node: fx.Node) -> None:
    """Replace a number of dimensions that is known, and comparisons and assertions of constants."""
    is_rank = node.op == "call_method" and node.target in ("dim", "ndimension")
    if is_rank or (node.target is getattr and node.args[1:] == ("ndim",)):
        rank = facts_of(gm).rank(node.args[0]) if isinstance(node.args[0], fx.Node) else None
        if rank is not None:
            replace_by_number(node, rank)
    elif node.target in (operator.eq, operator.ne) and not node.all_input_nodes:
        replace_by_number(node, node.target(*node.args))
    elif node.target is torch._assert and node.args and node.args[0] is True:
        node.graph.erase_node(node)


def _reads_two_tensors(node: fx.Node) -> bool:
    """`torch.max(a, b)`, which has other meanings with a dimension or alone."""
    tensors = [a for a in node.args if isinstance(a, fx.Node) and not a.meta.get("number")]
    return len(tensors) == len(node.args) == 2 and not node.kwargs


def _canonicalise_call(gm: fx.GraphModule, node: fx.Node, taken: set[str]) -> None:
    if any(n.meta.get("container") for n in node.all_input_nodes):
        return
    found = _FORMS.get(node.target)
    if found is not None and found(node):
        return
    if node.target in (aten.addmm.default, aten.mm.default):
        _linear_by_product(gm, node, taken)
        return
    if node.target in VIEWS and _has_sizes(node):
        node.target = VIEWS[node.target]  # layers may give values in another memory format
    if node.target == "narrow" or node.target in NARROWS:
        _slice_by_narrow(gm, node)
        return
    if node.target in SUMS and _sum_of_stack(gm, node):
        return
    module = _flatten_by_view(gm, node) or _module_for(gm, node)
    if module is not None:
        _call_module(gm, node, module, _input(node), taken)


# ---- one node becomes another -------------------------------------------------------------------
def _calls(node: fx.Node, target: Any) -> bool:
    node.op, node.target = "call_function", target
    return True


def _arithmetic(node: fx.Node) -> bool:
    if {"rounding_mode", "out"} & set(node.kwargs):
        return False
    if any(isinstance(a, (list, tuple)) for a in node.args):  # [x] * 2
        return True
    return _calls(node, ARITHMETIC[node.target])


def _selection(node: fx.Node) -> bool:
    return not node.kwargs and _calls(node, SELECTIONS[node.target])


def _choice_of_two(node: fx.Node) -> bool:
    return _reads_two_tensors(node) and _calls(node, CHOICES_OF_TWO[node.target])


def _subtraction_from(node: fx.Node) -> bool:
    if len(node.args) != 2:
        return False
    node.args = node.args[::-1]
    return _calls(node, torch.sub)


def _padding(node: fx.Node) -> bool:
    names = ("input", "pad", *(("mode",) if node.target is aten.pad.default else ()), "value")
    given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | node.kwargs
    node.args, node.kwargs = (given.pop("input"),), given
    return _calls(node, F.pad)


def _add_product(node: fx.Node) -> bool:
    """addcmul(x, a, b, value=v) as x + v·(a·b)."""
    names = ("input", "tensor1", "tensor2")
    given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | node.kwargs
    value = given.pop("value", 1)
    given["input"] = given.pop("self", given.get("input"))
    if set(given) != set(names):
        return True
    with node.graph.inserting_before(node):
        product = node.graph.call_function(torch.mul, (given["tensor1"], given["tensor2"]))
    product.meta = without_notes(node, "shape")
    sources = [n for n in product.all_input_nodes if "shape" in n.meta]
    if len(sources) == 2:
        shapes = [[1 if n is None else n for n in s.meta["shape"]] for s in sources]
        product.meta["shape"] = tuple(torch.broadcast_shapes(*shapes))
    node.target, node.args = torch.add, (given["input"], product)
    node.kwargs = {} if value == 1 else {"alpha": value}
    return True


def _sum_of_stack(gm: fx.GraphModule, node: fx.Node) -> bool:
    """torch.stack((a, b, …), d).sum(d) as a + b + …, and a mean as that over their number."""
    names = ("input", "dim", "keepdim")
    given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | node.kwargs
    stack, dim = given.pop("input", None), given.pop("dim", None)
    dim = dim[0] if isinstance(dim, (list, tuple)) and len(dim) == 1 else dim
    if given.pop("keepdim", False) or given or not isinstance(stack, fx.Node):
        return False
    known: dict[str, Any] = dict(zip(("tensors", "dim"), stack.args, strict=False)) | stack.kwargs
    parts, same = known.get("tensors"), type(dim) is int and known.get("dim", 0) == dim
    if stack.target not in STACKS or "frozen" in stack.meta or not same:
        return False
    if not isinstance(parts, (list, tuple)) or len(parts) < 2 or not _are_alike(gm, parts):
        return False
    total = parts[0]
    with node.graph.inserting_before(node):
        for part in parts[1:]:
            total = node.graph.call_function(torch.add, (total, part))
            total.meta = without_notes(node)
        if SUMS[node.target] == "mean":
            total = node.graph.call_function(torch.div, (total, len(parts)))
            total.meta = without_notes(node)
    node.replace_all_uses_with(total)
    node.graph.erase_node(node)
    return True


def _are_alike(gm: fx.GraphModule, parts: Sequence[Any]) -> bool:
    """Whether tensors hold real numbers of one type; integers are not added as they are summed."""
    nodes = [part for part in parts if isinstance(part, fx.Node) and "frozen" not in part.meta]
    same = len(nodes) == len(parts) and len({n.meta.get("dtype") for n in nodes}) == 1
    return same and all(facts_of(gm).is_real(node) for node in nodes)


def _concatenation(node: fx.Node) -> bool:
    """torch.cat(tensors, dim), both by place."""
    names = ("tensors", "dim")
    given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | node.kwargs
    dim = given.pop("dim", given.pop("axis", 0))
    if set(given) == {"tensors"}:
        node.target, node.args, node.kwargs = torch.cat, (given["tensors"], dim), {}
    return True


def _call_module(
    gm: fx.GraphModule, node: fx.Node, module: nn.Module, source: Any, taken: set[str]
) -> None:
    """Let a node call a module that the graph gets for it."""
    name = free_path(gm, node, taken, module)
    gm.add_submodule(name, module.eval())
    node.op, node.target, node.args, node.kwargs = "call_module", name, (source,), {}


def _linear_by_product(gm: fx.GraphModule, node: fx.Node, taken: set[str]) -> None:
    """aten.addmm(b, x, wᵀ) and aten.mm(x, wᵀ), which exporting makes of a Linear layer."""
    bias, x, transposed = node.args if len(node.args) == 3 else (None, *node.args)
    is_transposed = isinstance(transposed, fx.Node) and (
        transposed.target is aten.t.default
        or (transposed.target is aten.permute.default and transposed.args[1] == [1, 0])
    )
    if node.kwargs or not is_transposed or not isinstance(x, fx.Node):
        return
    weight, bias = _constant(gm, transposed.args[0]), _constant(gm, bias)  # type: ignore[union-attr]
    module = None if MISSING in (weight, bias) else linear({"weight": weight, "bias": bias})
    # A bias of another shape broadcasts over the batch.
    if module is not None and (bias is None or bias.shape == weight.shape[:1]):
        _call_module(gm, node, module, x, taken)


def _input(node: fx.Node) -> Any:
    return node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("self"))


def _module_for(gm: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The module that a call amounts to, None if it has no fixed one."""
    call = CALLS.get(node.target)
    if gives_several(node.target) and not node.meta.get("first"):
        return None
    if call is None or len(node.args) > len(call.names):
        return None
    given: dict[str, Any] = dict(zip(call.names, node.args, strict=False)) | node.kwargs
    if "self" in given:
        given["input"] = given.pop("self")
    x = given.pop("input", None)
    if not isinstance(x, fx.Node) or set(given) - set(call.names):
        return None
    if call.build in OF_REAL_NUMBERS and not facts_of(gm).is_real(x):
        return None
    resolved = {name: _constant(gm, value) for name, value in given.items()}
    if any(value is MISSING for value in resolved.values()):
        return None
    if call.build in NORMS:
        resolved["rank"] = facts_of(gm).rank(x)
    try:
        return call.build(resolved)
    # Arguments that the module does not take; some modules check theirs by assertions.
    except (TypeError, ValueError, AssertionError):
        return None


def _constant(gm: fx.GraphModule, value: Any) -> Any:
    """A node argument as a constant: numbers as they are, get_attr nodes as tensors."""
    if isinstance(value, fx.Node):
        if value.op != "get_attr" or value.meta.get("frozen"):
            return MISSING
        found = attribute(gm, value)
        return found if isinstance(found, Tensor) else MISSING
    if isinstance(value, (list, tuple)):
        items = [_constant(gm, v) for v in value]
        return MISSING if any(v is MISSING for v in items) else type(value)(items)
    return value


def _flatten_by_view(gm: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """`x.view(x.size(0), -1)` and its relatives are `nn.Flatten(1)`."""
    if node.target not in ("view", "reshape", torch.reshape) or len(node.args) < 2:
        return None
    sizes = node.args[1] if isinstance(node.args[1], (list, tuple)) else node.args[1:]
    if len(sizes) != 2 or sizes[1] != -1 or not isinstance(sizes[0], fx.Node):
        return None
    x, size = node.args[0], sizes[0]
    if not isinstance(x, fx.Node) or (facts_of(gm).rank(x) or 0) < 2:
        return None
    if size.target == "size" and size.args == (x, 0):
        return nn.Flatten(1)
    if size.target is not operator.getitem or size.args[1] != 0:
        return None
    shape = size.args[0]
    if not isinstance(shape, fx.Node):
        return None
    by_method = shape.target == "size" and shape.args == (x,)
    by_attribute = shape.target is getattr and shape.args == (x, "shape")
    return nn.Flatten(1) if by_method or by_attribute else None


def _has_sizes(node: fx.Node) -> bool:
    """Whether a view is to sizes, not to another type."""
    sizes: Any = node.args[1:]
    sizes = sizes[0] if len(sizes) == 1 and isinstance(sizes[0], (list, tuple)) else sizes
    return bool(sizes) and not node.kwargs and all(_is_whole(n) for n in sizes)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) or (isinstance(value, fx.Node) and "number" in value.meta)


def _slice_by_narrow(gm: fx.GraphModule, node: fx.Node) -> None:
    """narrow(x, dim, start, length) as x[…, start:start + length], for a start that is a number."""
    if len(node.args) != 4 or node.kwargs:
        return
    x, dim, start, length = node.args
    rank = facts_of(gm).rank(x) if isinstance(x, fx.Node) else None
    if not isinstance(dim, int) or type(start) is not int or start < 0:
        return
    if (dim < 0 and rank is None) or (start and not isinstance(length, int)):
        return
    stop: Any = start + length if isinstance(length, int) else length
    dim = dim + (rank or 0) if dim < 0 else dim
    node.op, node.target = "call_function", operator.getitem
    node.args = (x, (*[slice(None)] * dim, slice(start or None, stop)))


def _slice(node: fx.Node) -> bool:
    """aten.slice(x, dim, start, end, step) as x[…, start:end:step]."""
    names = ("input", "dim", "start", "end", "step")
    given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | node.kwargs
    dim = given.get("dim", 0)
    if not isinstance(dim, int) or dim < 0:
        return True
    end = given.get("end")
    end = None if isinstance(end, int) and end >= 2**62 else end
    part = slice(
        given.get("start") or None, end, None if given.get("step") == 1 else given.get("step")
    )
    node.target, node.kwargs = operator.getitem, {}
    node.args = (given["input"], (*[slice(None)] * dim, part))
    return True


def _pad_apart(gm: fx.GraphModule, node: fx.Node) -> None:
    """Let a convolution that pads with other values than zeros be a padding and a convolution."""
    conv: Any = gm.get_submodule(str(node.target))
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    if type(conv) not in kinds or conv.padding_mode == "zeros" or len(node.args) != 1:
        return
    touched = has_hooks(conv) or replaced_method(conv) is not None
    if touched or not any(conv._reversed_padding_repeated_twice):
        return
    flat, x = list(conv._reversed_padding_repeated_twice), node.args[0]
    with gm.graph.inserting_before(node):
        padded = gm.graph.call_function(F.pad, (x, flat), {"mode": conv.padding_mode})
    padded.meta = without_notes(node, "shape")
    shape = x.meta.get("shape") if isinstance(x, fx.Node) else None
    if shape is not None:
        pairs = list(zip(flat[::2], flat[1::2], strict=True))[::-1]
        size = (n if n is None else n + sum(p) for n, p in zip(shape[2:], pairs, strict=True))
        padded.meta["shape"] = (*shape[:2], *size)
    bare = copy.copy(conv)
    bare.padding, bare.padding_mode = (0,) * len(conv.kernel_size), "zeros"
    bare._reversed_padding_repeated_twice = [0] * len(flat)
    parent, _, name = str(node.target).rpartition(".")
    setattr(gm.get_submodule(parent), name, bare)
    node.args = (padded,)


def _batch_norm_for(gm: fx.GraphModule, node: fx.Node) -> None:
    """Let an instance norm with running statistics be the batch norm that it is at inference."""
    norm: Any = gm.get_submodule(str(node.target))
    dims = INSTANCE_NORMS.index(type(norm)) + 1 if type(norm) in INSTANCE_NORMS else None
    is_linear = dims is not None and norm.track_running_stats and norm.running_mean is not None
    if dims is None or not is_linear or has_hooks(norm) or replaced_method(norm):
        return
    x = _input(node) if len(node.args) == 1 else None
    rank = facts_of(gm).rank(x) if isinstance(x, fx.Node) else None
    if rank != dims + 2:  # others take inputs without a batch dimension
        return
    names = ("running_mean", "running_var", "weight", "bias", "eps")
    made = batch_norm({name: getattr(norm, name) for name in names} | {"rank": rank})
    if made is not None:
        parent, _, name = str(node.target).rpartition(".")
        setattr(gm.get_submodule(parent), name, made.eval())


def _detach_in_place(gm: fx.GraphModule, node: fx.Node, taken: set[str], *, keep: bool) -> None:
    """Let a node call a copy of its in-place module that does not write.

    Args:
        keep: whether other calls still need the module as it is.
    """
    target = str(node.target)
    module = copy.copy(gm.get_submodule(target))
    module.inplace = False  # type: ignore[assignment]
    if keep:
        target = free_name(gm, target, taken)
        gm.add_submodule(target, module)
        node.target = target
    else:
        parent, _, name = target.rpartition(".")
        setattr(gm.get_submodule(parent), name, module)


# What a call that is one operation of the dialect in another form becomes, by its target; each says
# whether nothing is left to do for the node.
_FORMS: dict[Any, Callable[[fx.Node], bool]] = {
    **dict.fromkeys(ARITHMETIC, _arithmetic),
    **dict.fromkeys(SELECTIONS, _selection),
    **dict.fromkeys(CHOICES_OF_TWO, _choice_of_two),
    **dict.fromkeys(CONCATENATIONS, _concatenation),
    **dict.fromkeys(ADDCMULS, _add_product),
    **dict.fromkeys((torch.rsub, aten.rsub.Scalar, aten.rsub.Tensor), _subtraction_from),
    **dict.fromkeys((aten.constant_pad_nd.default, aten.pad.default), _padding),
    aten.slice.Tensor: _slice,
    torch._C._nn.pad: lambda node: _calls(node, F.pad),  # what F.pad calls: Dynamo looks through
}
