"""Functional, method and aten calls become the modules and operators of one dialect.

`calls.py` says what means a layer, `kinds.py` what means an operation. A call whose arguments are
not constants of the model stays as it is, and is opaque to every rule.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from rmfx.algebra.activation import is_activation
from rmfx.frontend.idioms.branch_sums import add_branches
from rmfx.frontend.idioms.masks import lift_masks
from rmfx.frontend.idioms.rearrangements import may_return
from rmfx.frontend.idioms.shuffles import find_shuffles
from rmfx.frontend.idioms.upsampling import enlarge_once
from rmfx.frontend.idioms.zero_channels import pad_for_zeros
from rmfx.ir.facts import facts_of
from rmfx.ir.fillings import filling
from rmfx.ir.functions import is_in_place
from rmfx.ir.kinds import (
    ADDCMULS,
    ARITHMETIC,
    CHOICES,
    CHOICES_OF_TWO,
    COMPARISONS,
    CONCATENATIONS,
    ELEMENTWISE,
    FILLS,
    IN_PLACE_BY_METHOD,
    LAYER_KINDS,
    MASKED_FILLS,
    NARROWS,
    SELECTIONS,
    SUMS,
    VIEWING,
    VIEWS,
    aten,
    is_a,
)
from rmfx.ir.names import name_nodes
from rmfx.ir.nodes import MEANS, must_stay, replace_by_number, two_operands
from rmfx.ir.notes import (
    FROZEN,
    FUNCTIONAL,
    VAL,
    gives_container,
    gives_number,
    type_of,
    why_frozen,
)
from rmfx.ir.open_sizes import OpenSizes
from rmfx.ir.ranks import asks_for_rank
from rmfx.ir.size_keeping import operator_name
from rmfx.modules.factors import Elementwise

from . import forms
from .calls import CALLS
from .dispatch import Probes, is_open
from .layers import (
    batch_norm_for,
    call_module,
    detach_in_place,
    input_of_call,
    module_for,
    pad_apart,
    reshaped,
)
from .parts import slice_of_split, take_first, unpack_split
from .pointwise import bounded, composed, reads_one, write_to_copy

# What rewrites a call into the dialect, by its target; each may give a module for it to call.
_FORMS: dict[Any, Callable[[fx.GraphModule, fx.Node], nn.Module | None]] = {
    **dict.fromkeys(ARITHMETIC, forms.arithmetic),
    **dict.fromkeys((torch.rsub, aten.rsub.Scalar, aten.rsub.Tensor), forms.subtraction_from),
    **dict.fromkeys(SELECTIONS, forms.selection),
    **dict.fromkeys(CHOICES_OF_TWO, forms.choice_of_two),
    **dict.fromkeys(CHOICES, forms.choice),
    **dict.fromkeys(MASKED_FILLS, forms.masked_fill),
    **dict.fromkeys(FILLS, forms.fill),
    **dict.fromkeys(CONCATENATIONS, forms.concatenation),
    **dict.fromkeys(ADDCMULS, forms.add_product),
    **dict.fromkeys(SUMS, forms.sum_of_stack),
    **dict.fromkeys(NARROWS, forms.narrow),
    aten.slice.Tensor: forms.strided_slice,
    **dict.fromkeys((aten.constant_pad_nd.default, aten.pad.default), forms.padding),
    torch._C._nn.pad: lambda gm, node: forms.becomes(node, F.pad),  # which Dynamo looks through
    **dict.fromkeys((*VIEWS, "reshape", torch.reshape), reshaped),
}

UNSAFE = "an in-place operation without a functional form"

# What calls of the dialect are; they are read as they stand.
DIALECT = frozenset(
    (*ELEMENTWISE.values(), torch.cat, F.pad, operator.getitem, "reshape", torch.reshape)
    + (aten.reshape.default, "contiguous", aten.contiguous.default, *MEANS)
)


def has_functional_form(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether `canonicalise` can express an in-place call without writing."""
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        return is_activation(module) or is_a(module, nn.modules.dropout._DropoutNd)
    if node.target in ARITHMETIC:
        return not forms.has_options(node)
    if node.target in (*MASKED_FILLS, *FILLS) and forms.has_number(gm, node):
        return True
    if node.target in CALLS and module_for(gm, node) is not None:
        return True
    facts = facts_of(gm)
    return is_open(node) and composed(gm, node, facts, Probes(gm, facts)) is not None


def canonicalise(gm: fx.GraphModule, named: Collection[str] = ()) -> None:
    """Rewrite every call that has a form in the dialect, except frozen ones.

    Args:
        gm: rewritten in place.
        named: names of nodes that are to be kept; the others get one by their place.
    """
    taken = {name for name, _ in gm.named_modules(remove_duplicate=False)}
    for node in list(gm.graph.nodes):
        if node.target is operator.getitem:
            take_first(gm, node)
    calls: dict[Any, list[fx.Node]] = defaultdict(list)
    for node in gm.graph.find_nodes(op="call_module"):
        calls[node.target].append(node)
    frozen = {n.target for n in gm.graph.nodes if n.op == "call_module" and why_frozen(n)}
    for node in list(gm.graph.nodes):
        if why_frozen(node):
            _write_by_method(node)
            continue
        if gives_number(node):
            _fold_number(gm, node)
            continue
        if node.target is aten._assert_tensor_metadata.default and VAL in node.args[0].meta:
            gm.graph.erase_node(node)  # what was exported has the types that it was exported with
            continue
        if node.op == "call_module" and node.meta.get(FUNCTIONAL):
            detach_in_place(gm, node, taken, keep=node.target in frozen)
        elif node.op == "call_module" and calls[node.target][0] is node:
            pad_apart(gm, calls[node.target])
            if len(calls[node.target]) == 1:
                batch_norm_for(gm, node)
        elif node.op in ("call_function", "call_method"):
            _canonicalise_call(gm, node, taken)
    _ask(gm, taken)
    sizes = OpenSizes(gm)  # what splits and shuffles do changes no value
    facts = facts_of(gm, sizes=sizes)
    for node in gm.graph.find_nodes(op="call_function", target=operator.getitem):
        slice_of_split(facts, node)  # once the layers are modules, which say what sizes they fix
    for node in list(gm.graph.nodes):
        if node.target in CONCATENATIONS and unpack_split(facts, node):
            forms.concatenation(gm, node)
    pad_for_zeros(gm)
    add_branches(gm, sizes)
    lift_masks(gm)
    for last, source, shuffle in find_shuffles(gm, sizes):
        call_module(gm, last, shuffle, source, taken)
    enlarge_once(gm)
    gm.graph.eliminate_dead_code(is_impure_node=must_stay)
    name_nodes(gm.graph, named)


def _canonicalise_call(gm: fx.GraphModule, node: fx.Node, taken: set[str]) -> None:
    if any(gives_container(n) for n in node.all_input_nodes):
        return
    module = _FORMS.get(node.target, module_for)(gm, node)
    if module is not None:
        call_module(gm, node, module, input_of_call(node), taken)


def _ask(gm: fx.GraphModule, taken: set[str]) -> None:
    """Read what no table knows by what it dispatches to, and what acts on each value alone."""
    facts = facts_of(gm)
    probes = Probes(gm, facts)
    constants = _constants(gm.graph)
    for node in list(gm.graph.nodes):
        if not node.users or gives_number(node) or filling(node) is not None:
            continue
        if node in constants:
            continue  # what weights are made of is nobody's activation
        if not is_open(node) and not _is_no_layer(gm, node):
            continue
        if node.op != "call_module" and not _is_told(node.target) and not may_return(node):
            found = probes.meaning(node, _is_told)
            if isinstance(found, fx.Node):
                node.replace_all_uses_with(found)
                continue
            if found is not None and _is_told(found[0]):
                forms.becomes(node, found[0])
                node.args, node.kwargs = found[1:]
                _canonicalise_call(gm, node, taken)
        if _may_be_pointwise(node):
            made = composed(gm, node, facts, probes) or bounded(gm, node, probes)
            if made is not None:
                call_module(gm, node, *made, taken)
        if node.meta.get(FUNCTIONAL) and is_in_place(operator_name(node)):
            # What it reads is written to elsewhere, which nobody knew when a form was looked for.
            for one in (node, write_to_copy(node)):
                one.meta[FROZEN] = f"{UNSAFE} ({node.name})"


def _is_told(target: Any) -> bool:
    """Whether a table knows what calls of a target are."""
    return target in CALLS or target in _FORMS or target in DIALECT


def _constants(graph: fx.Graph) -> set[fx.Node]:
    """What depends on the model's tensors alone."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        read = node.all_input_nodes
        if node.op == "get_attr" or (read and all(n in found for n in read)):
            found.add(node)
    return found


def _is_no_layer(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node calls a module of torch that no table knows."""
    if not reads_one(gm, node):
        return False
    module = gm.get_submodule(str(node.target))
    return not is_activation(module) and not is_a(module, (*LAYER_KINDS, *VIEWING, Elementwise))


def _may_be_pointwise(node: fx.Node) -> bool:
    """Whether a call is no operation of the dialect, or one that only looks like one.

    What chooses by a comparison, or combines values of several types, is no sum and no product.
    """
    if _is_no_number(node):
        return False
    read = [n for n in node.all_input_nodes if n.op != "get_attr"]
    if node.target in SELECTIONS.values():
        return node.target is torch.where or len(read) == 1
    if node.target in (torch.mul, torch.div) and len(read) == 1:
        a, b = two_operands(node)
        if a is b or (node.target is torch.div and b is read[0]):
            return True  # no scale: x * x, 1 / x
    kinds = {type_of(n) for n in (node, *read)}
    differ = None not in kinds and len(kinds) > 1
    return node.target not in DIALECT or differ or forms.has_options(node)


def _is_no_number(node: fx.Node) -> bool:
    """Whether a node is known to give something else than real numbers."""
    kind = type_of(node)
    return node.target in COMPARISONS or (kind is not None and not kind[0].is_floating_point)


def _write_by_method(node: fx.Node) -> None:
    """Let `x += y` write as `x.add_(y)`, which tracing the result again will not lose."""
    if node.target in IN_PLACE_BY_METHOD and node.op == "call_function":
        node.op, node.target = "call_method", IN_PLACE_BY_METHOD[node.target]


def _fold_number(gm: fx.GraphModule, node: fx.Node) -> None:
    """Replace a number of dimensions that is known, and comparisons and assertions of constants."""
    if asks_for_rank(node):
        rank = facts_of(gm).rank(node.args[0]) if isinstance(node.args[0], fx.Node) else None
        if rank is not None:
            replace_by_number(node, rank)
    elif node.target in (operator.eq, operator.ne) and not node.all_input_nodes:
        replace_by_number(node, node.target(*node.args))
    elif node.target is torch._assert and node.args and node.args[0] is True:
        node.graph.erase_node(node)
