"""The features of a drawn network, by name: what a test of a generator can count."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import singledispatch

from .forms import INTO_A, JOINS, MODULES, NO_OPS, OPAQUE, PRODUCTS, WITHOUT_MODULE
from .further import Blur, Deconv, Shuffle, Transpose, chains
from .joins import ChannelsLast, Join, Recall, Save, Split
from .layers import Act, Conv, Linear, Norm
from .node import Node, Nodes
from .operations import Arithmetic, Channels, Drop, Opaque, Pad, PadChannels, Pool, Slice
from .unusual import UNUSUAL_FEATURES, unusual_features

_WAYS = ("module", "functional", "torch", "method")
_OTHER_FEATURES = """
    batch 1; odd size; several inputs; intermediate returned; inner value used outside its site;
    linear; conv with bias; conv without bias; conv without BN; grouped conv; depthwise conv;
    dilated conv; even kernel; padding=same; valid conv; strided conv;
    padding mode reflect; padding mode replicate; padding mode circular;
    grouped point convolution; transposed conv; strided transposed conv; weight standardised;
    conv that differs between axes; module keyword conv; functional conv; functional keyword conv;
    conv called twice; tied weights; module BN; functional BN; BN before conv;
    shared activation module; in-place activation of the fork; in-place add on the fork;
    in-place add on a view of the fork; value changed in place after it was saved;
    identity shortcut; projection shortcut; crop shortcut; strided slice shortcut;
    option A shortcut; average pool shortcut; linear branch; pre-activation branch;
    branch that ends in an activation; branch of three or more layers; two nonlinear branches;
    add that broadcasts; nested join; squeeze and excite; squeeze and excite inside a branch;
    squeeze and excite with relu; squeeze and excite with silu; squeeze and excite with hardswish;
    sigmoid gate; hardsigmoid gate; spatial gate; gate of two branches; gate of two halves;
    layer scale; concatenation inside a branch; ghost concatenation;
    same pool on all branches; same padding on all branches; max pool of one;
    channel split; partial channel residual; channel shuffle; tokens transposed;
    linear on channels last; constant padding; reflect padding; replicate padding;
    circular padding; asymmetric padding; blur pool; strided blur pool; reflect blur pool;
    pool inside a branch; ceil_mode pool; skip over several sites; sum of three or more;
    sites that share one fork; a value joined with itself;
    constant scale; join with a constant; parameter or buffer as constant;
    input joined by add; input joined by cat; value from elsewhere joined by add
"""
FEATURES = frozenset(  # everything that `NetworkSpec.features` may say
    [
        *(f"{kind} output" for kind in ("tensor", "tuple", "list", "dict", "nested")),
        *(f"activation {kind}" for kind in (*MODULES, "prelu", *WITHOUT_MODULE)),
        *(f"activation as {way}{how}" for way in _WAYS for how in ("", " in-place")),
        *(f"join {form}" for form in JOINS),
        *(f"conv{dims}d" for dims in (1, 2, 3)),
        *(f"{kind} pool" for kind in ("avg", "max", "mean", "global avg", "global max")),
        *(*OPAQUE, *NO_OPS, "functional dropout", "clone", "contiguous", "detach", "channels_last"),
        *(" ".join(feature.split()) for feature in _OTHER_FEATURES.split(";")),
        *UNUSUAL_FEATURES,
    ]
)
_VIEWS = (Slice, Channels, Drop, Save)


@dataclass(frozen=True)
class _Place:
    """Where a node stands: between which others, and inside how many joins."""

    previous: Node | None
    following: Node | None
    depth: int


def chain_features(nodes: Nodes, depth: int) -> Iterator[str]:
    """The features of a chain and of all chains inside it; `depth` counts the joins around it."""
    around = (None, *nodes, None)
    for previous, node, following in zip(around, nodes, around[2:], strict=False):
        yield from unusual_features(node, depth)
        yield from _own_features(node, _Place(previous, following, depth))
        if not isinstance(node, Join):  # which walks its operands itself
            for chain in chains(node):
                yield from chain_features(chain, depth + 1)


@singledispatch
def _own_features(node: Node, place: _Place) -> Iterator[str]:
    """The features of one node; of a kind that is not registered there are none."""
    yield from ()


@_own_features.register
def _(node: Conv, place: _Place) -> Iterator[str]:
    yield from _conv_features(node)
    if not isinstance(place.following, Norm):
        yield "conv without BN"


@_own_features.register
def _(node: Linear, place: _Place) -> Iterator[str]:
    yield "linear"


@_own_features.register
def _(node: Norm, place: _Place) -> Iterator[str]:
    yield f"{'functional' if 'functional' in node.form else 'module'} BN"
    if isinstance(place.following, Conv) and not isinstance(place.previous, Conv):
        yield "BN before conv"


@_own_features.register
def _(node: Act, place: _Place) -> Iterator[str]:
    yield f"activation {node.kind}"
    yield f"activation as {node.form}"
    if node.shared:
        yield "shared activation module"


@_own_features.register
def _(node: Join, place: _Place) -> Iterator[str]:
    yield from _join_features(node, place.depth)


@_own_features.register
def _(node: Recall, place: _Place) -> Iterator[str]:
    kind = "input" if node.name.startswith("input") else "value from elsewhere"
    yield f"{kind} joined by {'cat' if 'cat' in node.form else 'add'}"


@_own_features.register
def _(node: Arithmetic, place: _Place) -> Iterator[str]:
    scales = "*" in node.form or "/" in node.form or node.form == "-x"
    yield "constant scale" if scales else "join with a constant"
    if node.shape:
        yield "parameter or buffer as constant"


@_own_features.register(Opaque)
@_own_features.register(Drop)
def _(node: Opaque | Drop, place: _Place) -> Iterator[str]:
    yield node.kind


@_own_features.register
def _(node: Pool, place: _Place) -> Iterator[str]:
    yield f"{node.kind} pool"
    if place.depth and node.kind in ("avg", "max"):
        yield "pool inside a branch"
    if node.ceil_mode:
        yield "ceil_mode pool"
    if node.kind == "max" and node.kernel == 1:
        yield "max pool of one"


@_own_features.register
def _(node: Save, place: _Place) -> Iterator[str]:
    if _changes_in_place(place.following):
        yield "value changed in place after it was saved"


@_own_features.register
def _(node: Deconv, place: _Place) -> Iterator[str]:
    yield "transposed conv"
    if node.stride > 1:
        yield "strided transposed conv"


@_own_features.register
def _(node: Pad, place: _Place) -> Iterator[str]:
    yield f"{node.mode} padding"
    if any(before != after for before, after in node.amounts):
        yield "asymmetric padding"


@_own_features.register
def _(node: Blur, place: _Place) -> Iterator[str]:
    yield "strided blur pool" if node.stride > 1 else "blur pool"
    if node.padding_mode == "reflect":
        yield "reflect blur pool"


@_own_features.register
def _(node: Shuffle, place: _Place) -> Iterator[str]:
    yield "channel shuffle"


@_own_features.register
def _(node: Transpose, place: _Place) -> Iterator[str]:
    yield "tokens transposed"


@_own_features.register
def _(node: Split, place: _Place) -> Iterator[str]:
    yield "channel split" if node.join == "cat" else "gate of two halves"
    if any(chain and isinstance(chain[0], Recall) for chain in node.operands):
        yield "partial channel residual"


@_own_features.register
def _(node: ChannelsLast, place: _Place) -> Iterator[str]:
    yield "linear on channels last"


def _gate_features(node: Join, depth: int) -> Iterator[str]:
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


def _halves_downwards(nodes: Nodes) -> bool:
    """Whether a pool leaves out a last odd position."""
    return any(isinstance(n, Pool) and n.kernel == n.stride == 2 and not n.ceil_mode for n in nodes)


def _strides(nodes: Nodes) -> bool:
    return any(isinstance(n, Conv) and n.stride == 2 for n in nodes)


def _pools_all(node: Node) -> bool:
    return isinstance(node, Pool) and node.kind[:4] in ("glob", "mean")


def _has_layers(nodes: Nodes) -> bool:
    return any(isinstance(n, (Conv, Linear)) for n in nodes)


def saved_names(nodes: Nodes, depth: int) -> Iterator[str]:
    """The names of values that are saved inside a join."""
    for node in nodes:
        if isinstance(node, Save) and depth:
            yield node.name
        for chain in chains(node):
            yield from saved_names(chain, depth + 1)


def recalled_names(nodes: Nodes) -> Iterator[str]:
    """The names of saved values that are read again."""
    for node in nodes:
        if isinstance(node, Recall):
            yield node.name
        for chain in chains(node):
            yield from recalled_names(chain)


def _changes_in_place(node: Node | None) -> bool:
    """Whether the node writes into the memory of what it is given."""
    if isinstance(node, Act):
        return "in-place" in node.form
    if isinstance(node, Join):
        return node.forms[0] in INTO_A and not node.operands[0]
    return isinstance(node, Arithmetic) and "=" in node.form


def _conv_features(node: Conv) -> Iterator[str]:
    dims = len(node.kernel)
    yield f"conv{dims}d"
    yield f"conv {'with' if node.bias else 'without'} bias"
    if node.groups > 1:
        depthwise = node.groups == node.inputs
        yield "depthwise conv" if depthwise else "grouped conv"
        if max(node.kernel) == 1 and not depthwise:
            yield "grouped point convolution"
    if node.dilation != 1:
        yield "dilated conv"
    if any(k % 2 == 0 for k in node.kernel):
        yield "even kernel"
    if node.stride != 1:
        yield "strided conv"
    if len(set(node.kernel)) > 1 or isinstance(node.stride, tuple):
        yield "conv that differs between axes"
    if node.padding in (0, "valid") and max(node.kernel) > 1:
        yield "valid conv"
    if node.padding == "same":
        yield "padding=same"
    if node.padding_mode != "zeros":
        yield f"padding mode {node.padding_mode}"
    if node.form == "standardised":
        yield "weight standardised"
    elif node.form != "module":
        yield f"{node.form} conv"
    if node.shared:
        yield "conv called twice" if node.shared.startswith("module:") else "tied weights"


def _join_features(node: Join, depth: int) -> Iterator[str]:
    yield from (f"join {form}" for form in node.forms)
    if depth > 0:
        yield "nested join"
    if len(node.operands) > 2:
        yield "sum of three or more"
    if sum(bool(nodes) and isinstance(nodes[0], Join) for nodes in node.operands) > 0:
        yield "sites that share one fork"
    if sum(_is_nonlinear(nodes) for nodes in node.operands) > 1:
        yield "two nonlinear branches"
    if len(set(node.operands)) == 1:
        yield "a value joined with itself"
    if node.forms[0] in PRODUCTS:
        yield from _gate_features(node, depth)
    elif any(_pools_all(n) for n in sum(node.operands, ())):
        yield "add that broadcasts"
    if "torch.cat" in node.forms[0]:
        if depth:
            yield "concatenation inside a branch"
        if not node.operands[0] and _has_layers(node.operands[1]):
            yield "ghost concatenation"
    ends = {nodes[-1] if nodes else None for nodes in node.operands}
    for kind, name in ((Pool, "pool"), (Pad, "padding")):
        if len(node.operands) > 1 and len(ends) == 1 and isinstance(next(iter(ends)), kind):
            yield f"same {name} on all branches"
    if any(map(_halves_downwards, node.operands)) and any(map(_strides, node.operands)):
        yield "floor pool beside a strided layer"
    if any(sum(isinstance(n, Join) for n in nodes) > 1 for nodes in node.operands):
        yield "skip over several sites"
    for nodes in node.operands:
        yield from _operand_features(nodes)
        yield from chain_features(nodes, depth + 1)
    in_place_first = node.forms[0].startswith(("a +=", "a -=", "a.add_"))
    if in_place_first and all(isinstance(n, _VIEWS) for n in node.operands[0]):
        slices = any(isinstance(n, (Slice, Channels)) for n in node.operands[0])
        yield "in-place add on a view of the fork" if slices else "in-place add on the fork"


def _operand_features(nodes: Nodes) -> Iterator[str]:
    """What one operand of a join is: a kind of shortcut, or a kind of branch."""
    layers = [n for n in nodes if isinstance(n, (Conv, Linear))]
    acts = [n for n in nodes if isinstance(n, Act)]
    if not nodes:
        yield "identity shortcut"
    if nodes and not acts and layers:
        yield "linear branch"
    if len(layers) == 1 and not acts:
        yield "projection shortcut"
    if any(isinstance(n, Slice) and n.step > 1 for n in nodes):
        yield "strided slice shortcut"
        if any(isinstance(n, PadChannels) for n in nodes):
            yield "option A shortcut"
    if any(isinstance(n, Slice) and n.step == 1 for n in nodes) and not layers:
        yield "crop shortcut"
    if any(isinstance(n, Pool) and n.kind == "avg" for n in nodes) and layers and not acts:
        yield "average pool shortcut"
    if layers and isinstance(nodes[-1], Arithmetic) and nodes[-1].form == "x * p":
        yield "layer scale"
    if layers and isinstance(nodes[-1], Act):
        yield "branch that ends in an activation"
    if layers and acts and nodes.index(acts[0]) < nodes.index(layers[0]):
        yield "pre-activation branch"
    if len(layers) > 2 and len(acts) > 1:
        yield "branch of three or more layers"
    for i, n in enumerate(nodes):
        if (
            isinstance(n, Act)
            and "in-place" in n.form
            and all(isinstance(before, _VIEWS) for before in nodes[:i])
        ):
            yield "in-place activation of the fork"


def _is_nonlinear(nodes: Nodes) -> bool:
    return any(isinstance(n, Act) for n in nodes)
