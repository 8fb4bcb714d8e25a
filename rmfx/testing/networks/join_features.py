"""The features of joins and of their operands, of splits, and of values that are kept."""

from __future__ import annotations

from collections.abc import Iterator

from .counted import Counted, Place
from .forms import INTO_A, JOINS, PRODUCTS
from .joins import ChannelsLast, Join, Recall, Save, Split
from .layers import Act, Conv, Linear
from .node import Node, Nodes
from .operations import Arithmetic, Channels, Drop, Pad, PadChannels, Pool, Slice

SITES = Counted()
_VIEWS = (Slice, Channels, Drop, Save)
_GATES = (
    *("sigmoid gate", "hardsigmoid gate", "spatial gate", "gate of two branches"),
    *("squeeze and excite", "squeeze and excite inside a branch"),
    *(f"squeeze and excite with {kind}" for kind in ("relu", "silu", "hardswish")),
)
_OPERANDS = (
    *("identity shortcut", "projection shortcut", "crop shortcut", "strided slice shortcut"),
    *("option A shortcut", "average pool shortcut", "linear branch", "layer scale"),
    *("branch that ends in an activation", "pre-activation branch"),
    *("branch of three or more layers", "in-place activation of the fork"),
)


@SITES.of(
    Join,
    names=(
        *(f"join {form}" for form in JOINS),
        *("nested join", "sum of three or more", "sites that share one fork"),
        *("two nonlinear branches", "a value joined with itself", "skip over several sites"),
        *("add that broadcasts", "concatenation inside a branch", "ghost concatenation"),
        *("same pool on all branches", "same padding on all branches"),
        "floor pool beside a strided layer",
        *("in-place add on the fork", "in-place add on a view of the fork"),
        *(*_GATES, *_OPERANDS),
    ),
)
def _(node: Join, place: Place) -> Iterator[str]:
    yield from (f"join {form}" for form in node.forms)
    if place.depth:
        yield "nested join"
    if node.forms[0] in PRODUCTS:
        yield from _gate(node, place.depth)
    elif any(_pools_all(n) for n in sum(node.operands, ())):
        yield "add that broadcasts"
    if "torch.cat" in node.forms[0]:
        if place.depth:
            yield "concatenation inside a branch"
        if not node.operands[0] and _has_layers(node.operands[1]):
            yield "ghost concatenation"
    yield from _side_by_side(node.operands)
    for nodes in node.operands:
        yield from _operand(nodes)
    in_place_first = node.forms[0].startswith(("a +=", "a -=", "a.add_"))
    if in_place_first and all(isinstance(n, _VIEWS) for n in node.operands[0]):
        slices = any(isinstance(n, (Slice, Channels)) for n in node.operands[0])
        yield "in-place add on a view of the fork" if slices else "in-place add on the fork"


def _side_by_side(operands: tuple[Nodes, ...]) -> Iterator[str]:
    """What the operands of a join have in common, or only some of them have."""
    if len(operands) > 2:
        yield "sum of three or more"
    if any(nodes and isinstance(nodes[0], Join) for nodes in operands):
        yield "sites that share one fork"
    if sum(any(isinstance(n, Act) for n in nodes) for nodes in operands) > 1:
        yield "two nonlinear branches"
    if len(set(operands)) == 1:
        yield "a value joined with itself"
    ends = {nodes[-1] if nodes else None for nodes in operands}
    for kind, name in ((Pool, "pool"), (Pad, "padding")):
        if len(operands) > 1 and len(ends) == 1 and isinstance(next(iter(ends)), kind):
            yield f"same {name} on all branches"
    if any(map(_halves_downwards, operands)) and any(map(_strides, operands)):
        yield "floor pool beside a strided layer"
    if any(sum(isinstance(n, Join) for n in nodes) > 1 for nodes in operands):
        yield "skip over several sites"


def _gate(node: Join, depth: int) -> Iterator[str]:
    """What kind of product a join is."""
    gate = node.operands[-1]
    last = gate[-1] if gate else None
    if isinstance(last, Act) and last.kind in ("sigmoid", "hardsigmoid"):
        yield f"{last.kind} gate"
    if any(_pools_all(n) for n in gate):
        yield "squeeze and excite"
        inside = [n.kind for n in gate if isinstance(n, Act)]
        yield f"squeeze and excite with {inside[0]}"
        if depth:
            yield "squeeze and excite inside a branch"
    elif any(isinstance(n, Conv) and n.outputs == 1 for n in gate) and not node.operands[0]:
        yield "spatial gate"
    elif all(_has_layers(nodes) for nodes in node.operands):
        yield "gate of two branches"


def _operand(nodes: Nodes) -> Iterator[str]:
    """What one operand of a join is: a kind of shortcut, or a kind of branch."""
    layers = [n for n in nodes if isinstance(n, (Conv, Linear))]
    acts = [n for n in nodes if isinstance(n, Act)]
    if not nodes:
        yield "identity shortcut"
    if layers and not acts:
        yield "linear branch"
        if len(layers) == 1:
            yield "projection shortcut"
        if any(isinstance(n, Pool) and n.kind == "avg" for n in nodes):
            yield "average pool shortcut"
    steps = [n.step for n in nodes if isinstance(n, Slice)]
    if any(step > 1 for step in steps):
        yield "strided slice shortcut"
        if any(isinstance(n, PadChannels) for n in nodes):
            yield "option A shortcut"
    if 1 in steps and not layers:
        yield "crop shortcut"
    if layers:
        yield from _branch(nodes, layers, acts)
    for i, n in enumerate(nodes):
        views_before = all(isinstance(before, _VIEWS) for before in nodes[:i])
        if isinstance(n, Act) and "in-place" in n.form and views_before:
            yield "in-place activation of the fork"


def _branch(nodes: Nodes, layers: list[Conv | Linear], acts: list[Act]) -> Iterator[str]:
    """What a branch with layers is."""
    last = nodes[-1]
    if isinstance(last, Arithmetic) and last.form == "x * p":
        yield "layer scale"
    if isinstance(last, Act):
        yield "branch that ends in an activation"
    if acts and nodes.index(acts[0]) < nodes.index(layers[0]):
        yield "pre-activation branch"
    if len(layers) > 2 and len(acts) > 1:
        yield "branch of three or more layers"


def _halves_downwards(nodes: Nodes) -> bool:
    """Whether a pool leaves out a last odd position."""
    return any(isinstance(n, Pool) and n.kernel == n.stride == 2 and not n.ceil_mode for n in nodes)


def _strides(nodes: Nodes) -> bool:
    return any(isinstance(n, Conv) and n.stride == 2 for n in nodes)


def _pools_all(node: Node) -> bool:
    return isinstance(node, Pool) and node.kind[:4] in ("glob", "mean")


def _has_layers(nodes: Nodes) -> bool:
    return any(isinstance(n, (Conv, Linear)) for n in nodes)


@SITES.of(
    Recall,
    names=("input joined by add", "input joined by cat", "value from elsewhere joined by add"),
)
def _(node: Recall, place: Place) -> Iterator[str]:
    kind = "input" if node.name.startswith("input") else "value from elsewhere"
    yield f"{kind} joined by {'cat' if 'cat' in node.form else 'add'}"


@SITES.of(Save, names=("value changed in place after it was saved",))
def _(node: Save, place: Place) -> Iterator[str]:
    if _changes_in_place(place.following):
        yield "value changed in place after it was saved"


def _changes_in_place(node: Node | None) -> bool:
    """Whether the node writes into the memory of what it is given."""
    if isinstance(node, Act):
        return "in-place" in node.form
    if isinstance(node, Join):
        return node.forms[0] in INTO_A and not node.operands[0]
    return isinstance(node, Arithmetic) and "=" in node.form


@SITES.of(Split, names=("channel split", "gate of two halves", "partial channel residual"))
def _(node: Split, place: Place) -> Iterator[str]:
    yield "channel split" if node.join == "cat" else "gate of two halves"
    if any(chain and isinstance(chain[0], Recall) for chain in node.operands):
        yield "partial channel residual"


@SITES.of(ChannelsLast, names=("linear on channels last",))
def _(node: ChannelsLast, place: Place) -> Iterator[str]:
    yield "linear on channels last"
