"""In-place operations become functional, or are marked so that no rule goes near them.

After `n = op_(b)` every later read of `b` is a read of `n`: that is all there is to it, as long as
nothing else can see the write. Something else can if `b` shares memory with an input, a parameter,
or another value that is read later. Such a write stays, and the values of its alias class are
marked `frozen` with the reason; rules treat them as barriers.

Aliases are tracked conservatively: an operation not known to make fresh memory may return any of
its inputs.
"""

from __future__ import annotations

import builtins
import math
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from ._activation import TABLE
from ._affine import CONVS
from ._calls import BATCH_NORMS, CASTS, IN_PLACE_METHODS
from ._dialect import attribute, has_functional_form
from ._meta import noted

NUMBER_METHODS = ("size", "dim", "numel", "ndimension", "stride", "item", "is_floating_point")
CONTAINER_METHODS = (
    *("chunk", "split", "unbind", "tensor_split", "split_with_sizes", "unsafe_chunk", "hsplit"),
    *("vsplit", "dsplit", "topk", "sort", "unsafe_split"),
)
JOINS_OF_CONTAINERS = (operator.add, operator.iadd, operator.mul, operator.imul)
# Operators that may give one of their inputs, or a view of it, which their schemas do not tell.
PASSING_THROUGH = (
    *("dropout", "contiguous", "to.", "einsum", "unsafe_", "meshgrid", "atleast_"),
    *("broadcast_tensors", "sum_to_size", "type_as", "align_"),
)
NUMBER_ATTRIBUTES = ("shape", "ndim", "dtype", "device", "is_cuda")
NUMBER_MODULES = ("_operator", "operator", "math", "builtins")
IN_PLACE_OPERATORS = tuple(
    getattr(operator, f"i{name}")
    for name in (
        *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"),
        *("and", "or", "xor", "lshift", "rshift", "matmul"),
    )
)
FRESH_MODULES = (
    *CONVS,
    *BATCH_NORMS,
    *TABLE,
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.LayerNorm, nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.Softmax),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Embedding),
)
FRESH_FUNCTIONS = {
    *(operator.add, operator.sub, operator.mul, operator.truediv, operator.neg, operator.matmul),
    *(torch.add, torch.sub, torch.mul, torch.div, torch.neg, torch.matmul, torch.cat, torch.stack),
    *(F.conv1d, F.conv2d, F.conv3d, F.linear, F.batch_norm, F.layer_norm, F.group_norm),
    *(F.max_pool1d, F.max_pool2d, F.max_pool3d, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d),
    *(F.relu, F.relu6, F.gelu, F.silu, F.elu, F.leaky_relu, F.hardtanh, F.hardswish, F.softmax),
    *(torch.relu, torch.sigmoid, torch.tanh, torch.mean, torch.sum, torch.exp),
}
FRESH_METHODS = {
    "add",
    "sub",
    "mul",
    "div",
    "neg",
    "relu",
    "sigmoid",
    "tanh",
    "mean",
    "sum",
    "clone",
}


def mark_numbers(graph: fx.Graph) -> None:
    """Mark nodes whose value is a number, a size or the like instead of a tensor."""
    for node in graph.nodes:
        if _is_container(node):
            node.meta["container"] = True
        elif _is_number(node):
            node.meta["number"] = True


def _is_container(node: fx.Node) -> bool:
    """Whether a node gives a tuple or list of tensors."""
    if node.op == "call_method":
        return node.target in CONTAINER_METHODS
    if node.op != "call_function":
        return False
    if getattr(node.target, "__name__", "") in CONTAINER_METHODS:
        return True
    of_container = any(n.meta.get("container") for n in node.all_input_nodes)
    if node.target is operator.getitem:
        return of_container and isinstance(node.args[1], slice)
    return of_container and node.target in JOINS_OF_CONTAINERS


def _is_number(node: fx.Node) -> bool:
    value = noted(node)
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool, int, float)):
        return True
    if node.op == "call_method":
        return node.target in NUMBER_METHODS
    if node.op != "call_function":
        return False
    if node.target is torch._assert:
        return True
    if node.target in (builtins.getattr, getattr):
        return node.args[1] in NUMBER_ATTRIBUTES
    if getattr(node.target, "__name__", "").startswith("sym_"):
        return True
    module = getattr(node.target, "__module__", None)
    of_numbers = all(n.meta.get("number") for n in node.all_input_nodes)
    is_python = module in NUMBER_MODULES or node.target is math.floor
    return bool(node.all_input_nodes) and of_numbers and is_python


def functionalise(gm: fx.GraphModule) -> None:
    """Redirect reads after safe in-place writes; mark what must stay as `frozen`.

    A safe write gets `meta["functional"]`: its node may be given its functional form.
    """
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    aliases, types = _Aliases(), _Types(gm)
    for node in gm.graph.nodes:
        written = written_by(gm, node)
        if written is None or written.meta.get("number"):
            aliases.visit(gm, node)
            continue
        reason = aliases.why_seen(written, node, order) or types.why_changed(written, node)
        if reason is None and not has_functional_form(gm, node):
            reason = "an in-place operation without a functional form"
        if reason is None:
            written.replace_all_uses_with(
                node,
                delete_user_cb=lambda user, at=order[node]: order[user] > at,  # type: ignore[misc]
            )
            node.meta["functional"] = True
            aliases.start(node)
        else:
            aliases.join(node, written)
            aliases.freeze(node, f"{reason} ({node.name})")
    aliases.mark()
    _freeze_owners(gm)


def written_inputs(gm: fx.GraphModule) -> set[fx.Node]:
    """Placeholders whose memory a graph may write to."""
    aliases, found = _Aliases(), set()
    for node in gm.graph.nodes:
        written = written_by(gm, node)
        aliases.visit(gm, node)
        if written is not None:
            aliases.join(node, written)
            found |= {member for member in aliases.of(written) if member.op == "placeholder"}
    return found


def _freeze_owners(gm: fx.GraphModule) -> None:
    """Mark the calls of modules whose own tensors are written to."""
    written = {
        id(attribute(gm, n)): n.meta["frozen"]
        for n in gm.graph.nodes
        if n.op == "get_attr" and n.meta.get("frozen")
    }
    for node in gm.graph.nodes:
        if node.op != "call_module" or not written:
            continue
        module = gm.get_submodule(str(node.target))
        for tensor in (*module.parameters(), *module.buffers()):
            if id(tensor) in written:
                node.meta["frozen"] = written[id(tensor)]


class _Types:
    """Whether in-place arithmetic, which keeps its left operand's type, would else promote it."""

    def __init__(self, gm: fx.GraphModule) -> None:
        tensors = (*gm.parameters(), *gm.buffers())
        kinds = {t.dtype for t in tensors if t.is_floating_point()}
        casts = any(n.op == "call_method" and n.target in CASTS for n in gm.graph.nodes)
        self._uniform = len(kinds) <= 1 and not casts

    def why_changed(self, written: fx.Node, node: fx.Node) -> str | None:
        types = [n.meta.get("dtype") for n in node.all_input_nodes if not n.meta.get("number")]
        own = written.meta.get("dtype")
        if len(types) < 2 and own is not None and own[0].is_floating_point:
            return None
        known = None not in types
        same = len(set(types)) == 1 if known else self._uniform
        return None if same else "an in-place operation on values of different types"


class _Aliases:
    """Classes of values that may share memory."""

    def __init__(self) -> None:
        self._class: dict[fx.Node, list[fx.Node]] = {}
        self._attributes: dict[str, fx.Node] = {}
        self._reasons: dict[int, str] = {}

    def visit(self, gm: fx.GraphModule, node: fx.Node) -> None:
        self.start(node)
        if node.op == "get_attr":
            self.join(node, self._attributes.setdefault(str(node.target), node))
        if not node.meta.get("number") and not _is_fresh(gm, node):
            for source in node.all_input_nodes:
                self.join(node, source)

    def start(self, node: fx.Node) -> None:
        self._class[node] = [node]

    def join(self, node: fx.Node, other: fx.Node) -> None:
        mine, theirs = self._class.setdefault(node, [node]), self._class[other]
        if mine is theirs or other.meta.get("number"):
            return
        theirs.extend(mine)
        for member in mine:
            self._class[member] = theirs
        if id(mine) in self._reasons:
            self._reasons.setdefault(id(theirs), self._reasons[id(mine)])

    def of(self, node: fx.Node) -> list[fx.Node]:
        return self._class[node]

    def freeze(self, node: fx.Node, reason: str) -> None:
        self._reasons.setdefault(id(self._class[node]), reason)

    def why_seen(self, written: fx.Node, node: fx.Node, order: dict[fx.Node, int]) -> str | None:
        """Who else would see a write to `written`, if anyone."""
        members = self._class[written]
        if id(members) in self._reasons:
            return self._reasons[id(members)]
        for member in members:
            if member.op == "placeholder":
                return "an in-place operation writes to the network's input"
            if member.op == "get_attr":
                return "an in-place operation writes to a parameter or buffer"
            later = any(order[user] > order[node] for user in member.users)
            if member is not written and later:
                return "an in-place operation writes to memory that is read under another name"
        return None

    def mark(self) -> None:
        for node, members in self._class.items():
            reason = self._reasons.get(id(members))
            if reason:
                node.meta["frozen"] = reason


def written_by(gm: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """The tensor that a node writes to, None if it writes to none."""
    writes = False
    if node.op == "call_module":
        writes = bool(getattr(gm.get_submodule(str(node.target)), "inplace", False))
    elif node.op == "call_method":
        name = str(node.target)
        writes = name in IN_PLACE_METHODS or (name.endswith("_") and not name.endswith("__"))
    elif node.op == "call_function":
        out = node.kwargs.get("out")
        if isinstance(out, fx.Node):
            return out
        schema = getattr(node.target, "_schema", None)
        if schema is not None:
            writes = bool(schema.is_mutable)
        else:
            name = getattr(node.target, "__name__", "")
            by_name = name.endswith("_") and not name.endswith("__")
            writes = by_name or node.target in (*IN_PLACE_OPERATORS, operator.setitem)
            writes = writes or _inplace_argument(node)
    if not writes:
        return None
    target: Any = node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("self"))
    return target if isinstance(target, fx.Node) else None


def _inplace_argument(node: fx.Node) -> bool:
    """Whether a `torch.nn.functional` call is asked to work in place."""
    if node.kwargs.get("inplace"):
        return True
    code = getattr(node.target, "__code__", None)
    if code is None:
        return False
    names = code.co_varnames[: code.co_argcount]
    return "inplace" in names and any(
        value is True for name, value in zip(names, node.args, strict=False) if name == "inplace"
    )


def _is_fresh(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node's value is certain to lie in memory of its own."""
    if node.op == "call_module":
        return type(gm.get_submodule(str(node.target))) in FRESH_MODULES
    if node.op == "call_method":
        return node.target in FRESH_METHODS
    if node.op != "call_function":
        return True
    schema = getattr(node.target, "_schema", None)
    if schema is not None:
        passes_through = any(word in str(node.target) for word in PASSING_THROUGH)
        return not passes_through and all(r.alias_info is None for r in schema.returns)
    if any(n.meta.get("container") for n in node.all_input_nodes):
        return node.target not in JOINS_OF_CONTAINERS and node.target in FRESH_FUNCTIONS
    return node.target in FRESH_FUNCTIONS
