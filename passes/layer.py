"""Layers that can be pruned whole: ResConv, after Xu et al., arXiv 2011.14356.

    y = act( s·BN(conv(x)) + a·P(x) ),   a > 0,   P(x) = x[::stride, ::stride]

A shortcut around one convolution, whose two factors are trained. What is in the brackets is linear,
so in the end it is one convolution again (`fuse_resconv`). Where s is 0 the convolution is not
needed: nothing changes when it goes, and a layer before or behind takes a. L1 drives s to 0, by the
proximal step of `rmfx.training.Slimming(net, strength, scales=layer_scales(net))`.

The paper has no public code and leaves open where batch norm and factors stand: this is a
reconstruction. Batch norm has to come before the addition, or s = 0 would not leave a·x. As growing
γ makes up for a small s, layers are ranked by |s|·mean|γ / √(v + ε)|.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx, nn

from rmfx.algebra.activation import Activation
from rmfx.algebra.affine import CONVS, AffineConv
from rmfx.algebra.modules import from_batch_norm
from rmfx.analysis.ranges import Ranges
from rmfx.errors import OptionError, Refusal, ShapeError
from rmfx.frontend.tracing import trace
from rmfx.ir.driver import apply_rule
from rmfx.ir.kinds import BATCH_NORMS
from rmfx.ir.net import Net
from rmfx.ir.nodes import input_of
from rmfx.ir.notes import positions
from rmfx.ir.reading import read, read_affine
from rmfx.ir.undisturbed import undisturbed
from rmfx.modules.factors import Carried, ResConv
from rmfx.options import is_named, number_of, patterns_of, typed
from rmfx.oracle.verification import checked
from rmfx.removal.merge import merge
from rmfx.report import META_KEY
from rmfx.rules.linear import LinearRule
from rmfx.table import Column, Record, short, table

PROTECTED = "protected"
Inserted = tuple[fx.Node, fx.Node]  # a convolution and its batch norm


@dataclass(frozen=True)
class LayerRow:
    """One convolution.

    Attributes:
        place: its path.
        score: |s|·mean|γ / √(v + ε)|, |s|·mean|β| if γ is 0, None where it has no factors.
        macs: multiply-adds it takes.
        removed: whether it went.
        reason: why it has no factors, or stays.
    """

    place: str
    score: float | None
    macs: int
    removed: bool = False
    reason: str = ""


@dataclass(frozen=True)
class LayerReport(Record):
    """What `insert_resconv` or `prune_layers` did. `str()` gives a table, `to_dict` JSON's types.

    Attributes:
        layers: in the order of the network.
    """

    layers: tuple[LayerRow, ...]

    @property
    def removed(self) -> int:
        """How many went."""
        return sum(row.removed for row in self.layers)

    @property
    def macs(self) -> int:
        """Multiply-adds of those that stay."""
        return sum(row.macs for row in self.layers if not row.removed)

    def __str__(self) -> str:
        total = f"{self.removed} of {len(self.layers)} removed, {short(self.macs)} multiply-adds"
        return f"{table(self.layers, _COLUMNS)}\n{total}"


_COLUMNS = (
    Column("layer", "place"),
    Column("score", "score", ".4f", right=True),
    Column("multiply-adds", "macs", short, right=True),
    Column("", lambda row: "removed" if row.removed else row.reason),
)


# ---- the verbs ----------------------------------------------------------------------------------
@undisturbed
def insert_resconv(
    model: nn.Module | Any,
    example_inputs: Any,
    *,
    scale: float = 1.0,
    carry: float = 0.5,
    layers: str | Sequence[str] = ("*",),
) -> tuple[fx.GraphModule, LayerReport]:
    """Put a shortcut with trainable factors around every convolution that can have one.

    It can have one if batch norm alone reads it, it has as many output as input channels, and its
    kernel is odd and padded evenly around its middle.

    Args:
        model: `nn.Module`, `GraphModule` or `ExportedProgram` in eval mode; not changed.
        example_inputs: a tensor or a tuple of arguments.
        scale: s at the start.
        carry: a at the start, above 0. The smaller, the less a trained network changes.
        layers: patterns such as "layer4.*" of the paths of convolutions.

    Returns:
        A network to be trained, and a report of all convolutions.

    Raises:
        OptionError: `carry` is not above 0, or a pattern is of no convolution.
        ShapeError: there are no example inputs, which the report needs.
        RmfxError: the model cannot be traced or its weights cannot be used.

    Example:
        >>> import rmfx, torch
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Conv2d(4, 4, 3, padding=1), torch.nn.BatchNorm2d(4), torch.nn.ReLU()
        ... ).eval()
        >>> net, report = rmfx.insert_resconv(model, torch.randn(1, 4, 8, 8))
        >>> [type(m).__name__ for m in net.children()]
        ['Conv2d', 'BatchNorm2d', 'ResConv', 'ReLU']
    """
    carry = number_of("carry", carry, above=0, below=math.inf)
    scale = number_of("scale", scale, above=-math.inf, below=math.inf)
    net = _net_of(model, example_inputs, "insert_resconv")
    convs = [str(node.target) for node in net.graph.nodes if _is_conv(net, node)]
    if convs:
        layers = patterns_of("layers", layers, convs)
    rows = []
    for node in list(net.graph.nodes):
        if not _is_conv(net, node):
            continue
        named = is_named(str(node.target), layers)
        found = _normed(net, node) if named else Refusal("not named")
        if not isinstance(found, Refusal):
            _insert(net, found, scale, carry)
        reason = found.reason if isinstance(found, Refusal) else ""
        rows.append(LayerRow(str(node.target), None, _macs(net, node), reason=reason))
    return net.finish(), LayerReport(tuple(rows))


@undisturbed
def prune_layers(
    model: nn.Module | Any,
    example_inputs: Any,
    *,
    ratio: float | None = None,
    threshold: float | None = None,
    budget: float | None = None,
    protect: str | Sequence[str] = (),
) -> tuple[fx.GraphModule, LayerReport]:
    """Remove the convolutions with ResConv factors that matter least.

    Exact where s is 0; elsewhere what the convolution gave is lost, and training on makes up for
    it. At least one such convolution stays of all that give the same channels at the same size.

    Args:
        model: with what `insert_resconv` put there, in eval mode; not changed.
        example_inputs: a tensor or a tuple of arguments.
        ratio: share of those that can go; or
        threshold: up to which score they go; or
        budget: multiply-adds that all convolutions may take on the example inputs.
        protect: patterns of paths of convolutions that stay.

    Returns:
        The shorter network, with factors still to be trained, and a report.

    Raises:
        OptionError: not one of the three is given, it makes no sense or cannot be reached.
        ShapeError: there are no example inputs.
        RmfxError: the model cannot be traced or its weights cannot be used.
    """
    _check(ratio, threshold, budget)
    net = _net_of(model, example_inputs, "prune_layers")
    gates = _gates(net)
    rows = [
        LayerRow(str(conv.target), _score(net, gates.get(conv)), _macs(net, conv))
        for conv in net.graph.nodes
        if _is_conv(net, conv)
    ]
    reasons = _reasons_to_stay(net, gates, protect)
    gone, last = _choose(gates, rows, reasons, (ratio, threshold, budget))
    reasons |= dict.fromkeys(last, "the last of its stage")
    for conv, gate in gates.items():
        if str(conv.target) in gone:
            _remove(net, gate)
    told = (
        replace(row, removed=row.place in gone, reason=reasons.get(row.place, "")) for row in rows
    )
    return net.finish(), LayerReport(tuple(told))


@undisturbed
def fuse_resconv(
    model: nn.Module | Any, example_inputs: Any = None, *, verify: bool = True
) -> fx.GraphModule:
    """Merge convolutions with their batch norms, factors and shortcuts, for deployment.

    Args:
        model: with what `insert_resconv` put there, pruned or not, in eval mode; not changed.
        example_inputs: a tensor or a tuple of arguments.
        verify: compare the result with the model, on random inputs of several sizes, before it is
            returned; see `rmfx.verify`. Needs example inputs.

    Returns:
        A network of ordinary layers that computes the same. Where a layer went before an activation
        that bends elsewhere than at 0, such as SiLU, its factor may stay as a product.

    Raises:
        RmfxError: the model cannot be traced or its weights cannot be used.
    """
    net = Net(trace(model, example_inputs))
    source = net.source
    for node in list(net.graph.nodes):
        if isinstance(net.module(node), Carried):
            _write_out(net, node)
    apply_rule(net, _FixedRule(Ranges(net)))
    # A sum has to be one layer before a factor can go through the activation behind it.
    merged = merge(trace(net.finish(), example_inputs))
    net = Net(trace(merged, example_inputs))
    apply_rule(net, _ScaleRule())
    net = Net(trace(net.finish(), example_inputs))
    apply_rule(net, LinearRule())
    fused = net.finish()
    fused.meta.pop(META_KEY, None)  # it names the additions that were written out above
    return checked("fuse_resconv", model, source, fused, example_inputs, wanted=verify)


@typed
def layer_scales(model: nn.Module) -> list[Tensor]:
    """The factors s of a network, for `rmfx.training.Slimming`."""
    return [module.scale for module in model.modules() if isinstance(module, ResConv)]


# ---- putting factors there ----------------------------------------------------------------------
def _net_of(model: Any, example_inputs: Any, verb: str) -> Net:
    if example_inputs is None:
        raise ShapeError(f"{verb} needs example inputs: it counts multiply-adds")
    net = Net(trace(model, example_inputs))
    net.sweep()
    return net


def _is_conv(net: Net, node: fx.Node) -> bool:
    return type(net.module(node)) in CONVS[1:]


def _normed(net: Net, conv: fx.Node) -> Inserted | Refusal:
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
    # The middle of the kernel meets the values that the shortcut takes.
    reach = [(k - 1) * d for k, d in zip(module.kernel_size, module.dilation, strict=True)]
    padding = {"same": reach, "valid": [0] * len(reach)}.get(module.padding)
    around = (padding or [2 * p for p in module.padding]) == reach
    if not around or any(k % 2 == 0 for k in module.kernel_size):
        return Refusal("its kernel has no middle, or zeros are not evenly around it")
    return net.guard(conv) or net.guard(norm) or (conv, norm)


def _insert(net: Net, found: Inserted, scale: float, carry: float) -> None:
    conv, norm = found
    module: Any = net.module(conv)
    gate = ResConv(module.stride, scale, carry, module.weight.dtype).to(module.weight.device)
    target = net.claim(f"{conv.target}_resconv", gate)
    with net.graph.inserting_after(norm):
        made = net.graph.call_module(target, (norm, conv.all_input_nodes[0]))
    made.meta = {key: value for key, value in norm.meta.items() if key != "tensor_meta"}
    norm.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)


# ---- removing layers ----------------------------------------------------------------------------
def _check(ratio: float | None, threshold: float | None, budget: float | None) -> None:
    given = {"ratio": ratio, "threshold": threshold, "budget": budget}
    if sum(value is not None for value in given.values()) != 1:
        raise OptionError("give one of ratio=, threshold= and budget=")
    for name, value in given.items():
        if value is not None:
            number_of(name, value, least=0, most=1 if name == "ratio" else math.inf)


def _gates(net: Net) -> dict[fx.Node, fx.Node]:
    """The factors of a network, by their convolutions."""
    gates: dict[fx.Node, fx.Node] = {}
    for gate in net.graph.nodes:
        if not isinstance(net.module(gate), ResConv):
            continue
        norm: Any = gate.args[0]
        if type(net.module(norm)) not in BATCH_NORMS or not _is_conv(net, norm.all_input_nodes[0]):
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


def _score(net: Net, gate: fx.Node | None) -> float | None:
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


def _macs(net: Net, conv: fx.Node) -> int:
    module: Any = net.module(conv)
    weight: Tensor = module.weight
    return weight.numel() * (positions(conv.meta["shape"], weight.dim() - 2) or 0)


def _reasons_to_stay(
    net: Net, gates: dict[fx.Node, fx.Node], protect: str | Sequence[str]
) -> dict[str, str]:
    reasons = {}
    convs = [node for node in net.graph.nodes if _is_conv(net, node)]
    protect = patterns_of("protect", protect, [str(conv.target) for conv in convs])
    for conv in convs:
        place = str(conv.target)
        factors: Any = net.module(gates[conv]) if conv in gates else None
        if factors is None:
            reasons[place] = "has no factors"
        elif max(factors.stride) > 1:
            reasons[place] = "has a stride"
        elif is_named(place, protect):
            reasons[place] = PROTECTED
    return reasons


def _choose(
    gates: dict[fx.Node, fx.Node],
    rows: Sequence[LayerRow],
    fixed: Mapping[str, str],
    wanted: tuple[float | None, float | None, float | None],
) -> tuple[set[str], set[str]]:
    """Which go, the least first, and which would but are the last of their stages."""
    ratio, threshold, budget = wanted
    stage = {str(conv.target): tuple(conv.meta["shape"][1:]) for conv in gates}
    free = [row for row in rows if row.place not in fixed]
    # One that is protected counts as well, one with a stride does not.
    left = Counter(stage[place] for place in stage if fixed.get(place) in (None, PROTECTED))
    macs = sum(row.macs for row in rows)
    gone: set[str] = set()
    last: set[str] = set()
    for row in sorted(free, key=lambda row: row.score or 0.0):
        if (
            (ratio is not None and len(gone) >= round(ratio * len(free)))
            or (threshold is not None and (row.score or 0.0) > threshold)
            or (budget is not None and macs <= budget)
        ):
            break
        if left[stage[row.place]] == 1:
            last.add(row.place)
            continue
        left[stage[row.place]] -= 1
        macs -= row.macs
        gone.add(row.place)
    if budget is not None and macs > budget:
        raise OptionError(f"budget={budget!r}: without all layers that can go it is {macs}")
    return gone, last


def _remove(net: Net, gate: fx.Node) -> None:
    """Lets a·x take the place of the sum."""
    factors: Any = net.module(gate)
    source = gate.args[1]
    with net.graph.inserting_after(gate):
        carried = Carried(factors.raw_carry.detach().clone())
        made = net.put(carried, source, str(gate.target), gate)  # type: ignore[arg-type]
    made.meta |= {key: gate.meta[key] for key in ("shape", "dtype") if key in gate.meta}
    gate.replace_all_uses_with(made)


# ---- for deployment -----------------------------------------------------------------------------
def _write_out(net: Net, node: fx.Node) -> None:
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
        new.meta = {k: v for k, v in node.meta.items() if k in ("shape", "dtype", "source")}
    net.replace(node, value)


class _FixedRule:
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


class _ScaleRule:
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
        if inner is None or len(inner.users) > 1 or node.meta.get("frozen"):
            return None
        return (act, factor) if isinstance(read_affine(net, inner), AffineConv) else None

    def rewrite(self, net: Net, node: fx.Node, match: tuple[fx.Node, float]) -> None:
        act, factor = match
        (inner,) = act.all_input_nodes
        with net.graph.inserting_before(act):
            scaled = net.graph.call_function(torch.mul, (inner, factor))
        scaled.meta = {k: v for k, v in inner.meta.items() if k in ("shape", "dtype", "source")}
        act.replace_input_with(inner, scaled)
        node.replace_all_uses_with(act)
        net.graph.erase_node(node)
