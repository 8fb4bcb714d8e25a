"""ResConv, a shortcut around one convolution whose two factors are trained: Xu et al., 2011.14356.

    y = act( s·BN(conv(x)) + a·P(x) ),   a > 0,   P(x) = x[::stride, ::stride]

What is in the brackets is linear, so in the end it is one convolution again (`fuse_resconv`). Where
s is 0 the convolution is not needed: nothing changes when it goes, and a layer before or behind
takes a, as c·act(z) = act(c·z) for c > 0 where act bends at 0 only. L1 drives s to 0, by the
proximal step of `rmfx.training.Slimming(net, strength, scales=layer_scales(net))`.

The paper (arXiv) has no public code and leaves open where batch norm and factors stand: this is a
reconstruction. Batch norm has to come before the addition, or s = 0 would not leave a·x. As growing
γ makes up for a small s, layers are ranked by |s|·mean|γ / √(v + ε)|, and by |s|·mean|β| where all
γ are 0.

Forms handled: Conv1d/2d/3d of any stride, groups and dilation, each with the batch norm that alone
reads it. Refused, each with its reason: convolutions that change the number of channels, of an even
kernel, or with zeros that are not evenly around its middle (the shortcut could not meet it); batch
norm without running statistics; layers that are shared, hooked or parametrized, or have factors.
One with a stride gets factors, yet is never taken out: P alone would stay.
"""

from __future__ import annotations

from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx

from rmfx.algebra.activation import Activation
from rmfx.algebra.affine import CONVS, AffineConv
from rmfx.algebra.modules import from_batch_norm
from rmfx.analysis.ranges import Ranges
from rmfx.errors import OptionError, Refusal
from rmfx.ir.kinds import BATCH_NORMS
from rmfx.ir.net import Net
from rmfx.ir.nodes import input_of
from rmfx.ir.notes import OF_VALUE, SOURCE, notes_of, positions, shape_of, why_frozen
from rmfx.ir.reading import read, read_affine
from rmfx.modules.factors import Carried, ResConv

Inserted = tuple[fx.Node, fx.Node]  # a convolution and its batch norm


# ---- putting factors there ----------------------------------------------------------------------
def is_conv(net: Net, node: fx.Node) -> bool:
    """Whether a node calls a convolution, one that is not transposed."""
    return type(net.module(node)) in CONVS[1:]


def find_normed(net: Net, conv: fx.Node) -> Inserted | Refusal:
    """A convolution with its batch norm, if a shortcut fits around them."""
    module: Any = net.module(conv)
    norm = next(iter(conv.users), None)
    if norm is None or len(conv.users) > 1 or type(net.module(norm)) not in BATCH_NORMS:
        return Refusal("batch norm is not all that reads it")
    if module.in_channels != module.out_channels:
        return Refusal(f"{module.in_channels} channels become {module.out_channels}")
    if net.module(norm).running_mean is None:  # type: ignore[union-attr]
        return Refusal("its batch norm has no running statistics")
    if any(isinstance(net.module(user), ResConv) for user in norm.users):
        return Refusal("it has factors already")
    written = next((n for n in (*conv.all_input_nodes, conv, norm) if why_frozen(n)), None)
    if written is not None:
        return Refusal(why_frozen(written))
    # The middle of the kernel meets the values that the shortcut takes.
    reach = [(k - 1) * d for k, d in zip(module.kernel_size, module.dilation, strict=True)]
    padding = {"same": reach, "valid": [0] * len(reach)}.get(module.padding)
    around = (padding or [2 * p for p in module.padding]) == reach
    if not around or any(k % 2 == 0 for k in module.kernel_size):
        return Refusal("its kernel has no middle, or zeros are not evenly around it")
    return net.guard(conv) or net.guard(norm) or (conv, norm)


def insert_factors(net: Net, found: Inserted, scale: float, carry: float) -> None:
    """Put a shortcut with its two factors around a convolution and its batch norm."""
    conv, norm = found
    module: Any = net.module(conv)
    gate = ResConv(module.stride, scale, carry, module.weight.dtype).to(module.weight.device)
    target = net.claim(f"{conv.target}_resconv", gate)
    with net.graph.inserting_after(norm):
        made = net.graph.call_module(target, (norm, conv.all_input_nodes[0]))
    made.meta = {key: value for key, value in norm.meta.items() if key != "tensor_meta"}
    norm.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)
    net.rewrites["insert_factors"] += 1


# ---- taking layers out --------------------------------------------------------------------------
def find_gates(net: Net) -> dict[fx.Node, fx.Node]:
    """The factors of a network, by their convolutions."""
    gates: dict[fx.Node, fx.Node] = {}
    for gate in net.graph.nodes:
        if not isinstance(net.module(gate), ResConv):
            continue
        norm: Any = gate.args[0]
        if type(net.module(norm)) not in BATCH_NORMS or not is_conv(net, norm.all_input_nodes[0]):
            raise OptionError(
                f"{gate.target} reads {norm.name}, which is no batch norm behind a convolution; "
                "prune layers before batch norms are folded"
            )
        gates[norm.all_input_nodes[0]] = gate
    if not gates:
        raise OptionError(
            "the model has no ResConv; insert_resconv puts them there, exporting takes them apart"
        )
    return gates


def score(net: Net, gate: fx.Node | None) -> float | None:
    """|s| times the mean slope; of a layer without slopes, times what it adds all the same."""
    if gate is None:
        return None
    factors: Any = net.module(gate)
    layer = from_batch_norm(net.module(gate.args[0]), 0)  # type: ignore[arg-type]
    if isinstance(layer, Refusal):
        raise OptionError(f"{gate.args[0]}: {layer.reason}")
    scale = float(factors.scale.detach().double().abs())
    slope, bias = (numbers.double().abs().mean() for numbers in (layer.weight, layer.bias))
    return scale * float(slope if slope > 0 else bias)


def macs_of(net: Net, conv: fx.Node) -> int:
    """Multiply-adds of a convolution on the example inputs."""
    module: Any = net.module(conv)
    weight: Tensor = module.weight
    return weight.numel() * (positions(shape_of(conv), weight.dim() - 2) or 0)


def remove_layer(net: Net, gate: fx.Node) -> None:
    """Lets a·x take the place of the sum."""
    factors: Any = net.module(gate)
    source = gate.args[1]
    with net.graph.inserting_after(gate):
        carried = Carried(factors.raw_carry.detach().clone())
        made = net.put(carried, source, str(gate.target), gate)  # type: ignore[arg-type]
    made.meta |= notes_of(gate, *OF_VALUE)
    gate.replace_all_uses_with(made)
    net.rewrites["remove_layer"] += 1


# ---- for deployment -----------------------------------------------------------------------------
def write_out(net: Net, node: fx.Node) -> None:
    """Writes factors as numbers, which other passes read."""
    module: Any = net.module(node)
    *made, source = node.args
    with net.graph.inserting_before(node):
        if max(getattr(module, "stride", (1,))) > 1:
            steps = (slice(None, None, n) for n in module.stride)
            source = net.graph.call_function(getitem, (source, (slice(None), slice(None), *steps)))
        carry = float(module.carry.detach())
        value = net.graph.call_function(torch.mul, (source, carry))
        for y in made:
            scaled = net.graph.call_function(torch.mul, (y, float(module.scale.detach())))
            value = net.graph.call_function(torch.add, (scaled, value))
    for new in (n for n in (value, *value.all_input_nodes) if not n.meta):
        new.meta = notes_of(node, *OF_VALUE, SOURCE)
    net.replace(node, value)
    net.rewrites["write_out"] += 1


class FixedRule:
    """An activation that provably changes nothing goes."""

    def __init__(self, ranges: Ranges) -> None:
        self._ranges = ranges

    def match(self, net: Net, node: fx.Node) -> fx.Node | None:
        source = input_of(node)
        if source is None or node.op != "call_module":
            return None
        layer = read(net, node)
        fixed = isinstance(layer, Activation) and self._ranges.fixed_by(source, layer)
        return source if fixed else None

    def rewrite(self, net: Net, node: fx.Node, match: fx.Node) -> None:
        net.replace(node, match)


class ScaleRule:
    """c·act(z) = act(c·z) for c > 0, where act is linear on both sides of 0 and z can absorb c."""

    def match(self, net: Net, node: fx.Node) -> tuple[fx.Node, float] | None:
        act = input_of(node)
        if act is None or node.target is not torch.mul or len(act.users) > 1:
            return None
        factor = next((value for value in node.args if isinstance(value, float)), 0.0)
        layer = read(net, act) if act.op == "call_module" else None
        if not factor > 0 or not isinstance(layer, Activation) or layer.row.slope is None:
            return None
        inner = input_of(act)
        if inner is None or len(inner.users) > 1 or why_frozen(node):
            return None
        return (act, factor) if isinstance(read_affine(net, inner), AffineConv) else None

    def rewrite(self, net: Net, node: fx.Node, match: tuple[fx.Node, float]) -> None:
        act, factor = match
        (inner,) = act.all_input_nodes
        with net.graph.inserting_before(act):
            scaled = net.graph.call_function(torch.mul, (inner, factor))
        scaled.meta = notes_of(inner, *OF_VALUE, SOURCE)
        act.replace_input_with(inner, scaled)
        node.replace_all_uses_with(act)
        net.graph.erase_node(node)
